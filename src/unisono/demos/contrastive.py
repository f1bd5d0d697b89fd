"""SimCLR on scikit-learn's handwritten digits: a representation learned without labels, and what a linear classifier makes of it.

Each image is told from all others of the whole batch by two of its views, however many workers there are. Run it on several
counts and compare the digests::

    unisono demo contrastive --workers 2
    unisono demo contrastive --workers 3
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import unisono
from unisono.demos import _application as application
from unisono.demos.digits import load

BATCH_SIZE = 256
MICROBATCHES = 4


class Encoder(nn.Module):
    """Images ``[N, 1, 8, 8]`` to representations ``[N, 128]``; ``project`` leads to where they are compared."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *self._block(1, 32),
            *self._block(32, 64),
            nn.MaxPool2d(2),
            *self._block(64, 128),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.project = nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 64))

    @staticmethod
    def _block(channels: int, out: int) -> tuple[nn.Module, ...]:
        return nn.Conv2d(channels, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()

    def forward(self, images: Tensor) -> Tensor:
        found: Tensor = self.features(images)
        return found


class NTXent(nn.Module):
    """The loss of SimCLR (Chen et al. 2020) over all views of the batch, with a temperature that is learned, as CLIP's is."""

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(5.0).log())

    def forward(self, one: Tensor, other: Tensor) -> tuple[Tensor, int]:
        views = torch.cat([one, other])
        near = self.log_scale.exp().clamp(max=100.0) * views @ views.T
        near = near.masked_fill(torch.eye(len(views), dtype=torch.bool, device=views.device), -torch.inf)
        partners = torch.arange(len(views), device=views.device).roll(len(one))
        return F.cross_entropy(near, partners, reduction="sum"), len(views)


def view(images: Tensor) -> Tensor:
    """Each image turned, scaled and shifted a little, with other contrast and noise, by torch's random numbers."""
    count = len(images)
    angle, scale = 0.35 * torch.randn(count), 1 + 0.15 * torch.randn(count)
    shift = 0.2 * torch.randn(count, 2)
    cos, sin = scale * angle.cos(), scale * angle.sin()
    rows = torch.stack([torch.stack([cos, -sin, shift[:, 0]], 1), torch.stack([sin, cos, shift[:, 1]], 1)], 1)
    moved = F.grid_sample(images, F.affine_grid(rows, list(images.shape), align_corners=False), align_corners=False)
    return moved * (1 + 0.3 * torch.randn(count, 1, 1, 1)) + 0.1 * torch.randn_like(moved)


def embed(model: Any, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    images, _ = batch
    one, other = (F.normalize(model.project(model(view(images)))) for _ in range(2))
    return one, other


def linear_probe(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> float:
    """Accuracy on ``test`` of a logistic regression that was trained on ``train``: representations and labels."""
    from sklearn.linear_model import LogisticRegression

    (train_x, train_y), (test_x, test_y) = ((x.flatten(1).numpy(), y.numpy()) for x, y in (train, test))
    mean, spread = train_x.mean(0), train_x.std(0) + 1e-6
    fitted = LogisticRegression(max_iter=2000).fit((train_x - mean) / spread, train_y)
    return float(fitted.score((test_x - mean) / spread, test_y))


def main() -> None:
    parser = argparse.ArgumentParser(prog=application.program("contrastive"), description="Learn digits without their labels.")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--labels", type=int, default=50, help="labelled images that the linear classifier sees; default: 50")
    parser.add_argument("--run-dir", help="default: runs/contrastive-on-N, where N is the number of workers")
    arguments = parser.parse_args()

    world = unisono.World.from_environment().at_most(MICROBATCHES)
    torch.manual_seed(arguments.seed)
    model, contrast = Encoder(), NTXent()
    shifted, test = load()
    train = TensorDataset(shifted.images, shifted.labels)
    optimizer = torch.optim.AdamW([*model.parameters(), *contrast.parameters()], lr=3e-3, weight_decay=1e-4)
    trainer = unisono.Trainer(
        model,
        optimizer,
        unisono.WholeBatchLoss(embed, contrast),
        batch_size=BATCH_SIZE,
        microbatches=MICROBATCHES,
        seed=arguments.seed,
        scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, arguments.epochs * -(-len(train) // BATCH_SIZE)),
        run_dir=arguments.run_dir or f"runs/contrastive-on-{world.size}",
    )
    trainer.fit(train, epochs=arguments.epochs)
    learned, unseen = (trainer.predict(part, lambda model, batch: model(batch[0])) for part in (train, test))
    if not trainer.world.is_main:
        return
    (images, labels), (test_images, test_labels), few = train.tensors, test.tensors, arguments.labels
    print(f"accuracy on {len(test)} images of a linear classifier that has seen {few} labels")
    for name, (seen, other) in {"learned": (learned, unseen), "pixels": (images, test_images)}.items():
        print(f"  {name:<8} {linear_probe((seen[:few], labels[:few]), (other, test_labels)):.2%}")


if __name__ == "__main__":
    main()
