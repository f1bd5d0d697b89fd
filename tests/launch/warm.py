"""`unisono` commands that start at once: forked, with their fork servers, from a process that has done their imports already.

A launcher and its fork server each spend seconds on importing PyTorch, which is most of what a test of them would take. All else
is as it is on a desk: the launcher is a process that leads a session, with variables, folder and streams of its own; its
fork server is its child, knows what it has been told, and is asked for workers in the same words.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import select
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from unisono.launch import runner
from unisono.system import fork_server, parent
from unisono.system.fork_server import ForkServer
from unisono.system.messages import receive, send
from unisono.system.reaper import Reaper

COMMAND = ("-m", "unisono.launch")
_IMPORTS = ("unisono.launch.cli", "unisono.launch.rendezvous", "unisono.launch.supervisor", "tests.launch.warm")
_ROOT = Path(__file__).parents[2]


@contextlib.contextmanager
def warm_parent(*more: str) -> Iterator[ForkServer]:
    """The process from which commands are forked; for one test at a time.

    Args:
        more: Further modules that it imports.
    """
    path = os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    preload = [*runner._PRELOADED, *_IMPORTS, *more]
    with Reaper() as reaper, ForkServer(environment=environment, preload=preload, reaper=reaper) as made:
        yield made


# ---- in the test ----


class WarmCommand:
    """A forked command, as `subprocess.Popen` with pipes for its output would show it.

    Args:
        apart: Whether it has a namespace of users for itself, as on a machine of its own.
        terminal: A terminal to which it belongs, instead of the pipes.
    """

    def __init__(
        self,
        source: ForkServer,
        arguments: Sequence[str],
        folder: Path,
        environment: Mapping[str, str],
        *,
        apart: bool = False,
        terminal: int | None = None,
    ) -> None:
        self._said = {1: b"", 2: b""}
        pipes = {stream: os.pipe() for stream in self._said} if terminal is None else {}
        self._unread = {reader: stream for stream, (reader, _) in pipes.items()}
        nothing = os.open(os.devnull, os.O_RDONLY) if terminal is None else os.dup(terminal)
        streams = {0: nothing, **{stream: writer for stream, (_, writer) in pipes.items()}}
        if terminal is not None:
            streams |= {1: os.dup(terminal), 2: os.dup(terminal)}
        try:
            self._child = source.start(
                "tests.launch.warm:launch",
                {"arguments": list(arguments), "folder": str(folder), "apart": apart, "terminal": terminal is not None},
                environment=environment,
                streams=streams,
                fresh=None,
            )
        finally:
            for descriptor in streams.values():
                os.close(descriptor)
        self.pid = self._child.pid

    @property
    def returncode(self) -> int | None:
        return self._child.returncode

    def poll(self) -> int | None:
        return self._child.poll()

    def send_signal(self, signum: signal.Signals) -> None:
        self._child.send_signal(signum)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def hang_up(self) -> str:
        """The first line that it prints; then nobody reads any more."""
        reader = next(reader for reader, stream in self._unread.items() if stream == 1)
        while b"\n" not in self._said[1] and (text := os.read(reader, 1)):
            self._said[1] += text
        os.close(reader)
        del self._unread[reader]
        return self._said[1].decode()

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """All that was said, when nobody is left who could say more."""
        deadline_s = float("inf") if timeout is None else time.monotonic() + timeout
        with selectors.DefaultSelector() as ready:
            for reader in self._unread:
                ready.register(reader, selectors.EVENT_READ)
            while self._unread:
                if time.monotonic() > deadline_s:
                    raise subprocess.TimeoutExpired("unisono", timeout or 0.0, self._said[1], self._said[2])
                for key, _ in ready.select(0.1):
                    if text := os.read(key.fd, 1 << 16):
                        self._said[self._unread[key.fd]] += text
                    else:
                        ready.unregister(key.fd)
                        del self._unread[key.fd]
                        os.close(key.fd)
        while self.poll() is None:
            if time.monotonic() > deadline_s:
                raise subprocess.TimeoutExpired("unisono", timeout or 0.0)
            time.sleep(0.005)
        return self._said[1].decode(), self._said[2].decode()


# ---- in the forked process ----


def launch(spec: Mapping[str, Any]) -> None:
    """Is the command, or (in another process) the fork server that the command will ask for."""
    tempfile.tempdir = None  # found again where it is asked for: TMPDIR is another now
    if spec["apart"]:
        _unshare_users()
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if not pid:
        ours.close()
        os.chdir(spec["folder"])
        _wait_to_be_the_server(theirs)
        return
    theirs.close()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, fork_server.BLOCKED_SIGNALS)
    if spec["terminal"]:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    os.chdir(spec["folder"])
    sys.argv[:] = ["unisono", *spec["arguments"]]
    fork_server.subprocess = _Starting(_Waiting(pid, ours))  # type: ignore[assignment]
    from unisono.launch.cli import main

    main()


def _unshare_users() -> None:
    """As `unshare --user --map-current-user`; os.unshare is younger than Python 3.11."""
    ids = {"uid_map": os.getuid(), "gid_map": os.getgid()}
    if ctypes.CDLL(None, use_errno=True).unshare(0x10000000):  # CLONE_NEWUSER
        raise OSError(ctypes.get_errno(), "no namespace of users")
    Path("/proc/self/setgroups").write_text("deny")
    for name, number in ids.items():
        (Path("/proc/self") / name).write_text(f"{number} {number} 1")


def _wait_to_be_the_server(channel: socket.socket) -> None:
    received = receive(channel)
    channel.close()
    if received is None:
        os._exit(0)  # the command has ended without one
    told, descriptors = received
    os.setsid()
    os.environ.clear()
    os.environ.update(told["environment"])
    os.dup2(descriptors[0], 0)
    os.close(descriptors[0])
    parent.main()


class _Starting:
    """The module `subprocess`, for the process of a fork server."""

    DEVNULL = subprocess.DEVNULL
    TimeoutExpired = subprocess.TimeoutExpired

    def __init__(self, process: _Waiting) -> None:
        self._process = process

    def Popen(self, command: Sequence[str], *, env: Mapping[str, str], stdin: int | None, **others: Any) -> Any:
        if "unisono.system.parent" not in command:  # a worker that it has refused to fork
            return subprocess.Popen(command, env=env, stdin=stdin, **others)
        self._process.begin(env, stdin)
        return self._process


class _Waiting:
    """A process that has waited to be the fork server, as `subprocess.Popen` would show it."""

    def __init__(self, pid: int, channel: socket.socket) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._channel = channel
        self._ended = os.pidfd_open(pid)

    def begin(self, environment: Mapping[str, str], stdin: int) -> None:
        with contextlib.suppress(OSError), self._channel:  # it is gone, as the first order for a worker will find
            send(self._channel, {"environment": dict(environment)}, [stdin])

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._ended, signal.SIGKILL)

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            ready, _, _ = select.select([self._ended], [], [], timeout)
            if not ready:
                raise subprocess.TimeoutExpired("fork server", timeout or 0.0)
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.returncode
