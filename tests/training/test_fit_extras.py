"""What every port had to write by hand: validation, the best weights, early stops, so many steps, predictions."""

from __future__ import annotations

import functools
import hashlib
import json
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from tests.fault_injection import Death, run_lives
from tests.memory import empty_memory
from tests.moments import moments
from tests.training.hard_problem import digest
from unisono import Callback, ConfigurationError, StepResult, Summary, Trainer
from unisono.collective import Collective
from unisono.testing import run_threads

SAMPLES, BATCH = 41, 16  # three steps an epoch, the last of nine samples


def data(samples: int = SAMPLES, seed: int = 3) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randn(samples, 5, generator=generator), torch.randint(0, 4, (samples,), generator=generator))


def loss(model: Any, batch: list[Tensor]) -> tuple[Tensor, int]:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="sum"), len(batch[1])


class Patience(Callback):
    """Ends training when the validation's loss has not fallen so many times in a row."""

    def __init__(self, patience: int) -> None:
        self.patience = patience

    def on_evaluate(self, trainer: Trainer, results: Mapping[str, float]) -> None:
        state = trainer.state
        is_better = results["loss"] < state.setdefault("lowest", float("inf"))
        state["lowest"] = min(state["lowest"], results["loss"])
        state["bad"] = 0 if is_better else state.setdefault("bad", 0) + 1
        if state["bad"] == self.patience:
            trainer.finish()


class Killed(Exception):
    """The process is gone."""


class DiesAt(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, trainer: Trainer, result: StepResult) -> None:
        if result.step == self.step:
            raise Killed


def make(run_dir: Any, collective: Collective | None = None, *callbacks: Callback, lr: float = 0.5) -> Trainer:
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(5, 16), nn.LayerNorm(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 4))
    return Trainer(
        model,
        torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9),
        loss,
        batch_size=BATCH,
        microbatches=8,
        run_dir=run_dir,
        checkpoint_every=2,
        callbacks=callbacks,
        collective=collective,
    )


def stop_early(trainer: Trainer) -> Summary:
    return trainer.fit(data(), epochs=40, validation=data(23, seed=5), keep_best="-loss")


def files(run_dir: Path) -> dict[str, bytes]:
    return {name: (run_dir / name).read_bytes() for name in ("model.safetensors", "best.safetensors")}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Summary, dict[str, bytes]]:
    """A run that stops early, on one worker."""
    run_dir = tmp_path_factory.mktemp("alone")
    summary = stop_early(make(run_dir, None, Patience(3)))
    return summary, files(run_dir)


@pytest.mark.parametrize("workers", [2, 3, 5])
def test_an_early_stop_and_the_best_weights_are_the_same_on_every_number_of_workers(
    workers: int, tmp_path: Path, alone: tuple[Summary, dict[str, bytes]]
) -> None:
    found = run_threads(workers, lambda collective: stop_early(make(tmp_path, collective, Patience(3))))

    assert {summary.steps for summary in found} == {alone[0].steps}
    assert 3 < alone[0].steps < 120
    assert files(tmp_path) == alone[1]


