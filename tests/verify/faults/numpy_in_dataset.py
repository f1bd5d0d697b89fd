"""Augmentation draws from a numpy generator that the dataset keeps: each loader worker has a copy of it."""

import numpy as np
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
        self.rng = np.random.default_rng(3)

    def __len__(self):
        return 96

    def __getitem__(self, index):
        inputs, label = DATA[index]
        return inputs + torch.tensor(self.rng.normal(size=6), dtype=torch.float32), label


def loss(model, batch):
    inputs, labels = batch
    return F.cross_entropy(model(inputs), labels, reduction="sum"), len(labels)


if __name__ == "__main__":
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = unisono.Trainer(model, optimizer, loss, batch_size=24, microbatches=8)
    trainer.fit(Noisy(), epochs=3, loader=unisono.Loader(num_workers=2))
