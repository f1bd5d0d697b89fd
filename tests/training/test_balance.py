"""Shares follow speed: played through with made-up workers, whose times a test knows better than any clock could."""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from tests.guard.test_stragglers import Clocks
from unisono import Trainer
from unisono.assignment import assignment
from unisono.collective import Collective
from unisono.guard import stragglers
from unisono.guard.stragglers import Stragglers
from unisono.observe.summary import Summary
from unisono.testing import run_threads
from unisono.training import balance
from unisono.training.balance import TRUST, WINDOW_S, Balance
from unisono.training.header import Signals

Times = Callable[[float, Sequence[int], random.Random], list[float]]
"""Seconds that each worker computes in a step, by the time of day, everybody's microbatches and chance."""
Change = tuple[float, tuple[int, ...]]
"""The time of day, and everybody's share from then on."""


def changes(
    workers: int,
    leaves: int,
    times: Times,
    *,
    seconds: float,
    rest: Sequence[float] = (),
    filled: Callable[[int], int] | None = None,
    seed: int = 0,
) -> list[Change]:
    """What a balance asks for in this time; it gets it with the batch after the next, as in training.

    Args:
        rest: Seconds that each worker takes besides, whatever its share.
        filled: Microbatches of a step that hold samples.
    """
    chance = random.Random(seed)
    ranges = assignment(leaves, workers)
    policy = Balance(ranges)
    collector = Stragglers(ranges, lambda straggler: None)
    rest = rest or [0.0] * workers
    clocks = Clocks(workers)
    told = clocks.readings
    found: list[Change] = []
    now, step = 0.0, 0
    while now < seconds:
        held = leaves if filled is None else filled(step)
        block = collector.add(told, held)
        wanted = None if block is None else policy.add(block)
        work = times(now, [max(0, min(hi, held) - lo) for lo, hi in ranges], chance)
        longest = max(map(sum, zip(work, rest, strict=True)))
        told = clocks.after(
            [
                Signals(seconds=(0.1 * own, 0.9 * own + fixed, 0.0, longest - own - fixed), work_s=0.9 * own)
                for own, fixed in zip(work, rest, strict=True)
            ]
        )
        now += longest
        step += 1
        if wanted is not None:
            found.append((now, policy.shares))
            ranges = wanted
            collector.reassign(ranges)
    return found


def at_speed(*speeds: float, leaf_s: float = 0.01, noise: float = 0.0, hiccups: float = 0.0) -> Times:
    """Workers of these speeds.

    Args:
        leaf_s: Seconds a microbatch at speed 1.
        noise: Standard deviation of the logarithm of each time.
        hiccups: The share of steps that take a worker twenty times as long.
    """

    def times(now: float, shares: Sequence[int], chance: random.Random) -> list[float]:
        return [
            leaf_s * share / speed * math.exp(chance.gauss(0, noise)) * (20 if chance.random() < hiccups else 1)
            for share, speed in zip(shares, speeds, strict=True)
        ]

    return times


def step_s(shares: Sequence[int], speeds: Sequence[float]) -> float:
    return max(share / speed for share, speed in zip(shares, speeds, strict=True))


# ---- what is even stays as it is ----


@pytest.mark.parametrize("leaf_s", [0.0005, 0.02, 0.5])
@pytest.mark.parametrize(("workers", "leaves"), [(2, 8), (3, 8), (3, 16), (5, 32), (8, 64)])
def test_noise_and_hiccups_change_nothing(workers: int, leaves: int, leaf_s: float) -> None:
    times = at_speed(*[1.0] * workers, leaf_s=leaf_s, noise=0.25, hiccups=0.005)

    assert changes(workers, leaves, times, seconds=min(max(60, 1000 * leaf_s * leaves / workers), 1000 * leaf_s * leaves)) == []


def test_a_worker_slower_by_a_tenth_is_left_alone() -> None:
    assert changes(2, 16, at_speed(1, 0.9, noise=0.05), seconds=60) == []


def test_where_there_are_as_many_workers_as_microbatches_nothing_can_move() -> None:
    assert changes(4, 4, at_speed(1, 1, 1, 0.1), seconds=20) == []


def test_an_update_that_takes_one_worker_longer_is_not_its_speed() -> None:
    """Whoever owns the one huge parameter works on it in any case: others could take so little that it would not pay."""
    assert changes(2, 8, at_speed(1, 1, leaf_s=0.001), rest=(0.05, 0.01), seconds=30) == []


def test_short_batches_do_not_look_like_a_slow_worker() -> None:
    # Worker 1 has nothing to do in every other step, but what is due in any case.
    short = changes(2, 8, at_speed(1, 1), rest=(0.05, 0.05), filled=lambda step: 8 if step % 2 else 4, seconds=60)
    assert short == []


def test_threads_that_compete_for_cores_change_nothing() -> None:
    """Three workers on two cores: in each step two of them, by chance, share one core until the third is done."""

    def times(now: float, shares: Sequence[int], chance: random.Random) -> list[float]:
        alone, *pair = chance.sample(range(3), 3)
        first = 0.01 * shares[alone]
        done = [0.0] * 3
        done[alone] = first
        for worker in pair:
            work = 0.01 * shares[worker]
            done[worker] = 2 * work if 2 * work <= first else first + (work - first / 2)
        return [time * math.exp(chance.gauss(0, 0.1)) for time in done]

    assert changes(3, 24, times, seconds=120) == []