def test_the_best_weights_are_those_of_the_lowest_loss(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    seen: list[tuple[float, Tensor]] = []

    class Looks(Callback):
        def on_evaluate(self, trainer: Trainer, results: Mapping[str, float]) -> None:
            seen.append((results["loss"], trainer.model[0].weight.detach().clone()))

    trainer.callbacks = (Looks(),)
    trainer.fit(data(), steps=14, validation=data(23, seed=5), validate_every=2, keep_best="-loss")

    assert len(seen) == 7
    lowest = min(seen, key=lambda pair: pair[0])
    assert lowest is not seen[-1], "the last weights are the best: this shows nothing"
    assert torch.equal(load_file(tmp_path / "best.safetensors")["0.weight"], lowest[1])


@pytest.mark.parametrize("dies_at", [4, 6, 7])
@pytest.mark.parametrize(("before", "after"), [(1, 3), (3, 2)])
def test_an_early_stop_holds_under_a_resume_on_another_number_of_workers(
    dies_at: int, before: int, after: int, tmp_path: Path, alone: tuple[Summary, dict[str, bytes]]
) -> None:
    with pytest.raises(Killed):
        run_threads(before, lambda collective: stop_early(make(tmp_path, collective, Patience(3), DiesAt(dies_at))))
    run_threads(after, lambda collective: stop_early(make(tmp_path, collective, Patience(3))))

    assert files(tmp_path) == alone[1]


def test_a_run_that_has_finished_early_says_so_and_changes_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    first = stop_early(make(tmp_path, None, Patience(3)))
    capfd.readouterr()

    again = run_threads(3, lambda collective: stop_early(make(tmp_path, collective, Patience(3))))[0]

    assert (again.steps, again.weights_sha256, again.finished) == (first.steps, first.weights_sha256, True)
    assert "is finished early" in "".join(capfd.readouterr())


def test_a_loop_of_ones_own_finishes_early_for_good(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    for batch in trainer.batches(data(), epochs=9):
        if trainer.step(batch).step == 4:  # a checkpoint of this step is under way, which does not know it yet
            trainer.finish()

    assert trainer.position.step == 4
    assert json.loads((tmp_path / "summary.json").read_bytes())["finished"]
    assert make(tmp_path).fit(data(), epochs=9).steps == 4


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_so_many_steps_end_in_mid_epoch_and_go_on_from_there(workers: int, tmp_path: Path) -> None:
    whole = make(tmp_path / "whole").fit(data(), epochs=3)
    summary = run_threads(workers, lambda collective: make(tmp_path / "parts", collective).fit(data(), steps=4))[0]
    assert (summary.steps, summary.epochs, summary.finished) == (4, 1, True)
    assert make(tmp_path / "parts").fit(data(), steps=4).weights_sha256 == summary.weights_sha256

    assert make(tmp_path / "parts").fit(data(), steps=9).weights_sha256 == whole.weights_sha256


def ported(link: Any, *, run: str, epochs: int = 40) -> dict[str, str]:
    """A script with an early stop and predictions: what it ends with on a worker."""
    trainer = make(f"memory://{run}", link, Patience(3))
    trainer.fit(data(), epochs, validation=data(23, seed=5), keep_best="-loss")
    outputs = trainer.predict(data(), rows)
    best = fsspec.open(f"memory://{run}/best.safetensors").open().read()
    return {
        "weights": digest(torch.cat([value.flatten().double() for value in trainer.model.state_dict().values()])),
        "best": hashlib.sha256(best).hexdigest(),
        "outputs": digest(outputs["output"]),
        "position": repr(trainer.position),
    }


@pytest.mark.parametrize("victim", [0, 2])
def test_a_death_changes_neither_the_early_stop_nor_the_best_weights_nor_predictions(victim: int) -> None:
    def live(deaths: dict[int, Death]) -> Any:
        try:
            return run_lives(3, functools.partial(ported, run=uuid.uuid4().hex), deaths)
        finally:
            empty_memory()

    alone = ported(None, run=uuid.uuid4().hex)
    calls = live({}).calls[victim]
    for call in [*moments(10, calls - 20, every=29), *range(calls - 20, calls + 1, 3)]:
        lives = live({victim: Death(call)})
        assert {0, 1, 2} - {victim} <= set(lives.results), call
        assert all(found == alone for found in lives.results.values()), call


def test_workers_that_come_later_stop_as_early_and_get_the_predictions() -> None:
    alone = ported(None, run=uuid.uuid4().hex)
    lives = run_lives(2, functools.partial(ported, run=uuid.uuid4().hex), {}, joiners=1)
    empty_memory()

    assert sorted(lives.results) == [0, 1, 2]
    assert lives.calls[2] > 10, "it came too late"
    assert all(found == alone for found in lives.results.values())


def rows(model: Any, batch: list[Tensor]) -> dict[str, Any]:
    output = model(batch[0])
    return {"output": output, "best": (output.argmax(1), batch[1])}


@pytest.mark.parametrize("workers", [1, 2, 3, 5])
def test_predictions_come_in_the_order_of_the_data_on_every_worker(workers: int) -> None:
    whole = data()
    model = make(None).model.eval()
    with torch.no_grad():
        right = torch.cat(
            [model(whole.tensors[0][lo : lo + 2].clone()) for lo in range(0, SAMPLES, 2)]
        )  # 16 samples, 8 microbatches

    for found in run_threads(workers, lambda collective: make(None, collective).predict(whole, rows)):
        assert torch.equal(found["output"], right)
        assert torch.equal(found["best"][0], right.argmax(1))
        assert torch.equal(found["best"][1], whole.tensors[1])


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        (lambda trainer: trainer.fit(data()), "either epochs or steps"),
        (lambda trainer: trainer.fit(data(), 2, steps=3), "either epochs or steps"),
        (lambda trainer: trainer.fit(data(), steps=0), "steps must be 1 or more"),
        (lambda trainer: trainer.fit(data(), 1, keep_best="loss"), "pass validation=dataset"),
        (lambda trainer: trainer.fit(data(), 1, validation=data(), keep_best="accuracy"), "none of the metrics"),
        (lambda trainer: trainer.fit(data(), 1, validation=data(), validate_every=0), "1 or more"),
        (lambda trainer: trainer.fit(data(), 1, validation=data(), keep_best="-loss"), "pass run_dir"),
        (lambda trainer: trainer.predict(data(), lambda model, batch: model(batch[0]).sum()), "a row for each sample"),
        (lambda trainer: trainer.predict(data(), lambda model, batch: "yes"), "a str for 2 samples"),
    ],
)
def test_wrong_use_says_what_to_do(call: Callable[[Trainer], object], complaint: str) -> None:
    with pytest.raises(ConfigurationError, match=complaint):
        call(make(None))
