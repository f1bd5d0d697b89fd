"""Handwritten digits: a small convolutional net on scikit-learn's ``load_digits`` (1,797 real images of 8 x 8 pixels).

BatchNorm, dropout, augmentation, gradient clipping, a cosine schedule and a short last batch: everything that usually
makes the result depend on the number of workers. Run it on several counts and compare the digests::

    unisono demo digits --workers 2
    unisono demo digits --workers 3
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset

import unisono
from unisono.demos import _application as application

BATCH_SIZE = 64
MICROBATCHES = 8


class Net(nn.Module):
    """Images ``[N, 1, 8, 8]`` to logits ``[N, 10]``."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(64, 96, 3, padding=1, bias=False),
            nn.BatchNorm2d(96),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        self.head = nn.Sequential(nn.Flatten(), nn.Dropout(0.3), nn.Linear(96 * 4, 10))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(images))
        return logits


class Shifted(Dataset[tuple[Tensor, Tensor]]):
    """Images moved by up to one pixel: random, but the same for everyone who reads the same sample of the same epoch."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        down, right = torch.randint(0, 3, (2,)).tolist()
        padded = F.pad(self.images[index], (1, 1, 1, 1))
        return padded[:, down : down + 8, right : right + 8], self.labels[index]


def load() -> tuple[Shifted, TensorDataset]:
    """The training and the test set: four fifths and one fifth of the images, equally many of each digit."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    train_x, test_x, train_y, test_y = train_test_split(
        data.images / 16.0, data.target, test_size=0.2, random_state=0, stratify=data.target
    )
    return Shifted(_images(train_x), torch.tensor(train_y)), TensorDataset(_images(test_x), torch.tensor(test_y))


def _images(pixels: object) -> Tensor:
    return torch.tensor(pixels, dtype=torch.float32).unsqueeze(1)


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
    images, labels = batch
    return F.cross_entropy(model(images), labels, reduction="sum"), len(labels)


def accuracy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
    images, labels = batch
    return (model(images).argmax(dim=1) == labels).sum(), len(labels)


def main() -> None:
    parser = argparse.ArgumentParser(prog=application.program("digits"), description="Train a small convolutional net on digits.")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run-dir", help="default: runs/digits-on-N, where N is the number of workers")
    arguments = parser.parse_args()

    world = unisono.World.from_environment().at_most(MICROBATCHES)
    torch.manual_seed(arguments.seed)
    model = Net()
    train, test = load()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.02)
    steps = arguments.epochs * -(-len(train) // BATCH_SIZE)
    shown = application.Evaluation(test, {"accuracy": accuracy}, batch_size=len(test), every=1, epochs=arguments.epochs)
    trainer = unisono.Trainer(
        model,
        optimizer,
        loss,
        batch_size=BATCH_SIZE,
        microbatches=MICROBATCHES,
        seed=arguments.seed,
        scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps),
        max_grad_norm=1.0,
        run_dir=arguments.run_dir or f"runs/digits-on-{world.size}",
        callbacks=[shown],
    )
    trainer.fit(train, epochs=arguments.epochs)
    result = shown.measure(trainer)
    if trainer.world.is_main:
        print(f"test accuracy {result['accuracy']:.2%} on {len(test)} images that were not trained on")


if __name__ == "__main__":
    main()
