"""The moments at which sweeps let workers die: each of them under ``make thorough``, a few of them in the suite."""

from __future__ import annotations

import os

THOROUGH = os.environ.get("UNISONO_THOROUGH") == "1"


def moments(first: int, end: int, *, every: int) -> range:
    """From ``first`` up to, but not including, ``end``; in the suite only one of ``every`` so many."""
    return range(first, end, 1 if THOROUGH else every)
