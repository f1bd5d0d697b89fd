"""The model and the samples: a multilayer perceptron of 2.6 million weights, AdamW."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

INPUTS, WIDTH, DEPTH, CLASSES = 256, 768, 5, 10
ROWS = 4096
"""Different samples; sample number i has the content of row i modulo this."""
# So low that random labels are not learned by heart: gradients that vanish become denormal numbers, which are slow.
LEARNING_RATE = 1e-5


def make_model() -> nn.Module:
    """The same weights in every process."""
    torch.manual_seed(0)
    sizes = [INPUTS, *[WIDTH] * DEPTH]
    layers = [module for a, b in itertools.pairwise(sizes) for module in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(WIDTH, CLASSES))


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)


class Samples(torch.utils.data.Dataset[tuple[int, Tensor, Tensor]]):
    """``length`` samples: number, inputs ``[256]``, class."""

    def __init__(self, length: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.inputs = torch.randn(ROWS, INPUTS, generator=generator)
        self.classes = torch.randint(0, CLASSES, (ROWS,), generator=generator)
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, number: int) -> tuple[int, Tensor, Tensor]:
        return number, self.inputs[number % ROWS], self.classes[number % ROWS]

    def batch(self, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Inputs and classes of several samples."""
        rows = torch.tensor(numbers) % ROWS
        return self.inputs[rows], self.classes[rows]


def summed_loss(model: nn.Module, inputs: Tensor, classes: Tensor) -> Tensor:
    return F.cross_entropy(model(inputs), classes, reduction="sum")
