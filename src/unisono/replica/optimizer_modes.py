"""Optimizers that train other weights than those to use: schedule-free ones have ``train()`` and ``eval()`` for that. *Local.*"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class Modes:
    """The modes of an optimizer; of one that has none nothing is done.

    Going from one mode to the other and back rounds. So the weights that are trained are kept meanwhile, and come back bit by
    bit: evaluations and checkpoints do not change what follows.

    Attributes:
        exist: Whether it has any.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.exist = all(callable(getattr(optimizer, name, None)) for name in ("train", "eval"))
        self._optimizer = cast(Any, optimizer)
        self._is_training = False  # as far as is known: the user may have left it in either mode
        self._kept: list[tuple[nn.Parameter, Tensor]] = []

    def train(self) -> bool:
        """The weights are those that are trained; whether they were kept for that."""
        if not self.exist or self._is_training:
            return False
        kept, self._kept = self._kept, []
        self._optimizer.train()
        self._is_training = True
        with torch.no_grad():
            for parameter, value in kept:
                parameter.copy_(value)
        return bool(kept)

    def rest(self) -> None:
        """The weights are those to use."""
        if not self.exist:
            return
        self.train()
        self._kept = [(p, p.detach().clone()) for group in self._optimizer.param_groups for p in group["params"]]
        self._optimizer.eval()
        self._is_training = False

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """While the body runs the weights are those to use."""
        if not self.exist or self._kept:
            yield
            return
        self.rest()
        try:
            yield
        finally:
            self.train()
