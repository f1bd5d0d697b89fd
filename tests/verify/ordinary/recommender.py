"""An embedding-bag recommender with a table of users, Adagrad."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import unisono


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.users, self.items = nn.Embedding(200, 16, sparse=True), nn.EmbeddingBag(300, 16, mode="mean")

    def forward(self, users, items):
        return (self.users(users) * self.items(items)).sum(1)


def loss(model, batch):
    users, items, liked = batch
    return F.binary_cross_entropy_with_logits(model(users, items), liked, reduction="sum"), len(liked)


if __name__ == "__main__":
    torch.manual_seed(0)
    model = Net()
    data = TensorDataset(torch.randint(0, 200, (400,)), torch.randint(0, 300, (400, 5)), torch.randint(0, 2, (400,)).float())
    trainer = unisono.Trainer(model, torch.optim.Adagrad(model.parameters(), lr=0.05), loss, batch_size=64, microbatches=8)
    trainer.fit(data, epochs=3)
