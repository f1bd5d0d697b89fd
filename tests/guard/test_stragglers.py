"""A slow worker is named once, by all workers' own reckoning, with the cause that the system knows; a hiccup is not."""

from __future__ import annotations

import json
import operator
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from unisono import Trainer
from unisono.collective import Collective
from unisono.guard import stragglers
from unisono.guard.stragglers import (
    CROWDED,
    LOOK_EVERY_S,
    STEPS,
    STOLEN,
    THROTTLED,
    HostMonitor,
    Straggler,
    Stragglers,
    TimingBlock,
    warning,
)
from unisono.observe.summary import Summary
from unisono.report.run_data import RunReader
from unisono.testing import run_threads
from unisono.training.header import Signals
from unisono.world import World

EVEN = [(0, 2), (2, 4), (4, 6), (6, 8)]


def said(*workers: tuple[float, float], troubles: tuple[int, ...] = ()) -> list[Signals]:
    """What workers tell that took so long for loading and computing."""
    longest = max(map(sum, workers))
    bits = troubles or (0,) * len(workers)
    return [
        Signals(seconds=(data, compute, 0.0, longest - data - compute), troubles=trouble)
        for (data, compute), trouble in zip(workers, bits, strict=True)
    ]


class Clocks:
    """What workers' clocks show: they tell readings, and what a step took is the difference of two."""

    def __init__(self, workers: int) -> None:
        self.readings = [Signals(seconds=(0.0,) * 4)] * workers

    def after(self, took: Sequence[Signals]) -> list[Signals]:
        """The readings after a step that took so long."""
        self.readings = [
            own._replace(
                seconds=tuple(map(operator.add, before.seconds, own.seconds)),
                work_s=before.work_s + own.work_s,
            )
            for before, own in zip(self.readings, took, strict=True)
        ]
        return self.readings


class Case:
    """Stragglers, and what they found."""

    def __init__(self, ranges: list[tuple[int, int]]) -> None:
        self.found: list[Straggler] = []
        self.stragglers = Stragglers(ranges, self.found.append)
        self.clocks = Clocks(len(ranges))

    def add(self, took: list[Signals], filled: int = 8) -> TimingBlock | None:
        """A step, after one that took so long."""
        return self.stragglers.add(self.clocks.after(took), filled)

    def steps(self, count: int, took: list[Signals], filled: int = 8) -> None:
        for _ in range(count):
            self.add(took, filled)


def test_a_worker_slower_than_the_median_by_a_fifth_is_named_once() -> None:
    case = Case(EVEN)
    case.steps(5 * STEPS, said((0.0, 0.2), (0.0, 0.2), (0.0, 0.25), (0.01, 0.2)))
    assert case.found == [Straggler(2, pytest.approx(1.25), False, 0)]


def test_one_slower_by_less_than_that_is_not() -> None:
    case = Case(EVEN)
    case.steps(5 * STEPS, said((0.0, 0.2), (0.0, 0.2), (0.0, 0.23), (0.0, 0.2)))
    assert case.found == []


def test_of_two_workers_the_faster_one_is_the_measure() -> None:
    case = Case([(0, 4), (4, 8)])
    case.steps(STEPS + 1, said((0.0, 0.13), (0.0, 0.1)))
    assert [straggler.rank for straggler in case.found] == [0]


@pytest.mark.parametrize("step_s", [0.001, 0.03, 0.2])
def test_nobody_is_named_before_fifty_steps_and_five_seconds(step_s: float) -> None:
    case = Case(EVEN)
    due = max(STEPS, round(stragglers.SECONDS / step_s))
    told = said((0.0, step_s), (0.0, step_s / 2), (0.0, step_s / 2), (0.0, step_s / 2))
    case.steps(due - 1, told)
    assert case.found == []
    case.steps(2 * STEPS, told)  # a block may not be full yet
    assert [straggler.rank for straggler in case.found] == [0]


def test_a_single_hiccup_is_no_straggler() -> None:
    case = Case(EVEN)
    normal = said((0.0, 0.2), (0.0, 0.2), (0.0, 0.2), (0.0, 0.2))
    case.steps(20, normal)
    case.steps(1, said((0.0, 0.2), (0.0, 60.0), (0.0, 0.2), (0.0, 0.2)))
    case.steps(STEPS, normal)
    assert case.found == []


def test_the_time_is_that_of_a_microbatch_since_workers_may_have_several() -> None:
    case = Case([(0, 3), (3, 6), (6, 8)])
    case.steps(2 * STEPS, said((0.0, 0.3), (0.0, 0.3), (0.0, 0.2)))
    assert case.found == []
    case = Case([(0, 3), (3, 6), (6, 8)])
    case.steps(2 * STEPS, said((0.0, 0.3), (0.0, 0.3), (0.0, 0.4)))
    assert [straggler.rank for straggler in case.found] == [2]


