"""The promise: weights, buffers and optimizer state are the same bits on any number of workers."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest

from tests.training.hard_problem import Digests, Net, digest, make_trainer, merged, shared, train
from unisono.collective import InProcess
from unisono.testing import run_threads
from unisono.testing.processes import Transport

# At least one of them with loader processes.
EIGHT = [(1, 0), (2, 2), (3, 0), (4, 0), (5, 1), (7, 0), (8, 0)]
SIX = [(1, 0), (2, 0), (3, 1), (4, 0), (5, 0), (6, 0)]

REPLICATED = [(8, 2), (8, 3), (8, 4), (8, 5), (8, 7), (8, 8), (6, 2), (6, 3), (6, 5)]


@cache
def alone(microbatches: int, precision: str = "fp32") -> Digests:
    """One process, without any meeting of workers."""
    return train(None, microbatches, 1, precision=precision)


def differing(one: Digests, other: Digests) -> list[str]:
    return [name for name in {**one, **other} if one.get(name) != other.get(name)]


@pytest.mark.parametrize(
    ("microbatches", "workers", "num_workers"), [(8, *counts) for counts in EIGHT] + [(6, *counts) for counts in SIX]
)
def test_threads_end_with_the_bits_of_one_process(microbatches: int, workers: int, num_workers: int) -> None:
    found = run_threads(workers, lambda collective: train(collective, microbatches, workers, num_workers=num_workers))

    assert differing(merged(found), alone(microbatches)) == []


@pytest.mark.parametrize("replicated", [False, True])
@pytest.mark.parametrize(("transport", "workers"), [("gloo", 2), ("gloo", 3), ("shared memory", 2), ("shared memory", 3)])
def test_processes_end_with_the_bits_of_one_process(
    transport: Transport, workers: int, replicated: bool, run_workers: Callable[..., Any]
) -> None:
    found = run_workers(workers, partial(train, replicated=replicated), 8, workers, transport=transport)

    assert differing(merged(found), alone(8)) == []


@pytest.mark.parametrize(("microbatches", "workers"), REPLICATED)
def test_models_that_every_worker_updates_end_with_the_same_bits(microbatches: int, workers: int) -> None:
    found = run_threads(workers, lambda collective: train(collective, microbatches, workers, replicated=True))

    assert differing(merged(found), alone(microbatches)) == []


@pytest.mark.parametrize("workers", [2, 3, 5, 8])
def test_gradients_that_leave_during_backward_change_no_bit(workers: int) -> None:
    found = run_threads(workers, lambda collective: train(collective, 8, workers, overlap=True))

    assert differing(merged(found), alone(8)) == []


@pytest.mark.parametrize("workers", [1, 2, 3, 4, 5, 7, 8])
def test_bf16_ends_with_one_and_the_same_digest_too(workers: int) -> None:
    found = run_threads(workers, lambda collective: train(collective, 8, workers, precision="bf16"))

    assert differing(merged(found), alone(8, "bf16")) == []
    assert shared(alone(8, "bf16")) != shared(alone(8))


# ---- the problem is hard, and the digests can tell ----


def test_everything_that_should_train_has_trained_and_nothing_else() -> None:
    before = {name: digest(value) for name, value in make_trainer(InProcess(), 8).model.state_dict().items()}
    still = {"frozen.weight", "frozen.bias", "unused.weight", "unused.bias"}

    after = alone(8)

    assert {name for name, value in before.items() if after[name] == value} == still
    states = {name.split()[1] for name in after if name.startswith("optimizer ")}
    assert states == {name for name, _ in Net().named_parameters()} - still


@pytest.mark.parametrize(("seed", "microbatches"), [(1, 8), (0, 7)])
def test_another_seed_or_another_number_of_microbatches_gives_other_bits(seed: int, microbatches: int) -> None:
    other = train(None, microbatches, 1, seed=seed)

    assert {"conv.weight", "large.weight", "embed.weight", "norm.running_var", "gru.weight_hh_l0"} <= set(
        differing(other, alone(8))
    )
