"""Stopping on request: Ctrl-C, SIGTERM and the like are remembered, and acted on where the work can be saved."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
"""What asks a run to stop."""

STOP_CODES = frozenset(128 + signum for signum in STOP_SIGNALS)
"""Exit statuses of a worker that stopped because a signal asked it to."""

RESTART = 79
"""Exit status of a worker that cannot go on without what another one held: all have to start again, from the last checkpoint."""

_SIGNALS = (*STOP_SIGNALS, signal.SIGHUP)
_WARNINGS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)
"""What clusters send before time is up. They end a process that has no use of its own for them."""


def _taken() -> int:
    """The signals that this process handles, or ignores, as bits: Python does not know of handlers written in C."""
    status = Path("/proc/self/status").read_text(errors="replace")
    masks = dict(line.split(":", 1) for line in status.splitlines() if line.startswith(("SigCgt:", "SigIgn:")))
    return int(masks["SigCgt"], 16) | int(masks["SigIgn"], 16)


class StopRequest:
    """Within this context SIGINT, SIGTERM and SIGHUP only leave a note. *local*

    Whoever owns the loop asks `requested` between two steps, saves, and raises `SystemExit(128 + signum)`.

    - The first signal is recorded. Signals within `same_event_s` of it are the same event: a terminal sends SIGINT to
      every process of its foreground group, and a launcher passes the same stop on to its workers once more.
    - A SIGINT after that raises KeyboardInterrupt at once, so a person can always get out. Any later one of the others
      changes nothing: the stop is already under way.
    - SIGUSR1, SIGUSR2 and SIGXCPU count as SIGTERM where they would end the process.
    - SIGHUP, which a terminal sends as it is closed, counts as SIGTERM: no second Ctrl-C can follow. Where it was
      ignored (``nohup``) it stays so.
    - Processes forked within the context (loader workers) inherit the handlers but have nothing to save: there SIGINT
      and SIGHUP, which a terminal sends to them too, are ignored, because their parent still needs them for its last
      step, and SIGTERM ends the process quietly.
    - Python runs handlers in the main thread only; entered in another thread, the context does nothing.

    On exit the previous handlers are back.
    """

    def __init__(self, *, same_event_s: float = 2.0) -> None:
        self.requested: signal.Signals | None = None
        """The signal that asked to stop, SIGINT or SIGTERM; or None."""
        self._same_event_s = same_event_s
        self._first_s = 0.0
        self._pid = 0
        self._previous: dict[signal.Signals, Callable[[int, FrameType | None], Any] | int | None] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._pid = os.getpid()
            taken = _taken()
            for signum in (*_SIGNALS, *(signum for signum in _WARNINGS if not taken >> signum - 1 & 1)):
                if signum == signal.SIGHUP and signal.getsignal(signum) == signal.SIG_IGN:
                    continue
                self._previous[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        for signum, previous in self._previous.items():
            # None stands for a handler that was not installed from Python and cannot be put back by it.
            signal.signal(signum, signal.SIG_DFL if previous is None else previous)
        self._previous.clear()

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            if signum == signal.SIGTERM:
                os._exit(128 + signum)
            return
        now_s = time.monotonic()
        if self.requested is None:
            self.requested = signal.SIGINT if signum == signal.SIGINT else signal.SIGTERM
            self._first_s = now_s
        elif signum == signal.SIGINT and now_s - self._first_s > self._same_event_s:
            raise KeyboardInterrupt
