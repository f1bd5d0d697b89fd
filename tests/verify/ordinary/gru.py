"""A recurrent net over sequences."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import unisono


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.cells, self.head = nn.GRU(7, 24, num_layers=2, batch_first=True, dropout=0.1), nn.Linear(24, 3)

    def forward(self, inputs):
        outputs, _ = self.cells(inputs)
        return self.head(outputs[:, -1])


def loss(model, batch):
    inputs, labels = batch
    return F.cross_entropy(model(inputs), labels)


if __name__ == "__main__":
    torch.manual_seed(0)
    model = Net()
    trainer = unisono.Trainer(model, torch.optim.Adam(model.parameters(), lr=3e-3), loss, batch_size=24, microbatches=6)
    for batch in trainer.batches(TensorDataset(torch.randn(96, 9, 7), torch.arange(96) % 3), epochs=3):
        trainer.step(batch)
