"""Embedding tables whose gradients have few rows. Everything here is *local*.

A batch touches a few rows of a large table, but PyTorch writes the whole gradient, zeros and all, unless the module says
``sparse=True``; and then most optimizers refuse it. unisono lets backward make only the rows, adds and sends only rows, and
gives the optimizer the dense gradient that it expects: the same update, for a fraction of the memory traffic. Only
optimizers that are not PyTorch's own, which may do something else with rows, get the rows of tables made with ``sparse=True``.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence

import torch
from torch import nn

_LARGE = 2**20
"""Elements from which a table is worth it."""


class Tables:
    """The embedding tables of a model.

    Args:
        model: The model, on its device.
    """

    def __init__(self, model: nn.Module) -> None:
        uses = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
        compiled = any(
            module._compiled_call_impl is not None or isinstance(module, torch._dynamo.eval_frame.OptimizedModule)
            for module in model.modules()
        )
        self._asked: list[nn.Module] = []
        self._switched: list[nn.Embedding] = []
        for module in model.modules():
            if not isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
                continue
            if module.sparse and uses[id(module.weight)] == 1:
                self._asked.append(module)
            elif type(module) is nn.Embedding and not compiled and uses[id(module.weight)] == 1 and _gains(module):
                self._switched.append(module)

    def slots(self, parameters: Sequence[nn.Parameter]) -> frozenset[int]:
        """Which of these, by position, get gradients of few rows."""
        weights = {id(module.weight) for module in (*self._asked, *self._switched)}
        return frozenset(index for index, parameter in enumerate(parameters) if id(parameter) in weights)

    def asked(self, parameters: Sequence[nn.Parameter]) -> frozenset[int]:
        """Which of these, by position, are tables that were made with ``sparse=True``."""
        weights = {id(module.weight) for module in self._asked}
        return frozenset(index for index, parameter in enumerate(parameters) if id(parameter) in weights)

    @contextlib.contextmanager
    def switched(self) -> Iterator[None]:
        """While the body computes a gradient, tables make only the rows of theirs."""
        if not self._switched:
            yield
            return
        for module in self._switched:
            module.sparse = True
        try:
            yield
        finally:
            for module in self._switched:
                module.sparse = False


def _gains(module: nn.Embedding) -> bool:
    weight = module.weight
    return (
        weight.numel() >= _LARGE
        and weight.device.type == "cpu"
        and weight.is_contiguous()
        and module.max_norm is None
        and not module.scale_grad_by_freq
        # A hook of the user's own expects the dense gradient.
        and not weight._backward_hooks
        and not weight._post_accumulate_grad_hooks
    )
