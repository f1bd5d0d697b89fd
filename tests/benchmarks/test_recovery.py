"""What the recovery benchmark concludes from a journal, and that it runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
STEP_S = 0.1
DEAD = 2


@pytest.fixture
def measures(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import recovery_measures

    return recovery_measures


class Story:
    """A journal of two workers with two samples each a step, told step by step."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []

    def compute(self, t: float, step: int, workers: dict[int, list[int]], **fields: Any) -> None:
        for pid, samples in workers.items():
            line = {"t": t, "kind": "compute", "pid": pid, "step": step, "size": len(workers), "samples": samples, **fields}
            self.lines.append(line)

    def write(self, t: float, kind: str, step: int, pid: int = 1) -> None:
        self.lines.append({"t": t, "kind": kind, "pid": pid, "step": step})

    def steps(self, first: int, last: int, began: float, pids: tuple[int, int] = (1, DEAD), **fields: Any) -> None:
        """Undisturbed ones of ``STEP_S``, the first of which begins at ``began``."""
        for number, step in enumerate(range(first, last + 1)):
            self.compute(began + STEP_S * number, step, {pids[0]: _samples(step)[:2], pids[1]: _samples(step)[2:]}, **fields)
            self.write(began + STEP_S * (number + 1), "commit", step)


def _samples(step: int) -> list[int]:
    return list(range(4 * (step - 1), 4 * step))


def test_recovery_is_the_time_to_the_next_step_less_that_of_a_step(measures: ModuleType) -> None:
    story = Story()
    story.steps(1, 20, began=0.0)
    story.compute(2.0, 21, {1: [80, 81], DEAD: [82, 83]}, attempt=1)
    story.compute(2.35, 21, {1: [80, 81, 82, 83]}, attempt=2)
    story.write(2.45, "commit", 21)
    story.steps(22, 30, began=2.45, pids=(1, 3), attempt=2)
    kill = measures.Kill(time=2.05, pid=DEAD, step=20)

    (found,), usual = measures.recoveries(story.lines, [kill], workers=2)
    assert usual == pytest.approx(STEP_S)
    assert found.first == pytest.approx(0.4)
    assert found.recovery == pytest.approx(0.3)
    assert found.all_again == pytest.approx(0.5), "step 22 is the first of the new worker"
    assert found.training_lost == pytest.approx(0.3)
    assert found.steps_lost == 0
    assert measures.samples_off(measures.contributions(story.lines, [kill]), 120) == (0, 0)


def test_a_step_that_was_as_good_as_done_does_not_hide_the_wait_after_it(measures: ModuleType) -> None:
    story = Story()
    story.steps(1, 21, began=0.0)
    story.steps(22, 30, began=2.5, pids=(1, 3))
    kill = measures.Kill(time=2.09, pid=DEAD, step=20)

    (found,), _ = measures.recoveries(story.lines, [kill], workers=2)
    assert found.first == pytest.approx(0.01)
    assert found.recovery == pytest.approx(0.4)
    used = measures.contributions(story.lines, [kill])
    assert used[21] == {1: [80, 81], DEAD: [82, 83]}, "what the dead worker gave to a committed step counts"


def test_of_a_dead_worker_and_its_replacement_only_one_gave_to_the_committed_step(measures: ModuleType) -> None:
    story = Story()
    story.steps(1, 20, began=0.0)
    story.compute(2.0, 21, {1: [80, 81], DEAD: [82, 83]}, attempt=1)
    story.compute(2.4, 21, {1: [80, 81], 3: [82, 83]}, attempt=2)
    story.write(2.5, "commit", 21)
    kill = measures.Kill(time=2.05, pid=DEAD, step=20)
    assert measures.contributions(story.lines, [kill])[21] == {1: [80, 81], 3: [82, 83]}


