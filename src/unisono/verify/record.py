"""What a worker writes down while it runs the script: enough to see where two runs part, without keeping a tensor."""

from __future__ import annotations

import dataclasses
import json
import pickle
from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

Digests = dict[str, str]
"""Name -> digest of a tensor's bytes, dtype and shape."""


@dataclasses.dataclass
class StepRecord:
    """One optimizer step, as one worker saw it."""

    step: int
    samples: list[int] = dataclasses.field(default_factory=list)
    """Sample indices of this worker's microbatches."""
    data: dict[str, str] = dataclasses.field(default_factory=dict)
    """Microbatch number -> digest of what was loaded."""
    losses: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    """Microbatch number -> loss (as returned) and count (-1: a mean)."""
    loss: float = 0.0
    norm: float = 0.0
    rates: list[float] = dataclasses.field(default_factory=list)
    settings: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    """The optimizer's parameter groups before the step, without parameters."""
    start: Digests = dataclasses.field(default_factory=dict)
    """Parameters and buffers before the step."""
    end: Digests = dataclasses.field(default_factory=dict)
    """Parameters and buffers after the step, callbacks included."""
    optimizer: Digests = dataclasses.field(default_factory=dict)
    """Optimizer state that this worker keeps."""
    edited: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    """Callback -> tensors that it changed."""
    seconds: float = 0.0
    update: float = 0.0
    """L2 norm of the change of all parameters (reference only)."""
    event: int = 0
    """Number of this step among the process's steps and evaluations."""


@dataclasses.dataclass
class TrainerRecord:
    """One trainer that the script made."""

    batch_size: int = 0
    microbatches: int = 0
    seed: int = 0
    call: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Where the script makes it."""
    run_dir: str = ""
    """As the script gave it."""
    settings: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    """The optimizer's parameter groups when it was made."""
    callbacks: list[str] = dataclasses.field(default_factory=list)
    loader_workers: int = 0
    asked: int = 0
    """Steps that the script would have made of the first `fit` or `batches`."""
    steps: list[StepRecord] = dataclasses.field(default_factory=list)
    evaluations: list[dict[str, float]] = dataclasses.field(default_factory=list)
    norms: list[str] = dataclasses.field(default_factory=list)
    """Modules that normalise over the batch."""
    findings: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What an inspection of the loss found."""


@dataclasses.dataclass
class WorkerRecord:
    """Everything that one worker has to tell about a run."""

    rank: int = 0
    trainers: list[TrainerRecord] = dataclasses.field(default_factory=list)
    events: int = 0
    """Steps and evaluations."""
    notes: dict[str, list[dict[str, Any]]] = dataclasses.field(default_factory=dict)
    """What the script does that results may depend on, by kind."""
    state: list[str] = dataclasses.field(default_factory=list)
    """Places that a call of the loss changed."""
    data_state: list[str] = dataclasses.field(default_factory=list)
    """Places of the dataset that reading a sample changed."""
    draws: list[str] = dataclasses.field(default_factory=list)
    """Generators from which the loss drew: "torch", "numpy", "random"."""
    buffers: list[str] = dataclasses.field(default_factory=list)
    """Buffers that the loss changed."""
    warnings: list[str] = dataclasses.field(default_factory=list)
    failure: dict[str, Any] | None = None
    """Kind, message, traceback, secondary, and whether it came after the last event that was asked for."""
    ended: bool = False
    """Whether the script came to its own end."""
    threads: int = 0
    gpus: int | None = None
    """How many there are; None: training is on the CPU."""
    startup_s: float = 0.0
    modules: list[str] = dataclasses.field(default_factory=list)
    """Library modules that the script imported."""

    def write(self, file: Path) -> None:
        """Whole or not at all."""
        part = file.with_suffix(".part")
        part.write_text(json.dumps(dataclasses.asdict(self)))
        part.replace(file)

    @classmethod
    def read(cls, file: Path) -> WorkerRecord | None:
        """None if the worker left none."""
        if not file.exists():
            return None
        values = json.loads(file.read_text())
        trainers = values.pop("trainers")
        return cls(
            **values,
            trainers=[TrainerRecord(**{**one, "steps": [StepRecord(**step) for step in one["steps"]]}) for one in trainers],
        )


def digest(tensor: Tensor) -> str:
    """Of a tensor's bytes, dtype and shape."""
    value = tensor.detach()
    if value.layout != torch.strided:
        value = value.to_dense()
    data = value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return f"{blake2b(data.data, digest_size=8).hexdigest()}:{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def digests(model: torch.nn.Module) -> Digests:
    """Of all parameters and buffers."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: digest(tensor) for name, tensor in named if not tensor.is_meta}


def data_digest(data: Any) -> str:
    """Of whatever a microbatch is made of."""
    hashed = blake2b(digest_size=8)
    _feed(hashed, data)
    return hashed.hexdigest()


def _feed(hashed: Any, data: Any) -> None:
    if isinstance(data, Tensor):
        hashed.update(digest(data).encode())
    elif isinstance(data, np.ndarray) and data.dtype != object:
        hashed.update(data.tobytes())
    elif isinstance(data, Mapping):
        for key, value in data.items():
            hashed.update(repr(key).encode())
            _feed(hashed, value)
    elif isinstance(data, (list, tuple)):
        hashed.update(b"(")
        for value in data:
            _feed(hashed, value)
    elif isinstance(data, (str, bytes, int, float, bool, type(None))):
        hashed.update(repr(data).encode())
    else:
        try:
            hashed.update(pickle.dumps(data))
        except Exception:
            hashed.update(type(data).__name__.encode())


def plain(value: Any) -> Any:
    """A setting as JSON can hold it."""
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value if isinstance(value, (bool, int, float, str, type(None))) else type(value).__name__


def groups(optimizer: Any) -> list[dict[str, Any]]:
    """The optimizer's settings, without parameters."""
    return [{key: plain(value) for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
