"""What is looked at in the first loss of each worker, before its backward. Everything here is *local*."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from unisono.errors import ConfigurationError


def check_leaves(loss: Tensor, parameters: Sequence[nn.Parameter]) -> None:
    """Whether all parameters that a loss depends on are the model's.

    Raises:
        ConfigurationError: Nobody would train or keep one of them: weights of the loss function itself, say.
    """
    known = set(map(id, parameters))
    for leaf in _leaves(loss):
        if isinstance(leaf, nn.Parameter) and id(leaf) not in known:
            raise ConfigurationError(
                f"the loss depends on a parameter of shape {tuple(leaf.shape)} that is no part of the model, so nobody would "
                "keep it equal on all workers, or save it. Make the module that holds it a part of the model (model.criterion = "
                "criterion) and give its parameters to the optimizer; or freeze it with requires_grad_(False)"
            )


def warn_of_mean(returned: Any, samples: int) -> None:
    """Warns if a mean over a microbatch came together with a count: it would be divided by the count once more."""
    if not isinstance(returned, (tuple, list)) or samples < 2 or not float(returned[1]) > 1:
        return
    if _is_mean(returned[0].grad_fn, samples):
        warnings.warn(
            f"the loss returns a mean together with a count ({float(returned[1]):g} for the first {samples} samples), so it is "
            'divided twice. Return the sum over the microbatch (reduction="sum") with the count; or the mean alone, which then '
            "counts as a mean over samples",
            stacklevel=2,
        )


def _leaves(loss: Tensor) -> Iterator[Tensor]:
    """The leaves of the graph that a loss has come from."""
    nodes = [loss.grad_fn]
    seen: set[Any] = set()
    while nodes:
        node: Any = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            if (leaf := getattr(node, "variable", None)) is not None:
                yield leaf
            nodes.extend(following for following, _ in node.next_functions)


def _is_mean(node: Any, samples: int) -> bool:
    """Whether a scalar is a mean over a microbatch, as far as the operations that have made it tell: or a sum of such means, each
    perhaps made smaller."""
    name = "" if node is None else node.name().removesuffix("Backward0").removesuffix("Backward1")
    inputs = [] if node is None else [following for following, _ in node.next_functions if following is not None]
    if name == "Mean":
        sizes = node._saved_self_sym_sizes
        return len(sizes) > 0 and sizes[0] % samples == 0  # else what is left of a sum over samples
    if getattr(node, "_saved_reduction", None) == 1:
        return True
    if name in ("Add", "Sub"):
        return bool(inputs) and all(_is_mean(following, samples) for following in inputs)
    if name in ("Mul", "Div") and len(inputs) == 1:
        factor = node._saved_other
        if not isinstance(factor, Tensor) or factor.numel() != 1:
            return False
        size = abs(float(factor))
        return (size <= 1 if name == "Mul" else size >= 1) and _is_mean(inputs[0], samples)
    return name in ("Neg", "ToCopy", "Squeeze", "View", "Reshape", "Clone") and _is_mean(inputs[0], samples)
