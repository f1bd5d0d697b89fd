"""Where two runs part, and how far they get from each other. *Local*; knows records and tensors, runs nothing."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from unisono.verify.record import StepRecord
from unisono.verify.runs import RunOutcome, brief

_WORDS = {
    "start": "before the step",
    "settings": "in the optimizer's settings",
    "data": "in the data",
    "loss": "in forward",
    "gradient": "in the gradient",
    "callback": "in a callback",
    "update": "in the update",
    "metric": "in a metric",
    "steps": "in the number of steps",
    "failure": "in an error",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difference:
    """The first place where a run is not like another one."""

    stage: str
    """What came out differently first: a key of ``_WORDS``."""
    what: str
    """The same in words, with values."""
    trainer: int = 0
    """Number of the trainer, from 0."""
    step: int = 0
    """Optimizer step, from 1."""
    event: int = 0
    """Steps and evaluations up to here."""
    rank: int = 0
    """The worker that differs."""
    tensor: str | None = None
    """The first parameter, buffer or optimizer state that differs after the step, in the model's order."""
    tensors: int = 0
    """How many do."""
    ulp: int | None = None
    """Largest difference within ``tensor``, in units in the last place."""
    largest: float | None = None
    """The same, absolute."""

    @property
    def where(self) -> str:
        """In a few words."""
        return _WORDS[self.stage]


def first_difference(one: RunOutcome, other: RunOutcome) -> Difference | None:
    """Where ``other`` parts from ``one`` (of one worker), or None if all its workers have the same bits all the way."""
    for number, trainer in enumerate(one.trainers[: len(other.trainers)]):
        everybody = [record.trainers[number] for record in other.records if record and len(record.trainers) > number]
        for index, step in enumerate(trainer.steps):
            theirs = [each.steps[index] for each in everybody if index < len(each.steps)]
            if len(theirs) < other.job.workers:
                break
            found = _step_difference(step, theirs)
            if found is not None:
                return dataclasses.replace(found, trainer=number, step=step.step, event=step.event)
        for rank, each in enumerate(everybody):
            for left, right in zip(trainer.evaluations, each.evaluations, strict=False):
                if repr(left) != repr(right):
                    found = Difference(stage="metric", what=f"{left} and {right}", rank=rank)
                    return dataclasses.replace(found, trainer=number, step=len(trainer.steps), event=one.first.events)
    failure = one.failure or other.failure
    if failure is not None and (one.failure is None or other.failure is None):
        return Difference(stage="failure", what=f"{failure.kind}: {brief(failure.message)}", rank=failure.worker)
    lengths = [[len(trainer.steps) for trainer in run.trainers] for run in (one, other)]
    if lengths[0] != lengths[1]:
        return Difference(stage="steps", what=f"{lengths[0]} and {lengths[1]} steps")
    return None


def _step_difference(step: StepRecord, theirs: Sequence[StepRecord]) -> Difference | None:
    """The first one within a step, in the order in which things happen.

    Args:
        step: On one worker.
        theirs: By rank.
    """
    after = [_unlike(step.end, each.end) for each in theirs]
    changed_rank = next((rank for rank, names in enumerate(after) if names), 0)
    tensors = after[changed_rank]
    more: dict[str, Any] = {"tensor": tensors[0] if tensors else None, "tensors": len(tensors)}
    for rank, each in enumerate(theirs):
        if names := _unlike(step.start, each.start):
            return Difference(stage="start", what=f"{names[0]} is another", tensor=names[0], tensors=len(names), rank=rank)
    for rank, each in enumerate(theirs):
        if repr(each.settings) != repr(step.settings):
            return Difference(stage="settings", what=settings_difference(step.settings, each.settings), rank=rank, **more)
    for rank, each in enumerate(theirs):
        for number in sorted(each.data):
            if each.data[number] != step.data.get(number):
                return Difference(stage="data", what=f"microbatch {number}", rank=rank, **more)
    for rank, each in enumerate(theirs):
        for number in sorted(each.losses):
            left, right = step.losses.get(number), each.losses[number]
            if repr(left) != repr(right):
                return Difference(
                    stage="loss", what=f"microbatch {number}: {_shown(left)} and {_shown(right)}", rank=rank, **more
                )
    more["rank"] = changed_rank
    for each in theirs:
        if repr(each.norm) != repr(step.norm):
            return Difference(stage="gradient", what=f"norm {step.norm:.9g} and {each.norm:.9g}", **more)
    if tensors:
        edits = [edit for each in (step, *theirs) for edit in each.edited.items()]
        if any(name in tensors for _, names in edits for name in names):
            return Difference(stage="callback", what=f"changed by {', '.join(sorted(dict(edits)))}", **more)
        return Difference(stage="update", what=f"{len(tensors)} tensors", **more)
    # Each worker keeps the state of the parameters that it updates.
    names = _unlike(step.optimizer, {name: value for each in theirs for name, value in each.optimizer.items()})
    if names:
        return Difference(stage="update", what="optimizer state", tensor=names[0], tensors=len(names))
    return None


def _unlike(one: Mapping[str, str], other: Mapping[str, str]) -> list[str]:
    return [name for name, value in one.items() if other.get(name) != value]


def _shown(value: tuple[float, float] | None) -> str:
    if value is None:
        return "none"
    return f"{value[0]:.9g}" if value[1] < 0 else f"{value[0]:.9g} over {value[1]:g}"


