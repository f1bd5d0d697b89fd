"""What a worker writes down while it runs the script: enough to see where two runs part, without keeping a tensor."""

from __future__ import annotations

import dataclasses
import pickle
from dataclasses import field
from pathlib import Path
from typing import Any

import torch

from unisono.guard.data import content_digest
from unisono.guard.values import comparable
from unisono.launch.report import FailureRecord

Digests = dict[str, str]
"""Name -> digest of a tensor's bytes, dtype and shape."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Note:
    """Something that the user's code did, and where."""

    what: str = ""
    phase: str = ""
    """What was going on: "script", "trainer", "between", "data", "loss", "step", "evaluate", "callback NAME"."""
    file: str = ""
    line: int = 0
    code: str = ""
    order: int = 0
    """Number among the notes of its kind."""
    result: str = ""
    """What a call returned, as text."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScriptFailure(FailureRecord):
    """Why the script did not come to its end on a worker."""

    worker: int
    """Rank of the worker whose account this is."""
    refused: bool = False
    """Whether it is an error of unisono's own, whose text says what to do."""
    where: Note = Note()
    """The innermost line of the user's code."""


@dataclasses.dataclass
class StepRecord:
    """One optimizer step, as one worker saw it."""

    step: int
    data: dict[int, str] = field(default_factory=dict)
    """Microbatch number -> digest of what was loaded."""
    losses: dict[int, tuple[float, float]] = field(default_factory=dict)
    """Microbatch number -> loss (as returned) and count (-1: a mean)."""
    loss: float = 0.0
    norm: float = 0.0
    rates: tuple[float, ...] = ()
    settings: list[dict[str, Any]] = field(default_factory=list)
    """The optimizer's parameter groups before the step, without parameters."""
    start: Digests = field(default_factory=dict)
    """Parameters and buffers before the step."""
    end: Digests = field(default_factory=dict)
    """Parameters and buffers after the step, callbacks included."""
    optimizer: Digests = field(default_factory=dict)
    """Optimizer state that this worker keeps."""
    edited: dict[str, list[str]] = field(default_factory=dict)
    """Callback -> tensors that it changed."""
    update: float = 0.0
    """L2 norm of the change of all parameters (reference only)."""
    event: int = 0
    """Number of this step among the process's steps and evaluations."""


@dataclasses.dataclass
class TrainerRecord:
    """One trainer that the script made."""

    batch_size: int = 0
    microbatches: int = 0
    run_dir: str = ""
    """As the script gave it."""
    settings: list[dict[str, Any]] = field(default_factory=list)
    """The optimizer's parameter groups when it was made."""
    callbacks: list[str] = field(default_factory=list)
    loader_workers: int = 0
    steps: list[StepRecord] = field(default_factory=list)
    evaluations: list[dict[str, float]] = field(default_factory=list)
    norms: list[str] = field(default_factory=list)
    """Modules that normalise over the batch."""
    findings: dict[str, Any] = field(default_factory=dict)
    """What an inspection of the loss found."""


@dataclasses.dataclass
class WorkerRecord:
    """Everything that one worker has to tell about a run."""

    rank: int = 0
    trainers: list[TrainerRecord] = field(default_factory=list)
    events: int = 0
    """Steps and evaluations."""
    notes: dict[str, list[Note]] = field(default_factory=dict)
    """What the script does that results may depend on, by kind."""
    state: list[str] = field(default_factory=list)
    """Places that a call of the loss changed."""
    data_state: list[str] = field(default_factory=list)
    """Places of the dataset that reading a sample changed."""
    draws: list[str] = field(default_factory=list)
    """Generators from which the loss drew: "torch", "numpy", "random"."""
    buffers: list[str] = field(default_factory=list)
    """Buffers that the loss changed."""
    warnings: list[str] = field(default_factory=list)
    failure: ScriptFailure | None = None
    threads: int = 0
    gpus: int | None = None
    """How many there are; None: training is on the CPU."""
    modules: list[str] = field(default_factory=list)
    """Library modules that the script imported."""

    def write(self, file: Path) -> None:
        """Whole or not at all."""
        part = file.with_suffix(".part")
        part.write_bytes(pickle.dumps(self))
        part.replace(file)

    @classmethod
    def read(cls, file: Path) -> WorkerRecord | None:
        """None if the worker left none. (Written by our own child, in a folder that only this user can write to.)"""
        record: WorkerRecord | None = pickle.loads(file.read_bytes()) if file.exists() else None
        return record


def add(known: list[str], new: list[str]) -> None:
    """*local*. Adds what is not there yet."""
    known.extend(name for name in new if name not in known)


def digests(model: torch.nn.Module) -> Digests:
    """Of all parameters and buffers."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: content_digest(tensor) for name, tensor in named if not tensor.is_meta}


def data_digest(data: Any) -> str:
    """Of whatever a microbatch is made of."""
    try:
        return content_digest(data)
    except TypeError:  # objects of the user's own classes
        try:
            return content_digest(pickle.dumps(data))
        except Exception:
            return type(data).__name__


def groups(optimizer: Any) -> list[dict[str, Any]]:
    """The optimizer's settings, without parameters."""
    return [{key: comparable(value) for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
