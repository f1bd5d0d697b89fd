"""A mean over tokens is returned as if it were a mean over samples, though sequences have different lengths."""

import torch
from torch import nn
from torch.nn import functional as F

import unisono

LENGTHS = [1 + 7 * i % 9 for i in range(96)]
TOKENS = torch.randint(0, 11, (96, 9), generator=torch.Generator().manual_seed(1))
DATA = [
    (TOKENS[i], torch.tensor([t if place < LENGTHS[i] else -100 for place, t in enumerate(TOKENS[i].roll(-1))]))
    for i in range(96)
]


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 11))


def loss(model, batch):
    tokens, labels = batch
    return F.cross_entropy(model(tokens).flatten(0, 1), labels.flatten())


if __name__ == "__main__":
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = unisono.Trainer(model, optimizer, loss, batch_size=24, microbatches=8)
    trainer.fit(DATA, epochs=3)