def settings_difference(one: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]]) -> str:
    """The settings of an optimizer that differ, in words."""
    if len(one) != len(other):
        return f"{len(one)} and {len(other)} parameter groups"
    found = [
        f"{key} {left[key]} and {right.get(key)}" + (f" (group {number})" if len(one) > 1 else "")
        for number, (left, right) in enumerate(zip(one, other, strict=True))
        for key in left
        if repr(left[key]) != repr(right.get(key))
    ]
    return "; ".join(found)


def measure(difference: Difference, one: RunOutcome, other: RunOutcome) -> Difference:
    """The difference with its size, from two runs that have kept the tensors of that step."""
    left = one.tensors(difference.trainer, difference.step)
    rights = [other.tensors(difference.trainer, difference.step, rank) for rank in range(other.job.workers)]
    if difference.tensor is None or left is None:
        return difference
    for right in rights:
        for kind in ("model", "optimizer"):
            values = left[kind].get(difference.tensor), (right or {}).get(kind, {}).get(difference.tensor)
            if values[0] is not None and values[1] is not None and values[0].shape == values[1].shape:
                ulp, largest = distance_of(values[0], values[1])
                if ulp:
                    return dataclasses.replace(difference, ulp=ulp, largest=largest)
    return difference


def distance_of(one: Tensor, other: Tensor) -> tuple[int, float]:
    """Largest difference of two tensors: in ulp (floats), and absolute."""
    if not one.numel():
        return 0, 0.0
    if not one.is_floating_point():
        largest = float((one.double() - other.double()).abs().max()) if not one.is_complex() else math.nan
        return int(largest), largest
    left, right = _ordered(one), _ordered(other)
    return int((left - right).abs().max()), float((one.double() - other.double()).abs().max())


def _ordered(tensor: Tensor) -> Tensor:
    """Floats as integers in the same order: neighbours are one apart."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    values = tensor.detach().contiguous().view(bits).to(torch.int64)
    smallest = -(1 << (8 * tensor.element_size() - 1))
    return torch.where(values < 0, smallest - values, values)


# ---------------------------------------------------------------------- distances

_FLOORS = {"loss": 4e-6, "gradient norm": 2e-5, "update": 1e-4, "optimizer state": 2e-5, "learning rate": 0.0}
"""What rounding may always do, relative: some dozen float32 ulp."""
_LIMITS = {"loss": 0.0, "gradient norm": 0.05, "update": 0.5, "optimizer state": 0.1, "learning rate": 0.0}
"""What a single step may be off by, relative: where rounding decides on which side of a kink (ReLU, max) a value lies, the
gradient jumps, though not the loss."""
_MARGIN = 50.0
"""Two estimates of a rounding error are of one size, not equal."""


@dataclasses.dataclass(frozen=True)
class Distance:
    """How far two runs are apart, step by step from equal weights: relative differences, one a step, by name."""

    steps: Mapping[str, tuple[float, ...]]

    def usual(self, name: str) -> float:
        """What three of four steps stay below."""
        values = sorted(self.steps.get(name, ()))
        return values[(3 * (len(values) - 1)) // 4] if values else 0.0

    def largest(self, name: str) -> float:
        """The largest of all steps."""
        return max(self.steps.get(name, ()), default=0.0)

    def beyond(self, explained: Distance) -> list[str]:
        """What is farther apart than rounding explains."""
        return [
            name
            for name in self.steps
            if not self.usual(name) <= _MARGIN * explained.usual(name) + _FLOORS[name]
            or not self.largest(name) <= _MARGIN * explained.largest(name) + max(_FLOORS[name], _LIMITS[name])
        ]

    @classmethod
    def union(cls, several: Sequence[Distance]) -> Distance:
        """At each step the largest."""
        names = dict.fromkeys(name for one in several for name in one.steps)
        return cls({name: tuple(map(max, zip(*(one.steps[name] for one in several), strict=False))) for name in names})


def distance(one: RunOutcome, plain: RunOutcome) -> Distance:
    """Between a run on one worker and the reference, over all trainers."""
    steps: dict[str, list[float]] = {name: [] for name in _FLOORS}
    for number, (left, right) in enumerate(zip(one.trainers, plain.trainers, strict=False)):
        for a, b in zip(left.steps, right.steps, strict=False):
            steps["loss"].append(_relative(a.loss, b.loss))
            steps["gradient norm"].append(_relative(a.norm, b.norm))
            steps["learning rate"].append(max(map(_relative, a.rates, b.rates), default=0.0))
            tensors = one.tensors(number, a.step), plain.tensors(number, a.step)
            if tensors[0] is not None and tensors[1] is not None:
                apart, _ = _norms(tensors[0]["model"], tensors[1]["model"])
                steps["update"].append(apart / b.update if b.update else float(apart > 0))
                apart, size = _norms(tensors[0]["optimizer"], tensors[1]["optimizer"])
                steps["optimizer state"].append(apart / size if size else float(apart > 0))
    return Distance({name: tuple(values) for name, values in steps.items()})


def _norms(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> tuple[float, float]:
    """L2 norm of the difference of all floating-point tensors, and of the other side."""
    pairs = [(left.double(), other[name].double()) for name, left in one.items() if _counts(left) and name in other]
    return (
        math.hypot(*(float((left - right).norm()) for left, right in pairs)),
        math.hypot(*(float(right.norm()) for _, right in pairs)),
    )


def _counts(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.dim() > 0  # an optimizer's step count is no state that could be off


def _relative(one: float, other: float) -> float:
    if repr(one) == repr(other):
        return 0.0
    scale = max(abs(one), abs(other))
    value = abs(one - other) / scale if scale else 0.0
    return value if math.isfinite(value) else math.inf