def test_whoever_has_less_to_do_and_is_done_first_holds_nobody_up() -> None:
    case = Case([(0, 2), (2, 4), (4, 6), (6, 7), (7, 8)])
    # A tenth of a second a microbatch, and as much for each step's update.
    case.steps(2 * STEPS, said((0.0, 0.3), (0.0, 0.3), (0.0, 0.3), (0.0, 0.2), (0.0, 0.2)))
    assert case.found == []


def test_a_short_batch_has_fewer_microbatches() -> None:
    case = Case([(0, 4), (4, 8)])
    # Seconds are told one step later than the batch that they belong to.
    for number in range(2 * STEPS):
        case.add(said((0.0, 0.4), (0.0, 0.1 if number % 2 else 0.4)), filled=8 if number % 2 else 5)
    assert case.found == []


def test_where_the_excess_goes_into_loading_the_loader_is_the_cause() -> None:
    case = Case(EVEN)
    case.steps(2 * STEPS, said((0.0, 0.2), (0.2, 0.21), (0.0, 0.2), (0.0, 0.2)))
    (found,) = case.found
    assert found.loading
    assert "raise Loader(num_workers=...)" in warning(found, "host h, process 7")


def test_what_the_worker_complained_of_is_the_cause() -> None:
    case = Case(EVEN)
    told = said((0.0, 0.2), (0.0, 0.4), (0.0, 0.2), (0.0, 0.2), troubles=(CROWDED, THROTTLED, 0, 0))
    case.steps(2 * STEPS, told)
    (found,) = case.found
    text = warning(found, "host h, process 7")
    assert text.startswith("worker 1 (host h, process 7) is slow: a microbatch takes it 2.00 times as long as the median worker")
    assert "throttled at the CPU quota" in text
    assert "fewer usable cores" not in text


def test_without_a_known_cause_none_is_claimed() -> None:
    assert "The system shows no cause" in warning(Straggler(1, 1.3, False, 0), "host h, process 7")


