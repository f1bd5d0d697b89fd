"""Log files of workers without a terminal: kept short, since a run may last for weeks. *Local*."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable
from pathlib import Path

MOST_BYTES = 256 << 20
KEPT_BYTES = 32 << 20
_EVERY_S = 10.0


class Logs:
    """Cuts logs that have grown too long. Their writers append, so that each goes on at what is the end then.

    Args:
        every_s: How often to look, in seconds.
    """

    def __init__(self, *, every_s: float = _EVERY_S) -> None:
        self._every_s = every_s
        self._looked_s = time.monotonic()

    def shorten(self, logs: Iterable[Path]) -> None:
        """Where one is longer than `MOST_BYTES`, drop all but the last `KEPT_BYTES`, if it is time to look."""
        if time.monotonic() - self._looked_s < self._every_s:
            return
        self._looked_s = time.monotonic()
        for log in logs:
            with contextlib.suppress(OSError):
                if log.stat().st_size > MOST_BYTES:
                    _cut(log)


def _cut(log: Path) -> None:
    with log.open("rb") as file:
        file.seek(-KEPT_BYTES, os.SEEK_END)
        last = file.read().partition(b"\n")[2]
    os.truncate(log, 0)  # what the worker prints from now on may come before the rest
    with log.open("ab") as file:
        file.write(b"[unisono: what the worker said before was dropped: the file had grown too long]\n" + last)
