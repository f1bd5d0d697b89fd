"""What was written to memory:// in tests."""

from __future__ import annotations

import sys


def empty_memory() -> None:
    """fsspec keeps it for ever, and looks through all of it at each access: a sweep of many runs gets slower with each."""
    if (memory := sys.modules.get("fsspec.implementations.memory")) is not None:
        memory.MemoryFileSystem.store.clear()
        memory.MemoryFileSystem.pseudo_dirs[:] = [""]
