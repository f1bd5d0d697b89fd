"""The loss is a mean, and returned with a count."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import unisono

DATA = TensorDataset(torch.randn(96, 6, generator=torch.Generator().manual_seed(1)), torch.arange(96) % 3)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))


MICROBATCHES = 8


def loss(model, batch):
    inputs, labels = batch
    return F.cross_entropy(model(inputs), labels), len(labels)


if __name__ == "__main__":
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = unisono.Trainer(model, optimizer, loss, batch_size=24, microbatches=MICROBATCHES)
    trainer.fit(DATA, epochs=3)
