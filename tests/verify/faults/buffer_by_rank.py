"""A buffer that forward uses is written by one worker only."""

import os

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import unisono

DATA = TensorDataset(torch.randn(96, 6, generator=torch.Generator().manual_seed(1)), torch.arange(96) % 3)


class Net(nn.Sequential):
    def forward(self, inputs):
        if os.environ.get("RANK", "0") == "0":
            self.scale += 0.01
        return super().forward(inputs) * self.scale


def net():
    torch.manual_seed(0)
    model = Net(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
    model.register_buffer("scale", torch.ones(1))
    return model


def loss(model, batch):
    inputs, labels = batch
    return F.cross_entropy(model(inputs), labels, reduction="sum"), len(labels)


if __name__ == "__main__":
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = unisono.Trainer(model, optimizer, loss, batch_size=24, microbatches=8)
    trainer.fit(DATA, epochs=3)
