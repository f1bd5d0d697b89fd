"""Python programs that start at once: forked from a process that has imported PyTorch already (`warm_commands`)."""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unisono.system.fork_server import BLOCKED_SIGNALS, Child, ForkServer, wait_for_end


class Forked:
    """A child of a fork server, as `subprocess.Popen` with pipes for its output would show it.

    Args:
        source: From where it is forked.
        function: What it does, as "module:function".
        spec: The function's argument, of what JSON can say.
        environment: All its variables.
        together: Whether what it says on standard error comes with its output.
    """

    def __init__(
        self,
        source: ForkServer,
        function: str,
        spec: Mapping[str, Any],
        environment: Mapping[str, str],
        *,
        together: bool = False,
    ) -> None:
        readers, streams = {}, {0: os.open(os.devnull, os.O_RDONLY)}
        readers[1], streams[1] = os.pipe()
        if together:
            streams[2] = os.dup(streams[1])
        else:
            readers[2], streams[2] = os.pipe()
        try:
            self._child: Child = source.start(function, spec, environment=environment, streams=streams, fresh=None)
        finally:
            for descriptor in streams.values():
                os.close(descriptor)
        self.pid = self._child.pid
        self.stdout, self.stderr = os.fdopen(readers[1]), os.fdopen(readers[2]) if 2 in readers else None
        self.poll, self.send_signal = self._child.poll, self._child.send_signal

    @property
    def returncode(self) -> int | None:
        return self._child.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.poll() is None:
            wait_for_end([self._child], 3600.0 if timeout is None else timeout)
        if (status := self.poll()) is None:
            raise subprocess.TimeoutExpired("a forked program", timeout or 0.0)
        return status

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Its output, and what it said on standard error beside it: little."""
        said = []
        for stream in filter(None, (self.stdout, self.stderr)):
            with stream:
                said.append(stream.read())
        self.wait(timeout)
        return said[0], "".join(said[1:])


def start_script(
    source: ForkServer | None,
    script: Path,
    *arguments: str,
    folder: Path,
    environment: Mapping[str, str] | None = None,
    together: bool = True,
) -> Any:
    """Starts a script as `python SCRIPT ARGUMENTS…` would, in this folder; forked if there is a source.

    Args:
        source: From where it is forked; None: it is a new interpreter.
        script, arguments: What is started.
        folder: Where.
        environment: All its variables; None: those of this process.
        together: Whether what it says on standard error comes with its output.
    """
    environment = {**os.environ} if environment is None else environment
    if source is not None:
        spec = {"command": [str(script), *arguments], "folder": str(folder)}
        return Forked(source, "tests.forked:run_script", spec, environment, together=together)
    command = [sys.executable, str(script), *arguments]
    return subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT if together else subprocess.PIPE,
        text=True,
    )


def run_script(spec: Mapping[str, Any]) -> None:
    """In the forked process: is the script."""
    tempfile.tempdir = None  # found again where it is asked for: TMPDIR is another now
    signal.pthread_sigmask(signal.SIG_UNBLOCK, BLOCKED_SIGNALS)
    os.chdir(spec["folder"])
    command: Sequence[str] = spec["command"]
    sys.argv[:] = command
    sys.path.insert(0, str(Path(command[0]).parent))
    runpy.run_path(command[0], run_name="__main__")
