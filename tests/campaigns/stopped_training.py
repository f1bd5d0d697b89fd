"""What the campaign of stops trains: ``unisono run stopped_training.py RUN_DIR``. It says each step that it has done."""

from __future__ import annotations

import random
import sys
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

import unisono

SAMPLES, BATCH_SIZE, MICROBATCHES, EPOCHS = 203, 48, 4, 12
STEPS_PER_EPOCH = 5  # the last batch of an epoch has 11 samples
STEPS = EPOCHS * STEPS_PER_EPOCH
CHECKPOINT_EVERY = 4
TRAINED = "trained step"


class Net(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.Conv2d(32, 48, 3, stride=2),
            nn.BatchNorm2d(48),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(48 * 49, 61),
            nn.ReLU(),
            nn.Linear(61, 10),
        )


class Images(Dataset[Any]):
    """Noise of all three kinds over random images."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.images = torch.randn(SAMPLES, 1, 16, 16, generator=generator)
        self.labels = torch.randint(0, 10, (SAMPLES,), generator=generator)

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        noise = 0.1 * torch.randn(1, 16, 16) + 0.1 * float(np.random.randn()) + 0.1 * random.random()
        return self.images[index] + noise, self.labels[index]


def loss(model: nn.Module, batch: Any) -> tuple[Tensor, int]:
    images, labels = batch
    return F.cross_entropy(model(images), labels, reduction="sum"), len(labels)


class Tells(unisono.Callback):
    def on_step(self, trainer: unisono.Trainer, result: unisono.StepResult) -> None:
        if trainer.collective.rank == 0:
            print(f"{TRAINED} {result.step}\n", end="", flush=True)  # one write, so that no other line gets into it


def main(run_dir: str) -> None:
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    trainer = unisono.Trainer(
        model,
        optimizer,
        loss,
        batch_size=BATCH_SIZE,
        microbatches=MICROBATCHES,
        scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS),
        max_grad_norm=1.0,
        checkpoint_every=CHECKPOINT_EVERY,
        run_dir=run_dir,
        callbacks=[Tells()],
    )
    trainer.fit(Images(), EPOCHS)


if __name__ == "__main__":
    main(sys.argv[1])
