"""A bit that flips in one replica is noticed within a period, by name; where most agree, it can be healed."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from unisono import Callback, Desync, Exact, StepResult, Trainer
from unisono.collective import Collective
from unisono.errors import WorkerFailure
from unisono.guard.replicas import PERIOD, ReplicaGuard
from unisono.testing import flip_bit, run_threads

FLIP_AT = 5
STEPS = FLIP_AT + PERIOD + 3


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(40, 60)
        self.norm = nn.BatchNorm1d(60)
        self.last = nn.Linear(60, 3)
        self.register_buffer("table", torch.arange(5))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.norm(self.first(x)))
        return out


class Flips(Callback):
    """Plants a fault in one worker, once, after a step."""

    def __init__(self, rank: int, fault: Callable[[Trainer], None]) -> None:
        self.rank, self.fault, self.steps = rank, fault, 0

    def on_step(self, trainer: Trainer, result: StepResult) -> None:
        self.steps = result.step
        if trainer.collective.rank == self.rank and result.step == FLIP_AT:
            self.fault(trainer)


def trained(
    collective: Collective, callback: Callback, *, steps: int = STEPS, replicate_kib: float = 0, **settings: Any
) -> Trainer:
    torch.manual_seed(0)
    model = Net()
    generator = torch.Generator().manual_seed(1)
    data = TensorDataset(torch.randn(8 * steps, 40, generator=generator), torch.randn(8 * steps, 3, generator=generator))
    trainer = Trainer(
        model,
        torch.optim.AdamW(model.parameters(), lr=1e-3),
        lambda model, batch: (model(batch[0]) - batch[1]).square().mean(),
        batch_size=8,
        microbatches=4,
        collective=collective,
        callbacks=[callback],
        sync=Exact(replicate_kib=replicate_kib),
        **settings,
    )
    trainer.fit(data, epochs=1)
    return trainer


def weight(trainer: Trainer) -> None:
    flip_bit(trainer.model.first.weight, 1234, 3)


def statistics(trainer: Trainer) -> None:
    flip_bit(trainer.model.norm.running_var, 7, 1)


def integers(trainer: Trainer) -> None:
    flip_bit(trainer.model.table, 2, 40)


def moment(trainer: Trainer) -> None:
    flip_bit(trainer.optimizer.state[trainer.model.last.weight]["exp_avg_sq"], 11, 5)


@pytest.mark.parametrize(
    ("fault", "replicate_kib", "named"),
    [
        (weight, 0, "parameter 'first.weight'"),
        (weight, 256, "parameter 'first.weight'"),
        (statistics, 0, "buffer 'norm.running_var'"),
        (integers, 0, "buffer 'table'"),
        (moment, 256, "'exp_avg_sq' of the optimizer for 'last.weight'"),
    ],
)
@pytest.mark.parametrize(("workers", "rank"), [(2, 1), (3, 0), (4, 2)])
def test_a_flipped_bit_is_named_within_a_period(
    workers: int, rank: int, fault: Callable[[Trainer], None], replicate_kib: float, named: str
) -> None:
    def work(collective: Collective) -> tuple[Desync, int]:
        flips = Flips(rank, fault)
        with pytest.raises(Desync) as found:
            # What owners publish is the same again after the next update: there, only looking in every step is sure to see it.
            # And what differs in the optimizer makes the weights differ, too, one update later.
            every = None if (replicate_kib or fault is integers) and fault is not moment else 1
            trained(collective, flips, replicate_kib=replicate_kib, compare_every=every)
        return found.value, flips.steps

    for error, steps in run_threads(workers, work):
        assert FLIP_AT <= steps < FLIP_AT + PERIOD
        assert error.step == steps + 1
        assert error.tensor is not None
        assert named in str(error)
        assert error.ranks == ((0, 1) if workers == 2 else (rank,))
        assert f"on worker {rank}." in str(error) or workers == 2


@pytest.mark.parametrize("fault", [weight, statistics, integers])
def test_the_odd_one_is_healed_where_most_agree(fault: Callable[[Trainer], None]) -> None:
    def work(collective: Collective) -> list[Tensor]:
        return [
            value.clone()
            for value in trained(collective, Flips(1, fault), on_desync="heal", compare_every=1).model.state_dict().values()
        ]

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        first, *others = run_threads(3, work)

    assert all(torch.equal(mine, theirs) for other in others for mine, theirs in zip(first, other, strict=True))
    assert ["on worker 1, which took the state of worker 0" in str(warning.message) for warning in said] == [True]


def test_two_workers_cannot_heal_each_other() -> None:
    def work(collective: Collective) -> None:
        with pytest.raises(Desync, match="with two workers it cannot be told which one is right"):
            trained(collective, Flips(1, weight), on_desync="heal", compare_every=1)

    run_threads(2, work)


def test_a_checkpoint_is_not_written_by_workers_that_differ() -> None:
    def work(collective: Collective) -> int:
        flips = Flips(2, weight)
        with pytest.raises(Desync) as found:
            trained(collective, flips, run_dir="memory://desync", checkpoint_every=FLIP_AT)
        assert found.value.step == FLIP_AT
        return flips.steps

    assert run_threads(3, work) == [FLIP_AT] * 3


def processes(collective: Collective) -> str:
    try:
        trained(collective, Flips(1, weight), compare_every=1)
    except Desync as error:
        return str(error)
    return ""


def test_workers_in_processes_notice_it_too(run_workers: Callable[..., Any]) -> None:
    for message in run_workers(3, processes, transport="shared memory"):
        assert "parameter 'first.weight' on worker 1" in message


def test_equal_replicas_raise_no_alarm() -> None:
    trainers = run_threads(3, lambda collective: trained(collective, Callback(), steps=2 * PERIOD + 1))

    assert [trainer.position.step for trainer in trainers] == [2 * PERIOD + 1] * 3


# ---- every bit is looked at ----


@pytest.mark.parametrize("numel", [512, 4096, 40_000])
def test_what_lies_in_the_wrong_tensor_is_seen(numel: int) -> None:
    class Two(Collective):
        size, rank = 2, 0
        start_exchange = publish = broadcast = None  # type: ignore[assignment]

    def digests(*held: Tensor) -> list[int]:
        guard = ReplicaGuard(lambda: iter([(str(place), one) for place, one in enumerate(held)]), lambda: held, Two(), "error")
        return [guard.digest([0.0]) for _ in range(PERIOD)]

    first, second = torch.randn(2, numel, generator=torch.Generator().manual_seed(0))
    others = torch.zeros(2048)
    assert digests(first, second, others) == digests(first, second, others)
    assert digests(first, second, others) != digests(second, first, others)


@pytest.mark.parametrize("numel", [3, 1000, 40_000, 900_001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.bool])
def test_any_bit_of_anything_is_seen_once_a_period(numel: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(numel)
    value = torch.randint(0, 2, (numel,), generator=generator).to(dtype)
    turned = value.clone()

    def guard(tensor: Tensor) -> ReplicaGuard:
        held = {"small": torch.arange(3), "value": tensor}
        return ReplicaGuard(lambda: iter(held.items()), lambda: [*held.values()], Two(), "error")

    def digests(guard: ReplicaGuard) -> list[int]:
        return [guard.digest([0.0]) for _ in range(PERIOD)]

    class Two(Collective):
        size, rank = 2, 0
        start_exchange = publish = broadcast = None  # type: ignore[assignment]

    plain = digests(guard(value))
    assert sum(digest != 0 for digest in plain) >= 1
    for place in {0, numel // 2, numel - 1}:
        flip_bit(turned, place, 0)
        assert digests(guard(turned)) != plain
        flip_bit(turned, place, 0)
    assert digests(guard(turned)) == plain


def looks(steps_s: Sequence[float], held: Sequence[Tensor], every: int | None = None) -> list[int]:
    """The numbers of the steps in which something is looked at, if the ones before took so long."""

    class Two(Collective):
        size, rank = 2, 0
        start_exchange = publish = broadcast = None  # type: ignore[assignment]

    guard = ReplicaGuard(lambda: iter(()), lambda: held, Two(), "error", every)
    # As in training: what is not known is not a number, and then readings of several clocks.
    readings = [(math.nan, math.nan), *((now_s / 4, 3 * now_s / 4) for now_s in accumulate(steps_s))]
    return [step for step, reading in enumerate(readings[:-1], start=1) if guard.digest(reading)]


@given(st.lists(st.sampled_from([0.0, 1e-5, 1e-3, 0.02, 1.0]), min_size=3 * PERIOD, max_size=3 * PERIOD))
def test_no_more_than_a_period_passes_between_two_looks_however_steps_vary(steps_s: list[float]) -> None:
    found = looks(steps_s, [torch.zeros(8)])
    assert max(later - earlier for earlier, later in pairwise([0, *found, 3 * PERIOD + 1])) <= PERIOD


def test_as_much_is_looked_at_as_fits_into_a_small_share_of_the_time() -> None:
    assert looks([1.0] * 20, [torch.zeros(8)]) == [*range(3, 21)], "what a step takes is known from the third on"
    often = looks([0.001] * 50 + [0.002] * 600, [torch.zeros(8)])
    assert len(often) == pytest.approx(600 * 0.002 * 0.0015 / 30e-6, abs=4)
    assert looks([0.001] * (2 * PERIOD), [torch.zeros(2**18) for _ in range(8)]) == [8 * turn for turn in range(1, 17)]


def test_what_is_to_be_compared_in_every_step_is() -> None:
    assert looks([0.0] * 20, [torch.zeros(2**18) for _ in range(8)], every=1) == [*range(1, 21)]


def test_a_worker_that_fails_meanwhile_is_a_failure_and_not_a_difference() -> None:
    class Leaves(Callback):
        def on_step(self, trainer: Trainer, result: StepResult) -> None:
            if trainer.collective.rank == 1 and result.step == 2:
                raise KeyError("mine")

    def work(collective: Collective) -> str:
        try:
            trained(collective, Leaves())
        except (WorkerFailure, KeyError) as error:
            return type(error).__name__
        finally:
            collective.close()
        return "none"

    assert run_threads(3, work) == ["LostWorker", "KeyError", "LostWorker"]


def test_what_is_put_in_the_place_of_a_tensor_is_looked_at_from_the_next_round_on() -> None:
    class Two(Collective):
        size, rank = 2, 0
        start_exchange = publish = broadcast = None  # type: ignore[assignment]

    held = [torch.zeros(8), torch.zeros(2**15)]
    guard = ReplicaGuard(lambda: iter(()), lambda: held, Two(), "error", every=1)
    before = [guard.digest([0.0]) for _ in range(2)]
    held[0] = torch.ones(8)
    replaced = guard.digest([0.0])
    held[0].data = torch.full((8,), 2.0)
    moved = guard.digest([0.0])
    held[0].add_(1.0)
    assert len({*before, replaced, moved, guard.digest([0.0])}) == 4
