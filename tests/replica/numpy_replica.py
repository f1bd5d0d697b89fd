"""A replica without a framework: a small NumPy model with gradients written by hand, its own SGD, and a buffer.

It stands for the frameworks to come: whatever the house needs beyond ``unisono.replica`` would show here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from unisono.layout import Allocate, Layout, ParameterSpec
from unisono.replica.base import LossPart, MetricFunction, Microbatch, Replica
from unisono.replica.buffers import Buffers
from unisono.sync.base import GradientSink

Array = npt.NDArray[np.float32]
SHAPES = {"hidden.weight": (5, 7), "hidden.bias": (7,), "out.weight": (7,), "out.bias": (1,), "seldom": (3,)}
CPU = torch.device("cpu")


class Model:
    """tanh(x W + b) v + c, of inputs less their running mean; noise on the hidden layer while it trains."""

    def __init__(self, seed: int) -> None:
        random = np.random.default_rng(seed)
        self.weights: dict[str, Array] = {name: random.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}
        self.mean = np.zeros(5, dtype=np.float32)
        self.trains = True

    def forward(self, x: Array) -> tuple[Array, Array, Array]:
        """Centred inputs, hidden values and output."""
        if self.trains:
            self.mean += np.float32(0.1) * (x.mean(axis=0) - self.mean)
        centred = x - self.mean
        hidden = np.tanh(centred @ self.weights["hidden.weight"] + self.weights["hidden.bias"])
        if self.trains:
            hidden *= np.random.uniform(0.9, 1.1, hidden.shape).astype(np.float32)
        return centred, hidden, hidden @ self.weights["out.weight"] + self.weights["out.bias"]


def squares(model: Model, batch: Sequence[Tensor]) -> tuple[float, int]:
    """The metric that is the loss: squared errors."""
    inputs, targets = (tensor.numpy() for tensor in batch)
    _, _, output = model.forward(inputs)
    return float(np.square(output - targets).sum()), len(targets)


class NumpyReplica(Replica):
    """See the module.

    Args:
        seed: Of the initial weights.
    """

    updates_apart = True

    def __init__(self, seed: int = 0, *, rate: float = 0.01, momentum: float = 0.9) -> None:
        self.device = CPU
        self.model = Model(seed)
        self.loss = squares
        self.buffers = Buffers(["mean"], [torch.from_numpy(self.model.mean)])
        self.layout = Layout(
            ParameterSpec(name, shape, torch.empty(shape).stride(), torch.float32, CPU) for name, shape in SHAPES.items()
        )
        self._group: dict[str, Any] = {"lr": rate, "momentum": momentum}
        self._states: dict[int, dict[str, Any]] = {}

    # ------------------------------------------------------------------ the model

    def adopt(self, allocate: Allocate) -> list[Tensor]:
        flats = self.layout.flats(allocate)
        for slot, view in zip(self.layout.slots, self.layout.views(flats), strict=True):
            view.copy_(torch.from_numpy(self.model.weights[slot.name]))
            self.model.weights[slot.name] = view.numpy()
        return flats

    def tensors(self) -> dict[str, Tensor]:
        weights = {name: torch.from_numpy(value) for name, value in self.model.weights.items()}
        return {**weights, **self.buffers.named()}

    def model_state(self) -> dict[str, Tensor]:
        return self.tensors()

    def load_model_state(self, state: Mapping[str, Tensor]) -> None:
        for name, tensor in self.tensors().items():
            tensor.copy_(state[name])

    # ------------------------------------------------------------------ a step

    def gradients(self, microbatches: Sequence[Microbatch], seeds: Sequence[int], sink: GradientSink) -> list[LossPart]:
        parts: list[LossPart] = []
        for microbatch, seed in zip(microbatches, seeds, strict=True):
            self.seed(seed)
            inputs, targets = (tensor.numpy() for tensor in microbatch.data)
            before = self.model.forward(inputs)
            loss, gradients = self._backward(inputs, targets, before)
            sink.add(microbatch.number, [gradients.get(slot.name) for slot in self.layout.slots])
            parts.append(LossPart(torch.tensor(loss), len(targets)))
        return parts

    def _backward(
        self, inputs: Array, targets: Array, before: tuple[Array, Array, Array]
    ) -> tuple[np.float32, dict[str, Tensor]]:
        centred, hidden, output = before
        error = output - targets
        slope = np.outer(2 * error, self.model.weights["out.weight"]) * (1 - np.square(hidden))
        found = {
            "hidden.weight": centred.T @ slope,
            "hidden.bias": slope.sum(axis=0),
            "out.weight": hidden.T @ (2 * error),
            "out.bias": (2 * error).sum(keepdims=True),
        }
        if inputs[0, 0] > 0:  # in some microbatches only
            found["seldom"] = np.full(3, inputs[0, 0], dtype=np.float32)
        return np.square(error).sum(), {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in found.items()}

    def update(self, slots: Sequence[int], gradients: Sequence[Tensor]) -> None:
        for slot, gradient in zip(slots, gradients, strict=True):
            state = self._states.setdefault(slot, {})
            if "velocity" not in state:
                state["velocity"], state["steps"] = torch.zeros_like(gradient), 0
            velocity = state["velocity"].numpy()
            velocity *= np.float32(self._group["momentum"])
            velocity += gradient.numpy()
            state["steps"] += 1
            self.model.weights[self.layout.names[slot]] -= np.float32(self._group["lr"]) * velocity

    def learning_rates(self) -> tuple[float, ...]:
        return (self._group["lr"],)

    # ------------------------------------------------------------------ evaluation

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        self.model.trains = False
        try:
            yield
        finally:
            self.model.trains = True

    def evaluate(self, metrics: Mapping[str, MetricFunction], data: Any, samples: int, seed: int) -> Tensor:
        self.seed(seed)
        return torch.tensor([metric(self.model, data) for metric in metrics.values()], dtype=torch.float64)

    # ------------------------------------------------------------------ the optimizer's state

    def slot_state(self, slot: int) -> Mapping[str, Any]:
        return self._states.get(slot, {})

    def place_state(self, slot: int, key: str, value: Any) -> None:
        self._states.setdefault(slot, {})[key] = value

    def set_slot_state(self, slot: int, state: Mapping[str, Any], *, strides: bool = True) -> None:
        self._states[slot] = {key: value.clone() if isinstance(value, Tensor) else value for key, value in state.items()}

    def clear_state(self, slots: Collection[int] | None = None) -> None:
        for slot in list(self._states) if slots is None else slots:
            self._states.pop(slot, None)

    def hyperparameters(self) -> list[dict[str, Any]]:
        return [dict(self._group)]

    def set_hyperparameters(self, groups: Sequence[Mapping[str, Any]], *, exactly: bool = False) -> None:
        self._group = {**({} if exactly else self._group), **groups[0]}

    # ------------------------------------------------------------------ the schedule

    def advance_schedule(self, loss: float) -> None:
        self._group["lr"] *= 0.95