def test_with_other_ranges_everything_is_measured_anew() -> None:
    case = Case([(0, 4), (4, 8)])
    case.steps(STEPS // 2, said((0.0, 0.1), (0.0, 0.4)))
    case.stragglers.reassign([(0, 6), (6, 8)])
    case.steps(2 * STEPS, said((0.0, 0.3), (0.0, 0.1)))
    assert case.found == []


def test_a_block_holds_steps_of_the_same_ranges_and_knows_the_full_ones() -> None:
    case = Case([(0, 4), (4, 8)])
    add = case.add
    told = [
        Signals(seconds=(0.0, 0.2, 0.0, 0.0), work_s=0.15),
        Signals(seconds=(0.0, 0.1, 0.0, 0.1), work_s=0.05),
    ]
    assert add(told, 8) is None  # what is told belongs to the step before
    block = add(told, 5)
    assert block is not None
    assert (block.full, block.shares, block.leaves.tolist()) == (1, (4, 4), [4, 4])
    assert block.full_work_s.tolist() == [0.15, 0.05]
    block = add(told, 8)
    assert block is not None
    assert (block.full, block.leaves.tolist()) == (0, [4, 1])
    case.stragglers.reassign([(0, 6), (6, 8)])
    assert add(told, 8) is None  # told of the other ranges
    block = add(told, 8)
    assert block is not None
    assert (block.full, block.shares, block.leaves.tolist()) == (1, (6, 2), [6, 2])


def test_short_batches_in_the_middle_of_a_block_are_kept_apart() -> None:
    case = Case([(0, 4), (4, 8)])
    full, short = said((0.0, 0.01), (0.0, 0.008)), said((0.0, 0.01), (0.0, 0.002))
    case.add(full)
    assert case.add(full) is not None  # the first block is a single step, which tells how long the next one is

    taken = [8, 8, 8, 8, 5, 5, 5, 8, 8, 8]
    blocks = [case.add(full if told == 8 else short, comes) for told, comes in zip(taken, [*taken[1:], 8], strict=True)]

    *none, block = blocks
    assert none == [None] * 9
    assert block is not None
    assert (block.steps, block.full, block.leaves.tolist()) == (10, 7, [40, 31])
    assert block.seconds.sum(axis=1).tolist() == pytest.approx([0.1, 0.1])
    assert block.seconds[:, 1].tolist() == pytest.approx([0.1, 7 * 0.008 + 3 * 0.002])
    assert block.full_seconds[:, 1].tolist() == pytest.approx([0.07, 7 * 0.008])


# ---------------------------------------------------------------------- the machine


class Host:
    """Made-up files of a machine, and its time."""

    def __init__(self, root: Path) -> None:
        self.root, self.now = root, 0.0
        for file in ("proc/self", "sys/fs/cgroup/pods/one", "sys/fs/cgroup/cpu,cpuacct/old"):
            (root / file).mkdir(parents=True)
        self.write("proc/self/cgroup", "0::/pods/one\n4:cpu,cpuacct:/old\n")
        self.steal(0, 0)
        self.throttle_v2(0)
        self.throttle_v1(0)

    def write(self, file: str, text: str) -> None:
        (self.root / file).write_text(text)

    def steal(self, stolen: int, used: int) -> None:
        lines = [f"cpu{core} {used} 0 0 0 0 0 0 {stolen} 0 0" for core in range(64)]
        self.write("proc/stat", "\n".join(["cpu  1 2 3 4 5 6 7 8 9 10", *lines, "intr 1 2 3"]))

    def throttle_v2(self, seconds: float) -> None:
        # A group above this process's own limits it, too.
        self.write("sys/fs/cgroup/pods/cpu.stat", f"usage_usec 5\nnr_throttled 1\nthrottled_usec {int(seconds * 1e6)}\n")

    def throttle_v1(self, seconds: float) -> None:
        self.write("sys/fs/cgroup/cpu,cpuacct/old/cpu.stat", f"nr_throttled 1\nthrottled_time {int(seconds * 1e9)}\n")

    def machine(self, **world: Any) -> HostMonitor:
        return HostMonitor(World(**world), root=self.root, clock=lambda: self.now)


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


@pytest.mark.parametrize("throttle", [Host.throttle_v2, Host.throttle_v1])
def test_throttling_is_noticed_at_the_next_look_and_forgotten_when_it_is_over(host: Host, throttle: Any) -> None:
    machine = host.machine()
    throttle(host, 1.0)
    assert machine.troubles() == 0  # it is not time to look yet
    host.now += LOOK_EVERY_S
    assert machine.troubles() == THROTTLED
    host.now += LOOK_EVERY_S
    assert machine.troubles() == 0


def test_a_moment_of_throttling_is_no_trouble(host: Host) -> None:
    machine = host.machine()
    host.throttle_v2(0.01)
    host.now += LOOK_EVERY_S
    assert machine.troubles() == 0


def test_steal_time_is_noticed(host: Host) -> None:
    machine = host.machine()
    host.steal(stolen=20, used=480)
    host.now += LOOK_EVERY_S
    assert machine.troubles() == STOLEN
    host.steal(stolen=21, used=1000)
    host.now += LOOK_EVERY_S
    assert machine.troubles() == 0


def test_more_threads_than_cores_are_noticed(host: Host) -> None:
    assert host.machine(local_size=4, size=4, threads=10_000).troubles() == CROWDED


def test_a_machine_without_these_files_has_no_troubles(tmp_path: Path) -> None:
    machine = HostMonitor(World(), root=tmp_path, clock=iter([0.0, 100.0]).__next__)
    assert machine.troubles() == 0


# ---------------------------------------------------------------------- in training


class Slow(TensorDataset):
    """On one worker each sample takes a while to read."""

    def __init__(self, slow: bool, length: int) -> None:
        super().__init__(torch.ones(length, 4))
        self.slow = slow

    def __getitem__(self, index: int) -> Any:
        until = time.perf_counter() + 0.004 * self.slow
        while time.perf_counter() < until:
            pass
        return super().__getitem__(index)


def train(collective: Collective, run_dir: Path, slow: int | None, steps: int) -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    trainer = Trainer(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        lambda model, batch: model(batch[0]).square().mean(),
        batch_size=3,
        microbatches=3,
        run_dir=run_dir,
        collective=collective,
    )
    trainer.fit(Slow(collective.rank == slow, 3 * steps), 1, order="sequential")


@pytest.mark.alone
def test_in_training_a_slow_loader_is_named_and_its_time_is_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stragglers, "SECONDS", 0.3)
    monkeypatch.setattr(stragglers, "BLOCK_S", 0.02)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run_threads(3, lambda collective: train(collective, tmp_path / "run", 2, 150))
    texts = [str(one.message) for one in caught if "is slow" in str(one.message)]
    assert len(texts) == 1
    assert texts[0].startswith("worker 2 (host ")
    assert "loading samples" in texts[0]

    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    (event,) = [line for line in lines if "event" in line]
    assert (event["event"], event["worker"]) == ("straggler", 2)
    assert event["text"].removeprefix("worker 2 is slow: ") in texts[0]
    (told,) = RunReader(tmp_path / "run").read().events
    assert (told.kind, told.step, told.text) == ("straggler", event["step"], event["text"])
    with_all = [line for line in lines if "data_s_2" in line]
    assert len(with_all) > 10
    for line in with_all:
        assert {f"{name}_s_{rank}" for name in ("data", "compute", "communication", "waiting") for rank in (1, 2)} <= set(line)
        assert line["data_s_2"] > 0.003
        assert "data_s_0" not in line
    summary = Summary.from_json((tmp_path / "run" / "summary.json").read_text())
    assert [len(times) for times in (summary.data_s, summary.compute_s, summary.communication_s, summary.waiting_s)] == [3] * 4
    assert summary.data_s[2] > 150 * 0.003 > summary.data_s[0]


def test_steps_that_take_long_have_every_workers_times_in_each_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stragglers, "BLOCK_S", 0.0)
    run_threads(2, lambda collective: train(collective, tmp_path / "run", None, 5))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert ["compute_s_1" in line for line in lines] == [False, True, True, True, True]
