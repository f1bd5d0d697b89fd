"""Real runs under random stops end as if nothing had happened; ``tests/campaigns/stops.py`` makes as many as one likes."""

from __future__ import annotations

import os
import subprocess
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil
import pytest

from tests.campaigns.stops import MARKER, Campaign, Kind, Python, Started
from tests.launch.warm import warm_parent
from unisono.system.fork_server import Child, ForkServer, is_possible, wait_for_end


class Forked:
    """A child of a fork server, as `subprocess.Popen` with pipes for its output would show it."""

    def __init__(self, child: Child, stdout: int, stderr: int) -> None:
        self._child = child
        self.pid = child.pid
        self.stdout, self.stderr = (os.fdopen(stream) for stream in (stdout, stderr))
        self.poll, self.send_signal = child.poll, child.send_signal

    @property
    def returncode(self) -> int | None:
        return self._child.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.poll() is None:
            wait_for_end([self._child], 3600.0 if timeout is None else timeout)
        if (status := self.poll()) is None:
            raise subprocess.TimeoutExpired("unisono", timeout or 0.0)
        return status


class WarmPython(Python):
    """Starts commands without the seconds that imports take: these stops are to strike what comes after them."""

    def __init__(self, source: ForkServer) -> None:
        self._source = source

    def start(self, arguments: Sequence[str], environment: Mapping[str, str]) -> Started:
        pipes = [os.pipe(), os.pipe()]
        streams = {0: os.open(os.devnull, os.O_RDONLY), 1: pipes[0][1], 2: pipes[1][1]}
        spec = {"arguments": list(arguments), "folder": environment["TMPDIR"]}
        try:
            child = self._source.fork("tests.launch.warm:launch", spec, environment=environment, streams=streams)
        finally:
            for descriptor in streams.values():
                os.close(descriptor)
        return Forked(child, pipes[0][0], pipes[1][0])

    def workers(self, launcher: psutil.Process) -> list[psutil.Process]:
        return [worker for server in launcher.children() for worker in server.children()]


@pytest.mark.timeout(300)
def test_five_random_stops_of_every_kind_change_no_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not is_possible():
        report = Campaign(tmp_path, stops=5, seed=0).run()
    else:
        # What is forked shows the environment of its source.
        monkeypatch.setenv(MARKER, uuid.uuid4().hex)
        with warm_parent() as source:
            source.fork("gc:collect", 0, environment={}, streams={})  # when this has begun, the imports are done
            python = WarmPython(source)
            report = Campaign(tmp_path, stops=5, seed=0, python=python).run()
    assert report.problems == []
    assert set(report.stops) == set(Kind)
    assert str(report).startswith("5 stops (")
    assert str(report).endswith("all digests equal")
