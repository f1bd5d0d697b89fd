"""Real runs under random stops end as if nothing had happened; ``tests/campaigns/stops.py`` makes as many as one likes."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil
import pytest

from tests.campaigns.stops import MARKER, Campaign, Kind, Python, Started
from tests.forked import Forked
from tests.launch.warm import warm_parent
from unisono.system.fork_server import ForkServer, is_possible


class WarmPython(Python):
    """Starts commands without the seconds that imports take: these stops are to strike what comes after them."""

    def __init__(self, source: ForkServer) -> None:
        self._source = source

    def start(self, arguments: Sequence[str], environment: Mapping[str, str]) -> Started:
        spec = {"arguments": list(arguments), "folder": environment["TMPDIR"], "apart": False, "terminal": False}
        return Forked(self._source, "tests.launch.warm:launch", spec, environment)

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
            source.start("gc:collect", 0, environment={}, streams={})  # when this has begun, the imports are done
            python = WarmPython(source)
            report = Campaign(tmp_path, stops=5, seed=0, python=python).run()
    assert report.problems == []
    assert set(report.stops) == set(Kind)
    assert str(report).startswith("5 stops (")
    assert str(report).endswith("all digests equal")
