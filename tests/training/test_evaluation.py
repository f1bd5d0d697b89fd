"""Exact evaluation: each sample once, and the same number on any number of workers."""

from __future__ import annotations

import contextlib
import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset

from tests.training import small_run
from unisono import ConfigurationError, DataError, Loader, Trainer
from unisono.collective import Collective
from unisono.testing import run_threads

EVERY = [1, 2, 3, 4, 5, 7, 8]
SAMPLES = 103


def dataset(samples: int = SAMPLES) -> TensorDataset:
    generator = torch.Generator().manual_seed(3)
    return TensorDataset(torch.randn(samples, 5, generator=generator), torch.randint(0, 4, (samples,), generator=generator))


def cross_entropy(model: Any, batch: list[Tensor]) -> tuple[Tensor, int]:
    inputs, targets = batch
    return F.cross_entropy(model(inputs), targets, reduction="sum"), len(targets)


def accuracy(model: Any, batch: list[Tensor]) -> tuple[Tensor, int]:
    inputs, targets = batch
    return (model(inputs).argmax(1) == targets).sum(), len(targets)


def make_trainer(collective: Collective | None = None, **settings: Any) -> Trainer:
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(5, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    return Trainer(model, optimizer, cross_entropy, batch_size=32, microbatches=8, collective=collective, **settings)


def evaluated(workers: int, data: Any, metrics: Any, **settings: Any) -> dict[str, float]:
    """What every worker gets."""
    found = run_threads(workers, lambda collective: make_trainer(collective).evaluate(data, metrics, **settings))
    assert all(other == found[0] for other in found)
    return found[0]


def test_metrics_are_those_of_a_plain_computation_over_the_whole_dataset() -> None:
    data = dataset()
    model = make_trainer().model.eval()
    with torch.no_grad():
        logits = model(data.tensors[0])
    right = {
        "accuracy": (logits.argmax(1) == data.tensors[1]).double().mean().item(),
        "loss": F.cross_entropy(logits.double(), data.tensors[1]).item(),
    }

    found = evaluated(3, data, {"accuracy": accuracy, "loss": cross_entropy})

    assert list(found) == ["accuracy", "loss"]
    assert found["accuracy"] == right["accuracy"]
    assert found["loss"] == pytest.approx(right["loss"], rel=1e-6)


@pytest.mark.parametrize("batch_size", [None, 1, 7, 1000])
def test_every_number_of_workers_gives_the_same_numbers(batch_size: int | None) -> None:
    metrics = {"accuracy": accuracy, "loss": cross_entropy}
    alone = evaluated(1, dataset(), metrics, batch_size=batch_size)

    assert all(evaluated(workers, dataset(), metrics, batch_size=batch_size) == alone for workers in EVERY)


def test_loader_processes_change_nothing() -> None:
    loader = Loader(num_workers=2, multiprocessing_context="fork")

    assert evaluated(2, dataset(), {"loss": cross_entropy}, loader=loader) == evaluated(1, dataset(), {"loss": cross_entropy})


def test_without_metrics_it_is_the_loss() -> None:
    assert evaluated(2, dataset(), None) == evaluated(1, dataset(), {"loss": cross_entropy})


@pytest.mark.parametrize("workers", EVERY)
@pytest.mark.parametrize("samples", [1, 2, 5, 31, 32, 33, 103])
def test_each_sample_counts_once_even_with_fewer_samples_than_workers(samples: int, workers: int) -> None:
    numbers = TensorDataset(2.0 ** torch.arange(samples, dtype=torch.float64) if samples < 50 else torch.arange(samples).double())
    total = float(numbers.tensors[0].sum())

    found = evaluated(workers, numbers, {"mean": lambda _, batch: (batch[0].sum(), len(batch[0]))})

    assert found == {"mean": total / samples}


def test_sums_are_folded_in_float64() -> None:
    """In float32, 2**24 + 1 is 2**24."""
    ones = TensorDataset(torch.cat([torch.tensor([2.0**24]), torch.ones(100)]))

    assert evaluated(2, ones, {"sum": lambda _, batch: (batch[0].sum(), 1)}, batch_size=1) == {"sum": (2**24 + 100) / 101}


def test_weights_of_samples_are_counts() -> None:
    data = TensorDataset(torch.tensor([1.0, 10.0, 100.0]), torch.tensor([1, 0, 3]))

    found = evaluated(3, data, {"mean": lambda _, batch: ((batch[0] * batch[1]).sum(), batch[1].sum())}, batch_size=1)

    assert found == {"mean": 301 / 4}


def test_a_lone_scalar_is_a_mean_over_the_samples() -> None:
    data = TensorDataset(torch.arange(10.0))

    for metric in (lambda _, batch: batch[0].mean(), lambda _, batch: batch[0].mean().item()):
        assert evaluated(2, data, {"mean": metric}, batch_size=3)["mean"] == pytest.approx(4.5, rel=1e-7)


@pytest.mark.parametrize("workers", [1, 3])
def test_a_count_of_zero_over_the_whole_dataset_is_an_error(workers: int) -> None:
    with pytest.raises(DataError, match=r"the count of metric 'none' is 0\.0 over the whole dataset"):
        evaluated(workers, dataset(), {"none": lambda _, batch: (batch[0].sum(), 0)})


def test_a_count_of_zero_in_one_microbatch_is_none() -> None:
    data = TensorDataset(torch.tensor([1.0, 2.0, 3.0]))

    found = evaluated(2, data, {"large": lambda _, batch: (batch[0][batch[0] > 1].sum(), (batch[0] > 1).sum())}, batch_size=1)

    assert found == {"large": 2.5}


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (lambda _, batch: batch[0], r"metric 'bad' function returned a tensor of shape"),
        (lambda _, batch: (batch[0].sum(), 1, 2), "metric 'bad' function returned 3 values"),
        (lambda _, batch: (batch[0].sum(), -1), "metric 'bad''s count is -1.0"),
        (lambda _, batch: "0.5", "metric 'bad' function returned a str"),
    ],
)
def test_a_metric_of_another_form_is_refused_by_name(metric: Callable[..., Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make_trainer().evaluate(dataset(), {"bad": metric})


def test_no_metric_is_an_error() -> None:
    with pytest.raises(ConfigurationError, match="no metric to evaluate"):
        make_trainer().evaluate(dataset(), {})


def test_workers_that_evaluate_different_metrics_are_an_error() -> None:
    def work(collective: Collective) -> None:
        make_trainer(collective).evaluate(dataset(), {f"metric {collective.rank}": accuracy})

    with pytest.raises(ConfigurationError, match="call evaluate alike"):
        run_threads(2, work)


def test_a_sample_that_cannot_be_read_is_named() -> None:
    class Faulty(Dataset[Any]):
        def __len__(self) -> int:
            return 20

        def __getitem__(self, index: int) -> Tensor:
            if index == 13:
                raise OSError("the file is cut off")
            return torch.zeros(5)

    with pytest.raises(DataError, match="sample 13") as caught:
        evaluated(2, Faulty(), {"sum": lambda _, batch: (batch.sum(), len(batch))})

    assert caught.value.index == 13


# ---- the model and the generators afterwards ----


def test_the_model_is_in_evaluation_mode_meanwhile_and_as_it_was_afterwards() -> None:
    trainer = make_trainer()
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    modes: set[tuple[bool, bool]] = set()

    def metric(model: nn.Module, batch: list[Tensor]) -> tuple[Tensor, int]:
        modes.add((model.training, torch.is_grad_enabled()))
        return accuracy(model, batch)

    for training in (True, False):
        trainer.model.train(training)
        trainer.evaluate(dataset(), {"accuracy": metric})
        assert trainer.model.training is training

    assert modes == {(False, False)}
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())


def test_a_part_of_the_model_that_was_in_evaluation_mode_stays_there() -> None:
    """A frozen BatchNorm inside a model that trains."""
    trainer = make_trainer()
    trainer.model[1].eval()

    trainer.evaluate(dataset(), {"accuracy": accuracy})

    assert [module.training for module in trainer.model] == [True, False, True, True, True]


def test_the_mode_comes_back_after_an_error_too() -> None:
    trainer = make_trainer()

    def broken(model: nn.Module, batch: list[Tensor]) -> tuple[Tensor, int]:
        raise ArithmeticError("no")

    with pytest.raises(ArithmeticError):
        trainer.evaluate(dataset(), {"broken": broken})

    assert trainer.model.training


def draws() -> list[float]:
    return [torch.rand(()).item(), float(np.random.rand()), random.random()]


def test_what_is_drawn_afterwards_does_not_depend_on_the_workers() -> None:
    found: list[list[float]] = []

    def metric(model: nn.Module, batch: list[Tensor]) -> tuple[Tensor, int]:
        draws()
        return accuracy(model, batch)

    def work(collective: Collective) -> None:
        make_trainer(collective).evaluate(dataset(), {"accuracy": metric})
        found.append(draws())

    for workers in EVERY:
        run_threads(workers, work)

    assert len(found) == sum(EVERY)
    assert all(other == found[0] for other in found)


def test_a_metric_with_randomness_is_the_same_on_every_number_of_workers() -> None:
    def noisy(model: nn.Module, batch: list[Tensor]) -> tuple[float, int]:
        return sum(draws()) + float(batch[0].sum()), len(batch[0])

    alone = evaluated(1, dataset(), {"noisy": noisy})

    assert math.isfinite(alone["noisy"])
    assert all(evaluated(workers, dataset(), {"noisy": noisy}) == alone for workers in EVERY)


def test_evaluation_between_steps_does_not_change_what_is_trained() -> None:
    def work(collective: Collective, *, evaluate: bool) -> list[bytes]:
        trainer = make_trainer(collective)
        for batch in trainer.batches(dataset(), epochs=1):
            trainer.step(batch)
            if evaluate:
                trainer.evaluate(dataset(), {"accuracy": accuracy})
        return [value.numpy().tobytes() for value in trainer.model.state_dict().values()]

    plain = run_threads(2, lambda collective: work(collective, evaluate=False))

    assert run_threads(3, lambda collective: work(collective, evaluate=True))[0] == plain[0] == plain[1]


def test_bf16_evaluates_as_it_trains() -> None:
    kinds: set[torch.dtype] = set()

    def metric(model: nn.Module, batch: list[Tensor]) -> tuple[Tensor, int]:
        output = model(batch[0])
        kinds.add(output.dtype)
        return output.float().sum(), len(batch[0])

    make_trainer(precision="bf16").evaluate(dataset(), {"sum": metric})

    assert kinds == {torch.bfloat16}


def logged(run_dir: Path) -> list[tuple[int, dict[str, float]]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    found = [line for line in lines if line.get("event") == "evaluation"]
    return [(line["step"], {key.removeprefix("metric/"): line[key] for key in line.keys() - {"step", "event"}}) for line in found]


def test_callbacks_and_the_log_are_told_of_each_evaluation(tmp_path: Path) -> None:
    def work(collective: Collective) -> list[tuple[int, dict[str, float]]]:
        callback = small_run.EachEpoch()
        trainer = small_run.make_trainer(collective, run_dir=tmp_path, callbacks=[callback])
        trainer.fit(small_run.Augmented(), 2)
        trainer.evaluate(small_run.Augmented(), {"nothing": lambda model, batch: (math.nan, 1)})
        return callback.told

    told = run_threads(3, work)
    assert repr(told) == repr([told[0]] * 3)
    assert [step for step, _ in told[0]] == [3, 6, 6]
    assert [list(results) for _, results in told[0]] == [["loss"], ["loss"], ["nothing"]]
    assert logged(tmp_path) == [*told[0][:2], (6, {"nothing": "nan"})]


def test_a_run_that_goes_on_logs_each_evaluation_once(tmp_path: Path) -> None:
    def start(step: int | None, workers: int, run_dir: Path) -> None:
        dies = [] if step is None else [lambda: small_run.Dies(step)]
        with contextlib.nullcontext() if step is None else pytest.raises(small_run.Killed):
            small_run.train(workers, run_dir, callbacks=[small_run.EachEpoch, *dies])

    start(None, 1, tmp_path / "whole")
    start(5, 2, tmp_path / "parts")
    start(7, 3, tmp_path / "parts")
    start(None, 1, tmp_path / "parts")
    assert logged(tmp_path / "parts") == logged(tmp_path / "whole")
    assert [step for step, _ in logged(tmp_path / "whole")] == [3, 6, 9]
    before = small_run.tree(tmp_path / "whole")
    small_run.make_trainer(run_dir=tmp_path / "whole").evaluate(small_run.Augmented())
    after = small_run.tree(tmp_path / "whole")
    assert {name for name in after if after[name] != before[name]} == {"summary.json"}  # a finished run's log stays
