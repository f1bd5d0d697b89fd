"""Runs the real command on small scripts, which tell the test what happens through a named pipe."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.launch.warm import COMMAND, WarmCommand
from unisono.system.fork_server import ForkServer

LIMIT_S = 120.0

PRELUDE = """
import os, signal, sys
rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])

def tell(*words):
    with open(os.environ["TELL"], "w") as pipe:
        pipe.write(" ".join(map(str, words)) + "\\n")

def gloo():
    import torch.distributed as dist
    dist.init_process_group("gloo")
    return dist
"""


ON_A_TERMINAL = """
import fcntl, os, signal, sys, termios
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.executable, sys.argv[1:])
"""


class Launch:
    """A running command, its words, and its end.

    Args:
        command: Its command line.
        folder: Empty; here it begins.
        source: From what it is forked; None: it is a new interpreter.
        apart: Whether it has a namespace of users for itself, as on a machine of its own.
        terminal: A terminal to which it belongs; None: its output is read through pipes.
    """

    def __init__(
        self, command: list[str], folder: Path, source: ForkServer | None, *, apart: bool = False, terminal: int | None = None
    ) -> None:
        pipe = folder / "tell"
        os.mkfifo(pipe)
        self._heard = os.open(pipe, os.O_RDWR | os.O_NONBLOCK)
        self._text = b""
        self.known: list[psutil.Process] = []
        # Not in the test's folder: with its long path, that of a socket of Python's loader processes would be too long.
        self.temporary = Path(tempfile.mkdtemp(prefix="unisono-launch-"))
        env = {**os.environ, "TELL": str(pipe), "TMPDIR": str(self.temporary)}
        for name in ("RANK", "WORLD_SIZE", "OMP_NUM_THREADS"):
            env.pop(name, None)
        self.process: subprocess.Popen[str] | WarmCommand
        if source is not None:
            arguments = command[1 + len(COMMAND) :]
            self.process = WarmCommand(source, arguments, folder, env, apart=apart, terminal=terminal)
            return
        if apart:
            command = ["unshare", "--user", "--map-current-user", *command]
        if terminal is not None:
            command = [sys.executable, "-c", ON_A_TERMINAL, *command]
        self.process = subprocess.Popen(
            command,
            cwd=folder,
            env=env,
            stdin=subprocess.DEVNULL if terminal is None else terminal,
            stdout=subprocess.PIPE if terminal is None else terminal,
            stderr=subprocess.PIPE if terminal is None else terminal,
            text=True,
            start_new_session=True,
        )

    def hear(self) -> list[str]:
        """The next line that a script told."""
        deadline_s = time.monotonic() + LIMIT_S
        while b"\n" not in self._text:
            ended = self.process.poll() is not None
            ready, _, _ = select.select([self._heard], [], [], 0.0 if ended else 0.1)
            if ready:
                self._text += os.read(self._heard, 4096)
            elif ended or time.monotonic() > deadline_s:
                raise AssertionError(f"nothing more heard: {self.finish() if ended else 'it still runs'}")
        line, _, self._text = self._text.partition(b"\n")
        return line.decode().split()

    def hear_all(self, count: int) -> set[tuple[str, ...]]:
        """The next lines, in any order."""
        return {tuple(self.hear()) for _ in range(count)}

    def hear_processes(self, count: int) -> list[psutil.Process]:
        """The processes whose numbers stand in the next lines."""
        processes = [psutil.Process(int(self.hear()[-1])) for _ in range(count)]
        self.known += processes
        return processes

    def know(self, pids: Iterable[int]) -> None:
        """Processes that must not outlive the test."""
        for pid in pids:
            with contextlib.suppress(psutil.NoSuchProcess):
                self.known.append(psutil.Process(pid))

    def signal_group(self, signum: signal.Signals) -> None:
        """As a terminal does."""
        os.killpg(self.process.pid, signum)

    def hang_up(self) -> str:
        """The first line on its standard output, which nobody reads any further: like `| head -n 1`."""
        if isinstance(self.process, WarmCommand):
            return self.process.hang_up()
        assert self.process.stdout is not None
        with self.process.stdout as out:
            return out.readline()

    def finish(self, limit_s: float = LIMIT_S) -> tuple[int, str, str]:
        """Exit status, stdout and stderr."""
        out, err = self.process.communicate(timeout=limit_s)
        return self.process.returncode, out, err

    def close(self) -> None:
        if self.process.poll() is None:
            self.known += psutil.Process(self.process.pid).children(recursive=True)
        self.process.kill()
        for process in self.known:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.communicate()
        os.close(self._heard)
        shutil.rmtree(self.temporary)


class Launcher:
    """Starts commands on scripts written for the occasion.

    Args:
        folder: Where scripts and output go.
        source: From what `unisono` commands with one thread a worker are forked; None: each is a new interpreter.
    """

    def __init__(self, folder: Path, source: ForkServer | None = None) -> None:
        self.folder = folder
        self._source = source
        self._launches: list[Launch] = []

    def write(self, script: str, name: str = "script.py") -> Path:
        path = self.folder / name
        path.write_text(PRELUDE + textwrap.dedent(script))
        return path

    def command(
        self, *command: str, through: Callable[[list[str]], list[str]] = list, apart: bool = False, terminal: int | None = None
    ) -> Launch:
        """Starts Python on a command line; `through` puts another command before it. See `Launch`."""
        folder = self.folder / str(len(self._launches))
        folder.mkdir()
        line = [sys.executable, *command]
        warm = command[: len(COMMAND)] == COMMAND and "--threads" not in command and through(line) == line
        launch = Launch(through(line), folder, self._source if warm else None, apart=apart, terminal=terminal)
        self._launches.append(launch)
        return launch

    def run(self, script: str, *args: str, workers: int = 2, options: tuple[str, ...] = ()) -> Launch:
        path = str(self.write(script))
        return self.command("-m", "unisono.launch", "run", "--workers", str(workers), *options, path, *args)

    def close(self) -> None:
        for launch in self._launches:
            launch.close()


@pytest.fixture
def launcher(tmp_path: Path, warm_commands: ForkServer | None) -> Iterator[Launcher]:
    with contextlib.closing(Launcher(tmp_path, warm_commands)) as launcher:
        yield launcher


def assert_gone(processes: list[psutil.Process], limit_s: float = 5.0) -> None:
    _, left = psutil.wait_procs(processes, timeout=limit_s)
    assert not [process for process in left if _runs(process)]


def _runs(process: psutil.Process) -> bool:
    """A zombie has ended; when it is buried is up to its new parent, the system's first process."""
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
