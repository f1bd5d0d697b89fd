"""A small convolutional net with GroupNorm on images that are flipped at random."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset

import unisono


class Images(Dataset):
    def __init__(self):
        self.images = torch.randn(120, 3, 12, 12)

    def __len__(self):
        return 120

    def __getitem__(self, index):
        image = self.images[index]
        return (image.flip(-1) if torch.rand(()) < 0.5 else image), index % 4


def loss(model, batch):
    images, labels = batch
    return F.cross_entropy(model(images), labels, reduction="sum"), len(labels)


if __name__ == "__main__":
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.GroupNorm(4, 32), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4),
    )  # fmt: skip
    trainer = unisono.Trainer(model, torch.optim.SGD(model.parameters(), 0.05, momentum=0.9), loss, batch_size=32, microbatches=8)
    trainer.fit(Images(), epochs=4)
