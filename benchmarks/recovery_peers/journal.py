"""What the workers of every system write down, so that one who stands outside sees which steps are done, by whom, with what.

Imports no torch: the first line is written before that takes its seconds.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What is trained; the same for every system."""

    folder: str
    """Of this run: the journal, the final weights, and what a system needs for itself."""
    workers: int
    steps: int
    batch_size: int

    @property
    def samples(self) -> int:
        """One epoch: each sample is to be used exactly once."""
        return self.steps * self.batch_size

    @property
    def final(self) -> Path:
        """Weights after the last step."""
        return Path(self.folder) / "final.safetensors"

    def write(self) -> Path:
        path = Path(self.folder) / "job.json"
        path.write_text(json.dumps(dataclasses.asdict(self)))
        return path

    @classmethod
    def read(cls, path: str) -> Job:
        return cls(**json.loads(Path(path).read_text()))


class Journal:
    """One file for all workers; a line a call, whole and in the order of time, as the kernel appends.

    Kinds of lines: ``start`` (a process begins), ``compute`` (samples whose gradients this worker gives to an attempt at a step,
    before it can be committed), ``applied`` (the optimizer has stepped), ``commit`` (the step will survive), ``dropped`` (an
    attempt was given up, its samples with it).
    """

    def __init__(self, job: Job) -> None:
        self._file = os.open(Path(job.folder) / "journal", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def write(self, kind: str, **fields: Any) -> None:
        line = json.dumps({"t": time.time(), "kind": kind, "pid": os.getpid(), **fields}, separators=(",", ":"))
        os.write(self._file, f"{line}\n".encode())
