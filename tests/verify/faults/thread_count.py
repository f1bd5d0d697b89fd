"""The number of threads is chosen by the number of workers, after the trainer has set it."""

import os

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import unisono

DATA = TensorDataset(torch.randn(96, 6, generator=torch.Generator().manual_seed(1)), torch.arange(96) % 3)


class Shift(nn.Module):
    """Adds the sum of many numbers, which threads share out among them on any processor, and round differently then. (Of
    matrix products that is true on some processors only.)"""

    def __init__(self):
        super().__init__()
        self.many = nn.Parameter(torch.randn(200_003))

    def forward(self, hidden):
        return hidden + 1e-3 * self.many.sum()


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 257), nn.Tanh(), Shift(), nn.Linear(257, 3))


def loss(model, batch):
    inputs, labels = batch
    return F.cross_entropy(model(inputs), labels, reduction="sum"), len(labels)


if __name__ == "__main__":
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = unisono.Trainer(model, optimizer, loss, batch_size=96, microbatches=4)
    torch.set_num_threads(2 if os.environ.get("WORLD_SIZE", "1") == "1" else 1)
    trainer.fit(DATA, epochs=3)