# ---- what is uneven is set right, once ----


@pytest.mark.parametrize("leaf_s", [0.0005, 0.01, 0.3])
@pytest.mark.parametrize(
    ("leaves", "speeds"),
    [(8, (1, 0.5)), (32, (1, 0.5)), (32, (0.5, 1, 1)), (24, (1, 1, 0.33)), (32, (1, 1, 1, 1, 0.5)), (64, (1, 0.7, 0.4, 1))],
    ids=str,
)
def test_a_slow_worker_gets_less_after_a_few_windows_and_then_all_is_quiet(
    leaves: int, speeds: tuple[float, ...], leaf_s: float
) -> None:
    even = assignment(leaves, len(speeds))
    one_step_s = leaf_s * step_s([hi - lo for lo, hi in even], speeds)

    times = at_speed(*speeds, leaf_s=leaf_s, noise=0.03, hiccups=0.005)
    found = changes(len(speeds), leaves, times, seconds=max(30, 100 * one_step_s))

    ((when, shares),) = found
    assert when <= max(8 * WINDOW_S, 60 * one_step_s)
    fluid = leaves / sum(speeds)  # if microbatches could be cut
    assert step_s(shares, speeds) <= 1.1 * fluid + 1 / min(speeds)


def test_the_best_ranges_are_found_at_once() -> None:
    ((_, shares),) = changes(2, 24, at_speed(1, 0.5), seconds=30)
    assert shares == (16, 8)


def test_much_noise_only_makes_it_take_longer() -> None:
    found = changes(2, 16, at_speed(1, 0.4, noise=0.4, hiccups=0.005), seconds=200)
    assert 1 <= len(found) <= 2
    assert all(shares[0] > shares[1] for _, shares in found)


def test_speed_is_followed_down_and_up_again() -> None:
    def times(now: float, shares: Sequence[int], chance: random.Random) -> list[float]:
        return at_speed(1, 0.5 if 20 < now < 50 else 1.0, noise=0.05)(now, shares, chance)

    down, up = changes(2, 16, times, seconds=120)

    assert down[1] == (11, 5)
    assert 20 < down[0] < 26
    assert up[1] == (8, 8)
    assert 50 < up[0] < 50 + (TRUST + 5) * WINDOW_S


# ---- speed that depends on the share ----


def test_what_a_worker_took_when_it_had_more_is_remembered_longer_each_time() -> None:
    """Worker 1 has half a core: it is throttled, but not while it has little to do. So with little it always looks fast."""

    def times(now: float, shares: Sequence[int], chance: random.Random) -> list[float]:
        speed = 0.5 if shares[1] > 0.6 * shares[0] else 1.0
        return at_speed(1, speed, noise=0.05)(now, shares, chance)

    found = changes(2, 8, times, seconds=1000)

    tried = [now for now, shares in found if shares == (4, 4)]
    pauses = [later - earlier for earlier, later in pairwise(tried)]
    assert all(later > 1.5 * earlier for earlier, later in pairwise(pauses))
    assert 3 <= len(tried) <= 7


def test_a_worker_that_is_fast_again_is_believed_the_next_time() -> None:
    def times(now: float, shares: Sequence[int], chance: random.Random) -> list[float]:
        speed = 0.5 if shares[1] > 0.6 * shares[0] and now < 100 else 1.0
        return at_speed(1, speed, noise=0.05)(now, shares, chance)

    found = changes(2, 8, times, seconds=400)

    assert found[-1][1] == (4, 4)
    assert found[-1][0] < 200


# ---- in training ----


class Slow(TensorDataset):
    """On one worker each sample takes a while to read."""

    def __init__(self, slow: bool) -> None:
        super().__init__(torch.randn(8 * 150, 4, generator=torch.Generator().manual_seed(0)))
        self.slow = slow

    def __getitem__(self, index: int) -> Any:
        until = time.perf_counter() + (0.002 if self.slow else 0.00025)
        while time.perf_counter() < until:
            pass
        return super().__getitem__(index)


def fit(collective: Collective, run_dir: Path, slow: int | None) -> bytes:
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    trainer = Trainer(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        lambda model, batch: model(batch[0]).square().mean(),
        batch_size=8,
        microbatches=8,
        run_dir=run_dir,
        collective=collective,
    )
    trainer.fit(Slow(collective.rank == slow), 1)
    return model.weight.detach().numpy().tobytes()


@pytest.mark.alone
def test_in_training_a_slow_worker_gets_less_and_log_and_summary_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (alone,) = run_threads(1, lambda collective: fit(collective, tmp_path / "alone", None))
    monkeypatch.setattr(stragglers, "BLOCK_S", 0.0)
    monkeypatch.setattr(balance, "WINDOW_S", 0.0)

    found = run_threads(2, lambda collective: fit(collective, tmp_path / "run", 1))

    assert found == [alone, alone]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    moved = [(line["step"], line["microbatches"], line["microbatches_1"]) for line in lines if "microbatches" in line]
    step, more, less = moved[0]
    assert step >= 3 * balance.BLOCKS
    assert more + less == 8
    assert more > 4 > less
    summary = Summary.from_json((tmp_path / "run" / "summary.json").read_text())
    assert sum(summary.microbatches) == pytest.approx(8)
    assert summary.microbatches[0] > 4.5
    assert Summary.from_json((tmp_path / "alone" / "summary.json").read_text()).microbatches == [8]
