"""An accuracy is averaged over workers that have not equally many samples."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import unisono

DATA = TensorDataset(torch.randn(96, 6, generator=torch.Generator().manual_seed(1)), torch.arange(96) % 3)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))


class Accuracy(unisono.Callback):
    def on_step(self, trainer, result):
        workers = trainer.collective
        mine = slice(workers.rank * 96 // workers.size, (workers.rank + 1) * 96 // workers.size + 5 * workers.rank)
        inputs, labels = DATA.tensors
        with torch.no_grad():
            hits = (trainer.model(inputs[mine]).argmax(1) == labels[mine]).float().mean()
        everybodys = workers.all_gather(hits.reshape(1))
        print("accuracy", float(sum(everybodys) / workers.size))


def loss(model, batch):
    inputs, labels = batch
    return F.cross_entropy(model(inputs), labels, reduction="sum"), len(labels)


if __name__ == "__main__":
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = unisono.Trainer(model, optimizer, loss, batch_size=24, microbatches=8, callbacks=[Accuracy()])
    trainer.fit(DATA, epochs=3)
