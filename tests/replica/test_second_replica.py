"""A replica of no framework trains, evaluates, resumes and recovers like a torch model: nothing goes round the seam."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import TensorDataset

from tests.fault_injection import Death, run_lives
from tests.replica.numpy_replica import NumpyReplica, squares
from unisono import ConfigurationError, Exact, Trainer
from unisono.collective import Collective
from unisono.order import derive_seed, microbatch_bounds
from unisono.replica.base import Microbatch, Replica
from unisono.testing import run_threads

EVERY = [1, 2, 3, 5]
DATA = TensorDataset(
    torch.randn(70, 5, generator=torch.Generator().manual_seed(0)),
    torch.randn(70, generator=torch.Generator().manual_seed(1)),
)


def trainer_of(replica: Replica, collective: Collective | None, **settings: Any) -> Trainer:
    return Trainer(replica, None, None, batch_size=20, microbatches=6, collective=collective, **settings)


def digest(trainer: Trainer) -> str:
    state = trainer._local.replica.model_state()
    return hashlib.sha256(b"".join(state[name].numpy().tobytes() for name in sorted(state))).hexdigest()


def fitted(collective: Collective | None, epochs: int = 2, **settings: Any) -> tuple[str, float, float]:
    trainer = trainer_of(NumpyReplica(), collective, **settings)
    loss = trainer.fit(DATA, epochs).loss
    return digest(trainer), loss, trainer.evaluate(DATA)["loss"]


@pytest.mark.parametrize("settings", [{}, {"sync": Exact(replicate_kib=0)}, {"max_grad_norm": 0.5}], ids=str)
@pytest.mark.parametrize("workers", EVERY)
def test_weights_losses_and_metrics_have_the_same_bits_on_every_number_of_workers(workers: int, settings: dict[str, Any]) -> None:
    alone = fitted(None, **settings)

    assert run_threads(workers, lambda collective: fitted(collective, **settings)) == [alone] * workers


def test_the_result_is_that_of_a_loop_without_any_of_this() -> None:
    """Sums over microbatches in another order, so to rounding only."""
    replica, plain = NumpyReplica(), NumpyReplica()
    trainer = trainer_of(replica, None)
    for batch in trainer.batches(DATA, 1, order="sequential"):
        trainer.step(batch)

    class Sum:
        def __init__(self) -> None:
            self.gradients: list[Any] = [0.0] * len(plain.layout.slots)
            self.means: list[Any] = []

        def takes_early(self, microbatch: int) -> bool:
            return False

        def early(self, slot: int, gradient: torch.Tensor) -> None:
            raise NotImplementedError

        def add(self, microbatch: int, gradients: Any) -> None:
            self.gradients = [one if more is None else one + more for one, more in zip(self.gradients, gradients, strict=True)]
            self.means.append(plain.model.mean.copy())
            plain.model.mean[:] = start

    for step, first in enumerate(range(0, 70, 20), start=1):
        start, total, samples = plain.model.mean.copy(), Sum(), DATA[first : first + 20]
        parts = [
            Microbatch(number, np.arange(lo, hi), [tensor[lo:hi] for tensor in samples])
            for number, (lo, hi) in enumerate(microbatch_bounds(len(samples[1]), 20, 6))
            if hi > lo
        ]
        plain.gradients(parts, [derive_seed("step", 0, step, part.number) for part in parts], total)
        there = [slot for slot, gradient in enumerate(total.gradients) if not isinstance(gradient, float)]
        plain.update(there, [total.gradients[slot] / len(samples[1]) for slot in there])
        plain.model.mean[:] = np.mean(total.means, axis=0)
        plain.advance_schedule(0.0)

    for name, value in plain.model_state().items():
        torch.testing.assert_close(replica.model_state()[name], value)
    assert replica.learning_rates() == plain.learning_rates() == (0.01 * 0.95 * 0.95 * 0.95 * 0.95,)


@pytest.mark.parametrize(("first", "second"), [(1, 1), (2, 3), (5, 1), (1, 5)])
def test_a_run_goes_on_from_its_checkpoint_on_another_number_of_workers(first: int, second: int, tmp_path: Path) -> None:
    whole = fitted(None, epochs=3)

    run_threads(first, lambda collective: fitted(collective, epochs=1, run_dir=tmp_path))
    found = run_threads(second, lambda collective: fitted(collective, epochs=3, run_dir=tmp_path))

    assert found == [whole] * second
    saved = load_file(tmp_path / "model.safetensors")
    assert set(saved) == {"hidden.weight", "hidden.bias", "out.weight", "out.bias", "seldom", "mean"}


def test_a_run_that_stops_in_the_middle_of_an_epoch_goes_on_there(tmp_path: Path) -> None:
    whole = fitted(None)

    def begun(collective: Collective) -> None:
        trainer = trainer_of(NumpyReplica(), collective, run_dir=tmp_path, sync=Exact(replicate_kib=0))
        for batch in trainer.batches(DATA, 2):
            if trainer.step(batch).step == 2:
                trainer.save()
                break

    run_threads(3, begun)

    assert run_threads(2, lambda collective: fitted(collective, run_dir=tmp_path)) == [whole] * 2


def test_evaluation_leaves_the_buffer_alone() -> None:
    trainer = trainer_of(NumpyReplica(), None)
    trainer.fit(DATA, 1)
    before = trainer.model.mean.copy()

    def careless(model: Any, batch: Any) -> Any:
        model.mean += 1
        return squares(model, batch)

    trainer.evaluate(DATA, {"careless": careless})

    assert np.array_equal(trainer.model.mean, before)
    assert np.abs(before).max() > 0


def test_replicas_that_differ_at_the_start_become_that_of_worker_0() -> None:
    def work(collective: Collective) -> tuple[str, float, float]:
        told = pytest.warns(UserWarning, match="models differ at the start")
        with told if collective.rank == 0 else contextlib.nullcontext():
            trainer = trainer_of(NumpyReplica(seed=collective.rank), collective)
        loss = trainer.fit(DATA, 2).loss
        return digest(trainer), loss, trainer.evaluate(DATA)["loss"]

    assert run_threads(3, work) == [fitted(None)] * 3


def test_a_replica_comes_with_its_own_optimizer_and_loss() -> None:
    with pytest.raises(ConfigurationError, match="a NumpyReplica has its own optimizer, loss and schedule"):
        Trainer(NumpyReplica(), None, squares, batch_size=8)


@pytest.mark.parametrize("workers", [2, 3])
def test_processes_end_with_the_bits_of_one(workers: int, run_workers: Callable[..., Any]) -> None:
    alone = fitted(None)

    assert run_workers(workers, fitted, transport="shared memory") == [alone] * workers


@pytest.mark.parametrize("replicate_kib", [0.0, 256.0], ids=["owners", "everywhere"])
@pytest.mark.parametrize("victim", [0, 2])
def test_a_run_survives_the_death_of_a_worker_at_any_moment(victim: int, replicate_kib: float) -> None:
    def work(link: Any) -> tuple[str, float, float]:
        return fitted(link, sync=Exact(replicate_kib=replicate_kib))

    alone = fitted(None)
    calls = run_lives(3, work, {}).calls[victim]

    for call in range(2 + victim, calls, 7):
        lives = run_lives(3, work, {victim: Death(call)})
        assert sorted(lives.results) == sorted({0, 1, 2} - {victim})
        assert list(lives.results.values()) == [alone] * 2, call


def test_a_worker_that_comes_later_takes_part_in_the_run_as_it_is() -> None:
    lives = run_lives(2, lambda link: fitted(link, epochs=6, sync=Exact(replicate_kib=0)), {}, joiners=1)

    assert list(lives.results.values()) == [fitted(None, epochs=6)] * 3