def test_steps_that_are_taken_again_and_attempts_that_are_dropped_are_lost(measures: ModuleType) -> None:
    story = Story()
    story.steps(1, 20, began=0.0, generation=0)
    story.write(2.2, "dropped", 21)
    story.write(2.2, "dropped", 21, pid=3)
    story.steps(19, 30, began=4.0, pids=(1, 3), generation=1)
    kill = measures.Kill(time=2.05, pid=DEAD, step=20)

    (found,), _ = measures.recoveries(story.lines, [kill], workers=2)
    assert found.steps_lost == 3, "19 and 20 again, and one attempt of both survivors"


def test_a_committed_step_that_is_done_again_on_the_way_counts_as_lost_and_not_as_repeated_samples(measures: ModuleType) -> None:
    story = Story()
    story.steps(1, 20, began=0.0, attempt=1)
    story.compute(2.0, 21, {1: _samples(21)[:2], DEAD: _samples(21)[2:]}, attempt=1)
    for step in (20, 21):  # its worker takes both parts now, and believes to be in step 21
        for part in (_samples(step)[:2], _samples(step)[2:]):
            story.compute(2.3, 21, {1: part}, attempt=2)
    story.write(2.5, "commit", 21)
    story.steps(22, 30, began=2.5, pids=(1, 3), attempt=2)
    kill = measures.Kill(time=2.05, pid=DEAD, step=20)

    (found,), _ = measures.recoveries(story.lines, [kill], workers=2)
    assert found.steps_lost == 1
    assert measures.samples_off(measures.contributions(story.lines, [kill]), 120) == (0, 0)


def test_samples_that_no_committed_step_used_are_lost_and_a_second_use_is_a_repetition(measures: ModuleType) -> None:
    assert measures.samples_off({1: {1: [0, 1], 2: [2, 2]}, 2: {1: [0, 7]}}, samples=6) == (3, 2)


def test_a_run_that_does_not_come_back_to_strength_is_no_result(measures: ModuleType) -> None:
    story = Story()
    story.steps(1, 20, began=0.0)
    for step in range(21, 25):
        story.compute(step / 10, step, {1: _samples(step)})
        story.write(step / 10 + 0.05, "commit", step)
    with pytest.raises(ValueError, match="in step 21 the 2 workers never trained together again"):
        measures.recoveries(story.lines, [measures.Kill(time=2.05, pid=DEAD, step=20)], workers=2)


def test_goodput_is_committed_over_undisturbed_steps_and_samples(measures: ModuleType) -> None:
    story = Story()
    story.steps(1, 20, began=0.0)
    for step in range(21, 31):  # one worker less: a step is half as long, with half of the samples
        story.compute(3 + step / 20, step, {1: _samples(step)[:2]})
        story.write(3 + step / 20 + 0.05, "commit", step)
    found = measures.goodput(
        story.lines, [measures.Kill(time=2.05, pid=DEAD, step=20)], calm=(0.05, 2.05), window=(2.05, 6.05), batch_size=4
    )
    assert (found["kills"], found["steps"]) == (1, 10)
    assert found["ideal"] == pytest.approx(40)
    assert found["goodput"] == pytest.approx(0.25)
    assert found["of_samples"] == pytest.approx(0.125)


def test_a_quick_run_kills_a_worker_of_torchrun_and_writes_what_that_cost(tmp_path: Path) -> None:
    command = [sys.executable, BENCHMARKS / "recovery.py", "--quick", "--save", "quick", "--into", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stdout + done.stderr

    (run,) = json.loads((tmp_path / "quick.json").read_text())["runs"]
    assert "failed" not in run, run
    assert run["committed"] == run["steps"] == 50
    (found,) = run["recoveries"]
    assert found["recovery"] > run["usual"] > 0, "processes that start again take longer than a step"
    assert found["all_again"] > found["recovery"]
    assert (run["samples_lost"], run["samples_repeated"]) == (0, 0)
    assert len(run["weights_sha256"]) == 1
    row = next(line for line in (tmp_path / "quick.md").read_text().splitlines() if line.startswith("| torchrun | 1 |"))
    assert f" {found['recovery']:.2f} (" in row
