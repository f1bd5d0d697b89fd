"""A layer is initialised anew after the trainer has made all replicas equal, with a seed of the rank."""

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
    inputs, labels = batch
    return F.cross_entropy(model(inputs), labels, reduction="sum"), len(labels)


if __name__ == "__main__":
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = unisono.Trainer(model, optimizer, loss, batch_size=24, microbatches=8)
    torch.manual_seed(trainer.world.rank)
    nn.init.normal_(model[2].weight, std=0.1)
    trainer.fit(DATA, epochs=3)
