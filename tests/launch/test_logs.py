"""Logs of workers are cut when they have grown long."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.launch.test_processes import Workers
from unisono.launch import logs
from unisono.system.fork_server import is_possible

pytestmark = pytest.mark.skipif(not is_possible(), reason="no fork server on this system")


def test_a_worker_that_talks_for_weeks_does_not_fill_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "MOST_BYTES", 100_000)
    monkeypatch.setattr(logs, "KEPT_BYTES", 10_000)
    with Workers(tmp_path, preload=("unisono.launch.worker",)) as workers:
        workers.processes._logs = logs.Logs(every_s=0.0)
        code = """
            import signal
            for number in range(5000):
                print(number, 200 * "x", flush=True)
                signal.sigtimedwait([], 1e-4)
            """
        assert workers.run(code) == 0
    lines = (tmp_path / "worker-1.log").read_text().splitlines()
    assert any("was dropped" in line for line in lines[:500])
    assert f"4999 {200 * 'x'}" in lines[-500:]
    assert (tmp_path / "worker-1.log").stat().st_size < 500_000
