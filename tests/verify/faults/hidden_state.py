"""A recurrent model goes on from the hidden state of the batch before."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import unisono

DATA = TensorDataset(torch.randn(96, 6, generator=torch.Generator().manual_seed(1)), torch.arange(96) % 3)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.GRUCell(6, 16), nn.Linear(16, 3)
        self.hidden = None

    def forward(self, inputs):
        before = self.hidden[: len(inputs)] if self.hidden is not None and len(self.hidden) >= len(inputs) else None
        hidden = self.cell(inputs, before)
        self.hidden = hidden.detach()
        return self.head(hidden)


def net():
    torch.manual_seed(0)
    return Net()


def loss(model, batch):
    inputs, labels = batch
    return F.cross_entropy(model(inputs), labels, reduction="sum"), len(labels)


if __name__ == "__main__":
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = unisono.Trainer(model, optimizer, loss, batch_size=24, microbatches=8)
    trainer.fit(DATA, epochs=3)
