"""Identities of processes, which hold even if the system uses a process number again. Everything here is *local*."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import os
import signal
import sys
import time
from pathlib import Path


@dataclasses.dataclass(frozen=True, kw_only=True)
class Process:
    """The identity of a process."""

    place: str
    """The machine since its last start, and the process namespace: where ``pid`` means this process; "" if that is not known."""
    pid: int
    started: int
    """When, in clock ticks since the machine's start: tells it from a later process of the same number."""

    @classmethod
    def this(cls) -> Process:
        """The calling process."""
        with contextlib.suppress(OSError):
            boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
            return cls(place=f"{boot} {Path('/proc/self/ns/pid').readlink()}", pid=os.getpid(), started=state_of(os.getpid())[1])
        return cls(place="", pid=os.getpid(), started=0)

    @property
    def is_dead(self) -> bool:
        """Whether it has ended, as far as can be told from here."""
        if not self.place or self.place != _here().place:
            return False
        try:
            state, started = state_of(self.pid)
        except OSError:
            return True
        return started != self.started or state in "ZX"

    @property
    def lives_here(self) -> bool:
        """Whether it surely runs, on this machine."""
        return bool(self.place) and self.place == _here().place and not self.is_dead

    def kill(self, *, patience_s: float = 5.0) -> bool:
        """Ends it for good, whatever state it is in; whether it is gone. A stopped process, too, dies of this."""
        if not self.place or self.place != _here().place:
            return False
        until = time.monotonic() + patience_s
        try:
            descriptor = os.pidfd_open(self.pid)  # from here on the number means one process
        except OSError:
            return self.is_dead
        try:
            with contextlib.suppress(OSError):
                if not self.is_dead:
                    signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        finally:
            os.close(descriptor)
        while not self.is_dead and time.monotonic() < until:
            time.sleep(0.001)
        return self.is_dead


def state_of(pid: int) -> tuple[str, int]:
    """State of a process, a letter, and when it was started.

    Raises:
        OSError: There is none.
    """
    # Its name, in parentheses, may hold anything.
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return fields[0], int(fields[19])


def ending(status: int, *, hint: bool = True) -> str:
    """How a process ended, in words that go on a sentence.

    Args:
        status: Its exit status, -N if signal N killed it.
        hint: Whether to say what SIGKILL may come from.
    """
    if status >= 0:
        return f"ended with exit status {status}"
    try:
        name = signal.Signals(-status).name
    except ValueError:  # real-time signals have no name
        name = f"signal {-status}"
    why = ": by someone, or by the kernel because memory ran out (see dmesg; then use fewer workers)"
    return f"was killed by {name}{why if hint and -status == signal.SIGKILL else ''}"


def run_exit_functions() -> None:
    """What the interpreter does at its end, but for taking itself apart; call `os._exit` afterwards.

    To take PyTorch apart takes a second. And a script that failed has left its process group open, with threads that talk to
    workers which may be gone: Python would wait for some of them without end, and C++ aborts over others, with words that bury
    the report.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()


_known: dict[int, Process] = {}


def _here() -> Process:
    pid = os.getpid()
    if pid not in _known:
        _known.clear()
        _known[pid] = Process.this()
    return _known[pid]
