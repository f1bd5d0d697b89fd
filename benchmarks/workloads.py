"""The models and batches that the benchmarks train: the same for every peer, made from a fixed seed."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Batch = tuple[Tensor, Tensor]


@dataclasses.dataclass(frozen=True)
class Workload:
    """What is trained: a model, a global batch, and what takes the loss."""

    name: str
    model: Callable[[], nn.Module]
    samples: Callable[[int], Batch]
    """How many -> inputs and targets."""
    batch_size: int
    loss: Callable[[Tensor, Tensor], Tensor]
    """Outputs, targets -> summed loss."""
    count: Callable[[Tensor], int]
    """Targets -> what to divide the sum by."""

    def batch(self) -> Batch:
        """One global batch."""
        return self.samples(self.batch_size)


def mlp(width: int, depth: int, inputs: int) -> nn.Module:
    """``depth`` hidden layers of ``width``, 10 outputs."""
    sizes = [inputs, *[width] * depth]
    layers = [module for a, b in itertools.pairwise(sizes) for module in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(width, 10))


class GPT(nn.Module):
    """A small causal transformer: tokens ``[N, 64]`` to logits ``[N, 64, 96]``."""

    def __init__(self, layers: int = 4, width: int = 128, tokens: int = 64, vocabulary: int = 96) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.place = nn.Parameter(torch.zeros(tokens, width))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(tokens), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.place
        for block in self.blocks:
            x = block(x, src_mask=self.mask, is_causal=True)
        return self.norm(x) @ self.embed.weight.T


def cnn() -> nn.Module:
    """Five convolutions with BatchNorm on ``[N, 3, 32, 32]``."""
    channels = [3, 32, 64, 64, 128, 128]
    layers: list[nn.Module] = []
    for number, (a, b) in enumerate(itertools.pairwise(channels)):
        layers += [nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU()]
        if number % 2 == 1:
            layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))


class Recommender(nn.Module):
    """Two tables of 200,000 x 32: pairs of ids ``[N, 2]`` to a rating ``[N]``."""

    def __init__(self, rows: int = 200_000, width: int = 32) -> None:
        super().__init__()
        self.users, self.items = nn.Embedding(rows, width), nn.Embedding(rows, width)
        self.head = nn.Sequential(nn.Linear(2 * width, 64), nn.ReLU(), nn.Linear(64, 1))

    def forward(self, pairs: Tensor) -> Tensor:
        pair = torch.cat([self.users(pairs[:, 0]), self.items(pairs[:, 1])], dim=1)
        return self.head(pair).squeeze(1)


def _classes(*shape: int) -> Callable[[int], Batch]:
    def make(samples: int) -> Batch:
        generator = torch.Generator().manual_seed(0)
        return torch.randn(samples, *shape, generator=generator), torch.randint(0, 10, (samples,), generator=generator)

    return make


def _text(samples: int) -> Batch:
    ids = torch.randint(0, 96, (samples, 65), generator=torch.Generator().manual_seed(0))
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def _ratings(samples: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 200_000, (samples, 2), generator=generator), torch.rand(samples, generator=generator)


def _cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output.flatten(0, -2), target.flatten(), reduction="sum")


def _squared(output: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(output, target, reduction="sum")


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("tiny", lambda: mlp(64, 3, 64), _classes(64), 64, _cross_entropy, len),
        Workload("middle", lambda: mlp(512, 5, 256), _classes(256), 128, _cross_entropy, len),
        Workload("wide", lambda: mlp(2048, 5, 256), _classes(256), 64, _cross_entropy, len),
        Workload("gpt", GPT, _text, 24, _cross_entropy, Tensor.numel),
        Workload("cnn", cnn, _classes(3, 32, 32), 64, _cross_entropy, len),
        Workload("recommender", Recommender, _ratings, 4096, _squared, len),
    )
}
