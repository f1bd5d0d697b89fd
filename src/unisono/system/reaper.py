"""A tiny process beside a launcher: if the launcher is killed, it ends the workers and everything they started.

The launcher writes "+PID" for each worker that it starts and "-PID" for each that it has buried. The end of that stream
means that the launcher is gone, whatever killed it. A parent-death signal in each worker would not do: it spares the
workers' own children (loader workers), and a watching thread in the worker needs an interpreter that is not stuck.

This file imports nothing but the standard library and runs in an isolated interpreter: it starts in milliseconds.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable

_POLL_S = 0.02


def end_groups(groups: Iterable[int], *, grace_s: float) -> None:
    """Ends process groups: SIGTERM, then SIGKILL for what is left after `grace_s` seconds. *local*

    The grace is for Python's resource trackers: they ignore SIGTERM, and unlink the shared memory that a killed
    process left behind. A group that has ended already is no error.
    """
    leftovers = Leftovers(lambda group: None, grace_s=grace_s)
    for group in groups:
        leftovers.add(group)
    leftovers.end()
    while leftovers:
        time.sleep(_POLL_S)
        leftovers.end()


def end_processes(leaders: Iterable[int]) -> None:
    """Ends processes that each lead a group, with their groups: everything that they started. *local*

    They get SIGKILL at once, because they would take SIGTERM as a request for a checkpoint.
    """
    leaders = list(leaders)
    for pid in leaders:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    end_groups(leaders, grace_s=1.0)


class Leftovers:
    """Ends process groups as `end_groups` does, but without waiting: call `end` again until there are none. All *local*.

    Args:
        forget: Called with a group that has ended.
        grace_s: Time between SIGTERM and SIGKILL, in seconds.
    """

    def __init__(self, forget: Callable[[int], None], *, grace_s: float) -> None:
        self._forget = forget
        self._grace_s = grace_s
        self._deadlines_s: dict[int, float] = {}

    def __bool__(self) -> bool:
        return bool(self._deadlines_s)

    def add(self, group: int) -> None:
        """Begin to end a group. One that has ended already is no error."""
        _signal_group(group, signal.SIGTERM)
        self._deadlines_s[group] = time.monotonic() + self._grace_s

    def end(self) -> None:
        """Kill the groups whose grace is over, and forget those that have ended."""
        for group, deadline_s in list(self._deadlines_s.items()):
            overdue = time.monotonic() > deadline_s
            if overdue or not _signal_group(group, 0):
                if overdue:
                    _signal_group(group, signal.SIGKILL)
                del self._deadlines_s[group]
                self._forget(group)


def _signal_group(group: int, signum: int) -> bool:
    """Whether there still was a process to signal."""
    try:
        os.killpg(group, signum)
    except ProcessLookupError:
        return False
    except PermissionError:  # a process of it changed user: it is no longer ours to end
        return False
    return True


class Reaper:
    """The launcher's end. Used as a context; `add` and `remove` are *local*."""

    def __enter__(self) -> Reaper:
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()

    def add(self, pid: int) -> None:
        """From now on the process group that this process leads ends with the launcher."""
        self._tell(f"+{pid}\n")

    def remove(self, pid: int) -> None:
        """The group has ended, and its number may soon be another one's."""
        self._tell(f"-{pid}\n")

    def _tell(self, line: str) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(line.encode())
            self._process.stdin.flush()


def main() -> None:
    """Wait for the launcher's end, then end what it left behind."""
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)  # a stop of the whole service is the launcher's to handle
    groups: set[int] = set()
    for line in sys.stdin:
        pid = int(line[1:])
        groups.add(pid) if line[0] == "+" else groups.discard(pid)
    end_processes(groups)


if __name__ == "__main__":
    main()
