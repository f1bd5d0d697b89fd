"""What steps are computed by."""

from __future__ import annotations

import dataclasses
from typing import Literal

from unisono.guard.replicas import OnDesync

OnNonfinite = Literal["error", "skip"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What steps are computed by, the same on all workers and for the whole run."""

    batch_size: int
    """Samples of a global batch."""
    microbatches: int
    """M."""
    seed: int
    max_grad_norm: float | None
    on_nonfinite: OnNonfinite
    on_desync: OnDesync
    compare_every: int | None
    timeout_s: float
