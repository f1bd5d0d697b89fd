"""Reading a sample changes it: it is normalised in place, again each time it is read."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset

import unisono

DATA = TensorDataset(torch.randn(96, 6, generator=torch.Generator().manual_seed(1)), torch.arange(96) % 3)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))


class Noisy(Dataset):
    def __init__(self):
        self.inputs = DATA.tensors[0].clone()

    def __len__(self):
        return 96

    def __getitem__(self, index):
        self.inputs[index] *= 0.7
        return self.inputs[index].clone(), DATA[index][1]


def loss(model, batch):
    inputs, labels = batch
    return F.cross_entropy(model(inputs), labels, reduction="sum"), len(labels)


if __name__ == "__main__":
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = unisono.Trainer(model, optimizer, loss, batch_size=48, microbatches=8)
    trainer.fit(Noisy(), epochs=9)
