"""Samples of a microbatch are the negatives of each other: no fault, but not what the whole batch would give."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import unisono

DATA = TensorDataset(torch.randn(96, 6, generator=torch.Generator().manual_seed(1)), torch.arange(96) % 3)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))


def loss(model, batch):
    vectors = F.normalize(model(batch[0]), dim=1)
    return F.cross_entropy(vectors @ vectors.roll(1, 0).T, torch.arange(len(vectors)), reduction="sum"), len(vectors)


if __name__ == "__main__":
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = unisono.Trainer(model, optimizer, loss, batch_size=24, microbatches=8)
    trainer.fit(DATA, epochs=3)
