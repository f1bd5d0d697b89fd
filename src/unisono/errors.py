"""Every error that unisono raises, in one tree.

::

    UnisonoError
    ├── ConfigurationError   settings, model, optimizer or script that cannot work (also a ValueError)
    ├── WorkerFailure        a worker died or lost contact: rank, host, step, original traceback
    ├── Desync               replicas differ: step, tensor, ranks
    ├── DataError            a sample or batch cannot be used: sample index
    ├── CheckpointError      a file of the run directory is damaged, missing or cannot be written
    └── FingerprintMismatch  script, machine or build differ from those of the checkpoint, or of the run to join

Each message says what happened, with values; then what to do.
"""

from __future__ import annotations

from collections.abc import Sequence


class UnisonoError(Exception):
    """Base class of all errors raised by unisono."""


class ConfigurationError(UnisonoError, ValueError):
    """Settings, model, optimizer, loss or launch that cannot work as given."""


class WorkerFailure(UnisonoError):
    """A worker failed, or contact with it was lost.

    Args:
        message: What happened and what to do.
        rank: Rank of the worker that failed, if known.
        host: Host on which it ran, if known.
        step: Optimizer step in which it failed, if known.
        traceback: The original traceback as text, if known. It is shown once, by whoever reports the failure.

    Attributes:
        gives_up: Whether the workers end the run by it; else it only tells of something that has struck another one.
    """

    gives_up = False

    def __init__(
        self,
        message: str,
        *,
        rank: int | None = None,
        host: str | None = None,
        step: int | None = None,
        traceback: str | None = None,
    ) -> None:
        super().__init__(message)
        self.rank = rank
        self.host = host
        self.step = step
        self.traceback = traceback


class Desync(UnisonoError):
    """Replicas that must be equal are not."""

    def __init__(self, message: str, *, step: int | None = None, tensor: str | None = None, ranks: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.step = step
        self.tensor = tensor
        self.ranks = tuple(ranks)


class DataError(UnisonoError):
    """A sample or a batch could not be loaded or used."""

    def __init__(self, message: str, *, index: int | None = None) -> None:
        super().__init__(message)
        self.index = index


class CheckpointError(UnisonoError):
    """A checkpoint or run directory is damaged, incomplete or cannot be written."""

    def __init__(self, message: str, *, file: str | None = None) -> None:
        super().__init__(message)
        self.file = file


class FingerprintMismatch(UnisonoError):
    """What the run depends on (builds, threads, device type, ...) is not what it was; or a worker does not belong to the run
    that it wants to join."""

    def __init__(self, message: str, *, fields: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.fields = tuple(fields)
