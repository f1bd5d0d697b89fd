"""The number of threads is chosen by the number of workers, after the trainer has set it."""

import os

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import unisono

DATA = TensorDataset(torch.randn(96, 6, generator=torch.Generator().manual_seed(1)), torch.arange(96) % 3)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 257), nn.Tanh(), nn.Linear(257, 1031), nn.Tanh(), nn.Linear(1031, 3))


def loss(model, batch):
    inputs, labels = batch
    return F.cross_entropy(model(inputs), labels, reduction="sum"), len(labels)


if __name__ == "__main__":
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = unisono.Trainer(model, optimizer, loss, batch_size=96, microbatches=4)
    torch.set_num_threads(2 if os.environ.get("WORLD_SIZE", "1") == "1" else 1)
    trainer.fit(DATA, epochs=3)
