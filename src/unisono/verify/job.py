"""What one run of the script is: how many workers, which trainer, and what is changed compared with the script as it is."""

from __future__ import annotations

import dataclasses
import enum
from pathlib import Path
from typing import Any


class Change(enum.StrEnum):
    """One thing that an experiment changes. If a difference goes away with it, it has to do with the cause."""

    HIDE_RANK = "hide_rank"
    """The script sees rank 0 of 1 worker, wherever it looks."""
    IGNORE_SEEDS = "ignore_seeds"
    """The script's own seeding does nothing once there is a trainer."""
    CONSTANT_DRAWS = "constant_draws"
    """PyTorch's random draws in the loss are constants: dropout keeps everything."""
    CONSTANT_PYTHON_DRAWS = "constant_python_draws"
    """`random` and `numpy.random` start each call of the loss from the same state."""
    FRESH_DATA = "fresh_data"
    """Each sample is read from the dataset as it was at the beginning."""
    NO_LOADER_WORKERS = "no_loader_workers"
    """`Loader(num_workers=0)`."""
    RESTORE_STATE = "restore_state"
    """Whatever a call of the loss changed in attributes and global variables is undone after it."""
    FREEZE_BUFFERS = "freeze_buffers"
    """Whatever a call of the loss changed in buffers is undone after it."""
    FREEZE_NORM = "freeze_norm"
    """Batch normalisation uses its running statistics, as in evaluation."""
    NO_CALLBACKS = "no_callbacks"
    """The trainer has no callbacks."""
    HOLD_SETTINGS = "hold_settings"
    """The optimizer's settings are those of one worker."""
    HOLD_THREADS = "hold_threads"
    """The script cannot change the number of threads."""
    DETERMINISTIC = "deterministic"
    """PyTorch's deterministic kernels, whatever the script says."""
    STOP_TIME = "stop_time"
    """The script sees clocks that begin at the same time in each run."""
    FIX_ENTROPY = "fix_entropy"
    """What the script draws from the operating system (and its process number) is the same in each run."""
    SAME_HASH = "same_hash"
    """All workers are forks of one process: strings hash alike, and objects lie at the same addresses."""
    USER_SCHEDULES = "user_schedules"
    """The reference steps the scheduler whenever the script does."""


class Variant(enum.StrEnum):
    """How the reference computes."""

    PLAIN = "plain"
    """Whole batches, as the script says."""
    DOUBLE = "double"
    """In float64."""
    REVERSED = "reversed"
    """The samples of each batch the other way round: the same sums in another order."""
    PARTS = "parts"
    """Microbatch by microbatch, gradients accumulated as PyTorch does it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """One run."""

    workers: int = 1
    reference: Variant | None = None
    """None: the trainer. Else the plain loop instead of it (on one worker)."""
    changes: frozenset[Change] = frozenset()
    second: bool = False
    """Whether the first worker, too, is one that hashes differently, and sees a later clock."""
    events: int | None = None
    """End after so many steps and evaluations; None: go on to the script's own end."""
    dump: tuple[int, int] | None = None
    """Trainer number and step whose tensors are kept."""
    threads: int = 1
    environment: tuple[tuple[str, str], ...] = ()
    """Variables that must be set before PyTorch is imported."""
    keep: bool = False
    """Whether the tensors after each step are kept."""
    teacher: Job | None = None
    """The run whose weights and optimizer state the reference starts each step from, so that errors do not add up."""
    repeat: int = 0
    """Number of a repetition of what is otherwise the same job."""

    def plain(self, variant: Variant, **fields: Any) -> Job:
        """The reference under the same changes, step by step from where this job has come."""
        return dataclasses.replace(self, reference=variant, keep=True, teacher=self, **fields)

    def but(self, *changes: Change, **fields: Any) -> Job:
        """This job with more changes."""
        return dataclasses.replace(self, changes=self.changes | set(changes), **fields)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunSpec:
    """What all workers of a run are told."""

    job: Job
    script: str
    args: list[str]
    steps: int
    """Optimizer steps to look at."""
    scratch: Path
    """Files below are ours."""
    folder: Path
    """Where this run's own files go."""
    teacher: Path | None
    """The folder of the job's teacher."""
    held: list[list[dict[str, Any]]]
    """For each trainer, the settings that the optimizer had on one worker."""
