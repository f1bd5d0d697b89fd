"""The benchmarks run, and what they write is what they measured."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import report

    return report


def test_a_quick_run_measures_two_peers_and_the_limit_and_writes_what_it_measured(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    command = [sys.executable, BENCHMARKS / "one_machine.py", "--quick", "--save", "quick", "--into", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr

    raw = json.loads((tmp_path / "quick.json").read_text())
    case = raw["cases"]["tiny"]
    peers = ["DDP", "unisono, M = 2"]
    assert list(case["seconds"]) == list(case["memory"]) == list(case["losses"]) == peers
    for seconds in [*case["seconds"].values(), case["compute"], case["moving"]]:
        assert len(seconds) == raw["rounds"] == 2
        assert min(seconds) > 0
    assert all(memory["pss"] > 2**20 for memory in case["memory"].values())
    assert case["left_out"] == {}

    written = (tmp_path / "quick.md").read_text()
    for peer in peers:
        row = next(line for line in written.splitlines() if line.startswith(f"| {peer} |"))
        assert f"| {1e3 * statistics.median(case['seconds'][peer]):.2f} (" in row
    assert (tmp_path / "quick.png").stat().st_size > 1000


def test_whole_epochs_are_timed_under_each_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import end_to_end

    for peer in (end_to_end.DDP, end_to_end.PLAIN, end_to_end.EIGHT):  # launch() checks workers and epochs
        step_s, loss = end_to_end.launch(peer, "tiny", 2)
        assert 0 < step_s < 5
        assert 2 < loss < 2.7  # labels are random: log(10)


def test_speed_is_that_of_the_second_over_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import end_to_end

    seconds = {end_to_end.DDP: [4.0, 4.0], end_to_end.PLAIN: [1.0, 1.0], end_to_end.EIGHT: [2.0, 2.0], end_to_end.TWO: [1.0, 1.0]}
    written = end_to_end.table({"tiny": seconds})
    for name, ratio in {
        "M = 8 over DDP": 2,
        "M = 8 over plain, 2 threads": 0.5,
        "M = 2 over DDP": 4,
        "M = 8 over M = 2": 0.5,
    }.items():
        assert f"| {name} | {ratio:.2f} ({ratio:.2f}–{ratio:.2f}) |" in written


def test_peers_that_train_something_else_are_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import end_to_end
    from processes import PeerFailed

    monkeypatch.setattr(end_to_end, "launch", lambda peer, case, batches: (1.0, 2.5 if peer == end_to_end.DDP else 2.3))
    with pytest.raises(PeerFailed, match="do not train the same in the case tiny"):
        end_to_end.measure("tiny", 2, 5)


def test_ratios_are_medians_over_rounds_of_the_ratio_in_one_round(report: ModuleType) -> None:
    case = report.Case(
        seconds={"DDP": [0.002, 0.02, 0.2], "unisono, M = 2": [0.001, 0.005, 0.2]},
        compute=[0.0005, 0.002, 0.1],
        moving=[0.0005, 0.002, 0.1],
        moved_bytes=2**20,
    )
    (_, _, of_itself, _, _, _), (_, time, over_ddp, over_plain, share, memory) = report.rows(case)
    assert of_itself == "1.00 (1.00–1.00)"
    assert time == "5.00 (3.00–102.50)"
    assert over_ddp == "2.00 (1.50–3.00)"
    assert share == "100%"
    assert (over_plain, memory) == ("–", "–")


def test_the_limit_counts_four_and_a_half_times_the_parameters_at_two_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import limit

    assert limit.moved_bytes(1000, workers=2) == 4500


def test_a_peer_that_is_not_installed_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import peers

    peer = peers.Peer(name="nobody", make=peers.plain, module="no_such_module_at_all", package="no-such-package")
    assert peer.missing == "no-such-package is not installed: pip install -c constraints.txt -e '.[bench-peers]'"
    assert peers.PEERS["DDP"].missing is None


def test_the_cost_of_every_guard_is_measured(monkeypatch: pytest.MonkeyPatch, run_workers: Callable[..., Any]) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import guards

    for step_s, seconds in run_workers(2, guards.measure, "tiny", 64, transport="shared memory"):
        assert list(seconds) == list(guards.GUARDS)
        assert seconds.pop("shared weights") == 0  # so small a model has none
        assert all(0 < cost < step_s for cost in seconds.values())
