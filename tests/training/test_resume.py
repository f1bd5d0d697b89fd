"""A run that stops, however, and goes on, on however many workers, ends as the one that never stopped."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

import unisono
from tests.training.small_run import (
    EPOCHS,
    STEPS,
    STEPS_PER_EPOCH,
    Augmented,
    Dies,
    End,
    Killed,
    ending,
    loss,
    make_trainer,
    memory_url,
    train,
    tree,
)
from unisono.checkpoint.fingerprint import fingerprint
from unisono.checkpoint.store import Store
from unisono.collective import Collective
from unisono.errors import CheckpointError, ConfigurationError, FingerprintMismatch
from unisono.testing import run_threads
from unisono.training.run_directory import RunDirectory
from unisono.training.state import State

Make = Callable[[], unisono.Callback]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> End:
    return train(1, tmp_path_factory.mktemp("undisturbed"))


class Hears(unisono.Callback):
    """One worker is asked to stop during the step after ``step``; all of them leave after it."""

    def __init__(self, step: int, rank: int) -> None:
        self.step, self.rank = step, rank

    def on_step(self, trainer: unisono.Trainer, result: unisono.StepResult) -> None:
        if result.step == self.step and trainer.collective.rank == self.rank:
            assert trainer._loop.stop is not None
            trainer._loop.stop.requested = signal.SIGTERM


def disturbed(workers: int, run_dir: Any, error: type[BaseException], make: Make, **settings: Any) -> None:
    with pytest.raises(error):
        train(workers, run_dir, callbacks=[make], **settings)


def newest_step(run_dir: Any) -> int:
    store = Store(run_dir)
    steps = [int(name.removeprefix("step-")) for name in store.list("checkpoints")]
    return max(step for step in steps if store.exists(f"checkpoints/step-{step}/checkpoint.json"))


# ---------------------------------------------------------------------- kinds of stops


@pytest.mark.parametrize(("before", "after"), [(1, 3), (3, 1), (2, 4), (4, 2), (3, 3)])
@pytest.mark.parametrize("step", [2, STEPS_PER_EPOCH, 5, STEPS - 1], ids=lambda step: f"after_{step}")
def test_a_stop_loses_no_step_and_changes_nothing(tmp_path: Path, undisturbed: End, step: int, before: int, after: int) -> None:
    with pytest.raises(SystemExit) as stop:
        train(before, tmp_path, callbacks=[lambda: Hears(step - 1, before - 1)])
    assert stop.value.code == 128 + signal.SIGTERM
    assert newest_step(tmp_path) == step
    assert train(after, tmp_path) == undisturbed


@pytest.mark.parametrize("rank", [None, 0, 1])
@pytest.mark.parametrize(("before", "after"), [(2, 3), (4, 1)])
def test_a_death_in_the_middle_of_an_epoch_changes_nothing(
    tmp_path: Path, undisturbed: End, rank: int | None, before: int, after: int
) -> None:
    disturbed(before, tmp_path, Killed, lambda: Dies(5, rank), checkpoint_every=2)
    assert newest_step(tmp_path) in (2, 4)
    assert train(after, tmp_path, checkpoint_every=2) == undisturbed


def test_a_death_before_the_first_checkpoint_starts_again(tmp_path: Path, undisturbed: End) -> None:
    disturbed(2, tmp_path, Killed, lambda: Dies(2))
    assert train(3, tmp_path) == undisturbed


def test_a_death_at_every_step_changes_nothing(undisturbed: End) -> None:
    url = memory_url()
    for step in range(1, STEPS + 1):
        disturbed(1 + step % 4, url, Killed, lambda step=step: Dies(step), checkpoint_every=1)  # type: ignore[misc]
    assert train(2, url, checkpoint_every=1) == undisturbed


def test_a_model_that_every_worker_updates_goes_on_like_one_with_owners(undisturbed: End) -> None:
    url = memory_url()
    for workers, step, sync in ((3, 2, unisono.Exact()), (2, 4, unisono.Exact(replicate_kib=0)), (4, 6, unisono.Exact())):
        disturbed(workers, url, SystemExit, lambda step=step: Hears(step - 1, 0), sync=sync)  # type: ignore[misc]

    assert train(2, url, sync=unisono.Exact()) == undisturbed


def test_stops_in_every_epoch_on_changing_numbers_of_workers_change_nothing(undisturbed: End) -> None:
    url = memory_url()
    for workers, step in ((2, 2), (3, 4), (1, 6), (4, 8)):
        disturbed(workers, url, SystemExit, lambda workers=workers, step=step: Hears(step - 1, workers // 2))  # type: ignore[misc]
        assert newest_step(url) == step
    assert train(3, url) == undisturbed


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_real_signal_stops_a_lone_worker_after_its_step(
    tmp_path: Path, undisturbed: End, signum: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    class Signalled(unisono.Callback):
        def on_step(self, trainer: unisono.Trainer, result: unisono.StepResult) -> None:
            if result.step == 4:
                os.kill(os.getpid(), signum)

    with pytest.raises(SystemExit) as stop:
        make_trainer(run_dir=tmp_path, callbacks=[Signalled()]).fit(Augmented(), EPOCHS)
    assert stop.value.code == 128 + signum
    assert newest_step(tmp_path) == 5
    assert f"stopped by {signum.name} after step 5" in capsys.readouterr().out
    assert json.loads((tmp_path / "summary.json").read_text())["finished"] is False
    assert train(2, tmp_path) == undisturbed


def test_without_a_run_directory_a_stop_still_ends_with_its_status() -> None:
    with pytest.raises(SystemExit) as stop:
        run_threads(2, lambda c: make_trainer(c, callbacks=[Hears(1, 1)]).fit(Augmented(), EPOCHS))
    assert stop.value.code == 128 + signal.SIGTERM


# ---------------------------------------------------------------------- loops of one's own


def test_a_loop_of_ones_own_ends_as_fit_does(undisturbed: End) -> None:
    url = memory_url()

    def work(collective: Collective) -> unisono.Trainer:
        trainer = make_trainer(collective, run_dir=url)
        for batch in trainer.batches(Augmented(), EPOCHS):
            trainer.step(batch)
        return trainer

    assert ending(run_threads(3, work), url) == undisturbed


def test_after_leaving_the_batches_early_the_next_call_goes_on(undisturbed: End) -> None:
    url = memory_url()

    def work(collective: Collective) -> unisono.Trainer:
        trainer = make_trainer(collective, run_dir=url)
        for last in (1, 5, STEPS):
            for batch in trainer.batches(Augmented(), EPOCHS):
                if trainer.step(batch).step == last:
                    break
        assert list(trainer.batches(Augmented(), EPOCHS)) == []
        return trainer

    assert ending(run_threads(2, work), url) == undisturbed


def test_a_checkpoint_saved_by_hand_is_resumed(undisturbed: End) -> None:
    url = memory_url()

    def work(collective: Collective) -> None:
        trainer = make_trainer(collective, run_dir=url)
        for batch in trainer.batches(Augmented(), EPOCHS):
            step = trainer.step(batch).step
            if step == 2:
                trainer.save()
                trainer.save()  # the first is complete before the second begins
                return

    run_threads(3, work)
    resumed = run_threads(2, lambda c: make_trainer(c, run_dir=url).position.step)
    assert resumed == [2, 2]
    assert train(1, url) == undisturbed


def test_callbacks_hear_of_each_step_and_epoch_once(tmp_path: Path) -> None:
    heard: list[tuple[str, int]] = []

    class Listens(unisono.Callback):
        def on_step(self, trainer: unisono.Trainer, result: unisono.StepResult) -> None:
            heard.append(("step", result.step))

        def on_epoch(self, trainer: unisono.Trainer, epoch: int) -> None:
            heard.append(("epoch", epoch))

    with pytest.raises(SystemExit):
        train(1, tmp_path, callbacks=[Listens, lambda: Hears(3, 0)])
    assert heard == [("step", 1), ("step", 2), ("step", 3), ("epoch", 0), ("step", 4)]
    heard.clear()
    train(1, tmp_path, callbacks=[Listens])
    assert heard == [("step", 5), ("step", 6), ("epoch", 1), ("step", 7), ("step", 8), ("step", 9), ("epoch", 2)]


# ---------------------------------------------------------------------- the end of a run


def test_a_finished_run_says_so_and_changes_nothing(tmp_path: Path, undisturbed: End, capsys: pytest.CaptureFixture[str]) -> None:
    train(2, tmp_path)
    before = tree(tmp_path)
    capsys.readouterr()
    assert train(3, tmp_path) == undisturbed
    text = capsys.readouterr().out
    assert f"is finished ({EPOCHS} epochs, {STEPS} steps): nothing to do" in text
    assert undisturbed.model_file in text

    def loop(collective: Collective) -> None:
        trainer = make_trainer(collective, run_dir=tmp_path)
        assert list(trainer.batches(Augmented(), EPOCHS)) == []

    run_threads(2, loop)
    assert tree(tmp_path) == before


def test_evaluating_a_finished_run_again_changes_nothing(tmp_path: Path) -> None:
    def work(collective: Collective) -> dict[str, float]:
        trainer = make_trainer(collective, run_dir=tmp_path)
        trainer.fit(Augmented(), EPOCHS)
        return trainer.evaluate(Augmented())

    first = run_threads(2, work)
    before = tree(tmp_path)
    assert run_threads(3, work)[0] == first[0]
    assert tree(tmp_path) == before
    assert json.loads((tmp_path / "summary.json").read_text())["metrics"] == first[0]


def test_a_stop_in_the_very_last_step_still_leads_to_the_weights(tmp_path: Path, undisturbed: End) -> None:
    disturbed(2, tmp_path, SystemExit, lambda: Hears(STEPS - 1, 1))
    assert newest_step(tmp_path) == STEPS
    assert train(3, tmp_path) == undisturbed
    assert json.loads((tmp_path / "summary.json").read_text())["finished"] is True


@pytest.mark.parametrize("missing", [["model.safetensors"], ["summary.json"], ["model.safetensors", "summary.json"]])
@pytest.mark.parametrize("own_loop", [False, True])
def test_a_death_between_the_last_checkpoint_and_the_weights_loses_neither(
    tmp_path: Path, undisturbed: End, missing: list[str], own_loop: bool
) -> None:
    train(2, tmp_path)
    for name in missing:
        (tmp_path / name).unlink()

    def work(collective: Collective) -> unisono.Trainer:
        trainer = make_trainer(collective, run_dir=tmp_path)
        if own_loop:
            assert list(trainer.batches(Augmented(), EPOCHS)) == []
        else:
            trainer.fit(Augmented(), EPOCHS)
        return trainer

    assert ending(run_threads(1, work), tmp_path) == undisturbed
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["steps"], summary["finished"], summary["weights_sha256"]) == (STEPS, True, undisturbed.model_file)


@pytest.mark.parametrize("same_trainer", [False, True])
def test_training_longer_goes_on(undisturbed: End, same_trainer: bool) -> None:
    url = memory_url()

    def work(collective: Collective) -> unisono.Trainer:
        trainer = make_trainer(collective, run_dir=url)
        for epochs in (1, EPOCHS):
            trainer.fit(Augmented(), epochs)
            if not same_trainer:
                trainer = make_trainer(collective, run_dir=url)
        return trainer

    assert ending(run_threads(2, work), url) == undisturbed


def test_the_model_file_is_that_of_the_last_epoch_asked_for(tmp_path: Path, undisturbed: End) -> None:
    shorter = train(2, tmp_path, epochs=2)
    assert shorter.model_file != undisturbed.model_file
    assert train(1, tmp_path) == undisturbed
    before = tree(tmp_path)
    train(2, tmp_path, epochs=2)  # more than that is done: nothing to do
    assert tree(tmp_path) == before


# ---------------------------------------------------------------------- the log


def test_lines_of_steps_in_a_checkpoint_are_on_disk_when_it_is(tmp_path: Path) -> None:
    seen: set[int] = set()

    class Looks(unisono.Callback):
        def on_step(self, trainer: unisono.Trainer, result: unisono.StepResult) -> None:
            if list(tmp_path.glob("checkpoints/step-*/checkpoint.json")):
                newest = newest_step(tmp_path)
                seen.add(newest)
                lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
                assert [json.loads(line)["step"] for line in lines[:newest]] == list(range(1, newest + 1))

    train(2, tmp_path, callbacks=[Looks], checkpoint_every=2)
    assert len(seen) > 1


# ---------------------------------------------------------------------- damage


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink], ids=["truncated", "flipped", "missing"])
@pytest.mark.parametrize("file", ["model.safetensors", "optimizer-1.safetensors", "trainer.json", "checkpoint.json"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_leads_to_the_same_end(
    tmp_path: Path, undisturbed: End, file: str, damage: Callable[[Path], None]
) -> None:
    disturbed(2, tmp_path, SystemExit, lambda: Hears(5, 0), checkpoint_every=4)
    assert newest_step(tmp_path) == 6
    damage(tmp_path / "checkpoints" / "step-6" / file)
    # Without its last file a checkpoint looks like one that was never completed.
    named = (
        contextlib.nullcontext()
        if (file, damage) == ("checkpoint.json", Path.unlink)
        else pytest.warns(UserWarning, match="is damaged")
    )
    with named as warned:
        assert train(3, tmp_path, checkpoint_every=4) == undisturbed
    if warned is not None:
        [warning] = list(warned)
        assert "the checkpoint of step 6 is damaged, the checkpoint of step 4 is used instead" in str(warning.message)
        assert f"step-6/{file}" in str(warning.message)


def test_if_all_checkpoints_are_damaged_training_does_not_silently_start_again(tmp_path: Path) -> None:
    disturbed(2, tmp_path, SystemExit, lambda: Hears(5, 0), checkpoint_every=4)
    for step in (4, 6):
        flip(tmp_path / "checkpoints" / f"step-{step}" / "model.safetensors")
    before = tree(tmp_path)
    pieces = (
        "every checkpoint in",
        "step-4/model.safetensors",
        "step-6/model.safetensors",
        "remove the checkpoints folder to start from the beginning",
    )
    every_worker_raises(3, CheckpointError, pieces, run_dir=tmp_path)
    assert tree(tmp_path) == before


def every_worker_raises(workers: int, kind: type[Exception], pieces: Sequence[str], **settings: Any) -> None:
    """Making a trainer raises that error on each worker by itself, and its message holds all pieces."""
    raised: list[str] = []

    def work(collective: Collective) -> None:
        with pytest.raises(kind) as error:
            make_trainer(collective, **settings)
        raised.append(str(error.value))

    run_threads(workers, work)
    assert len(raised) == workers
    assert [piece for piece in pieces for message in raised if piece not in message] == []


# ---------------------------------------------------------------------- another run, other data, another ground


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that stopped after step 5, in the middle of its second epoch."""
    folder = tmp_path_factory.mktemp("stopped")
    disturbed(2, folder, SystemExit, lambda: Hears(4, 0))
    return folder


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"seed": 7}, "seed: 0 there, 7 here"),
        ({"batch_size": 16}, "batch_size: 12 there, 16 here"),
        ({"microbatches": 6}, "microbatches: 4 there, 6 here"),
        ({"max_grad_norm": None}, "max_grad_norm: 1.0 there, null here"),
        ({"precision": "bf16"}, 'precision: "fp32" there, "bf16" here'),
        ({"lr": 0.5}, "lr: 0.02 there, 0.5 here"),
        ({"width": 9}, "last.weight: "),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("workers", [1, 3])
def test_other_settings_are_refused_with_what_differs(stopped: Path, workers: int, settings: dict[str, Any], named: str) -> None:
    before = tree(stopped)
    pieces = (
        f"run_dir {str(stopped)!r} holds another run",
        named,
        "Choose another run_dir, or restore these settings",
    )
    every_worker_raises(workers, ConfigurationError, pieces, run_dir=stopped, **settings)
    assert tree(stopped) == before


def test_only_what_differs_is_named(stopped: Path) -> None:
    with pytest.raises(ConfigurationError) as error:
        make_trainer(run_dir=stopped, lr=0.5, seed=2)
    text = str(error.value)
    assert re.search(r"seed: 0 there, 2 here; .*lr: 0.02 there, 0.5 here", text)
    assert "betas" not in text
    assert "batch_size" not in text


def test_other_data_in_the_middle_of_an_epoch_is_refused(stopped: Path) -> None:
    def work(collective: Collective) -> None:
        trainer = make_trainer(collective, run_dir=stopped)
        with pytest.raises(ConfigurationError, match=r"in the middle of epoch 2 on other data.*32.*31.*choose another run_dir"):
            trainer.fit(Augmented(31), EPOCHS)
        with pytest.raises(ConfigurationError, match=r"shuffle.*sequential"):
            trainer.batches(Augmented(), EPOCHS, order="sequential")

    run_threads(2, work)


def test_between_epochs_the_data_may_grow(tmp_path: Path) -> None:
    train(2, tmp_path, epochs=1)
    ends = []
    for workers in (1, 3):
        trainers = run_threads(workers, lambda c: make_trainer(c, run_dir=tmp_path))
        ends.append(trainers[0].position.step)
    assert ends == [3, 3]

    def work(collective: Collective) -> int:
        trainer = make_trainer(collective, run_dir=tmp_path)
        trainer.fit(Augmented(48), 2)
        return trainer.position.samples

    with pytest.warns(UserWarning, match="trained on other data so far .*'samples': 32.* than those given now .*'samples': 48"):
        assert run_threads(2, work) == [32 + 48] * 2


@pytest.mark.parametrize("stop_after", [3, 5])
def test_a_script_that_goes_on_with_other_data_can_be_stopped_anywhere(tmp_path: Path, stop_after: int) -> None:
    def work(stop: int | None, run_dir: Path) -> unisono.Trainer:
        trainer = make_trainer(run_dir=run_dir, checkpoint_every=1)
        for data, epochs in ((Augmented(), 1), (Augmented(48), 2)):
            for batch in trainer.batches(data, epochs):
                trainer.step(batch)
                if trainer.position.step == stop:
                    return trainer
        return trainer

    whole = work(None, tmp_path / "whole")
    assert work(stop_after, tmp_path / "parts").position.step == stop_after
    parts = work(None, tmp_path / "parts")
    assert parts.position == whole.position
    for name, value in whole.model.state_dict().items():
        assert torch.equal(parts.model.state_dict()[name], value), name


@pytest.fixture
def other_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unisono.training.trainer.fingerprint", lambda **given: {**fingerprint(**given), "torch": "9.9.9"})


@pytest.mark.usefixtures("other_build")
@pytest.mark.parametrize("workers", [1, 3])
def test_another_build_is_an_error_with_strict(stopped: Path, workers: int) -> None:
    pieces = (
        f"torch: {torch.__version__} at the checkpoint, 9.9.9 now",
        "resume with strict=False",
    )
    every_worker_raises(workers, FingerprintMismatch, pieces, run_dir=stopped, strict=True)


@pytest.mark.usefixtures("other_build")
def test_another_build_is_a_single_warning_without_strict(stopped: Path) -> None:
    with pytest.warns(UserWarning, match=r"torch: .* at the checkpoint, 9\.9\.9 now") as warned:
        steps = run_threads(3, lambda c: make_trainer(c, run_dir=stopped).position.step)
    assert steps == [5] * 3
    assert len(warned) == 1


# ---------------------------------------------------------------------- every scheduler, every optimizer


def _groups(model: nn.Module) -> Iterator[nn.Parameter]:
    return (parameter for parameter in model.parameters() if parameter.requires_grad)


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 2, 5]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 5),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, total_iters=6),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.8),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 8),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 4),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.001, 0.02, step_size_up=3),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.05, total_steps=STEPS + 1),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.CosineAnnealingLR(o, 5)], [4]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, 3), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, cooldown=1),
}
OPTIMIZERS: dict[str, Callable[[Iterator[nn.Parameter]], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, 0.05),
    "SGD with momentum": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True),
    "Adam with amsgrad": lambda p: torch.optim.Adam(p, 0.01, amsgrad=True),
    "Adam with a tensor rate": lambda p: torch.optim.Adam(p, torch.tensor(0.01)),
    "fused AdamW": lambda p: torch.optim.AdamW(p, 0.01, fused=True),
    "Adadelta": lambda p: torch.optim.Adadelta(p),
    "Adafactor": lambda p: torch.optim.Adafactor(p),
    "Adagrad": lambda p: torch.optim.Adagrad(p, 0.02),
    "Adamax": lambda p: torch.optim.Adamax(p),
    "ASGD": lambda p: torch.optim.ASGD(p, t0=2),
    "NAdam": lambda p: torch.optim.NAdam(p, 0.01),
    "RAdam": lambda p: torch.optim.RAdam(p, 0.01),
    "RMSprop": lambda p: torch.optim.RMSprop(p, momentum=0.5, centered=True),
    "Rprop": lambda p: torch.optim.Rprop(p),
}
Setup = tuple[Callable[[Iterator[nn.Parameter]], torch.optim.Optimizer], Callable[[torch.optim.Optimizer], Any] | None]


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.last(torch.tanh(self.first(x)))
        return output


def plain_run(workers: int, url: str | None, setup: Setup, *, until: int = STEPS) -> list[tuple[dict[str, bytes], str]]:
    def work(collective: Collective) -> tuple[dict[str, bytes], str]:
        torch.manual_seed(5)
        model = Plain()
        optimizer = setup[0](model.parameters())
        scheduler = setup[1](optimizer) if setup[1] else None
        trainer = unisono.Trainer(
            model, optimizer, loss, batch_size=12, microbatches=4, run_dir=url, scheduler=scheduler, collective=collective
        )
        for batch in trainer.batches(Augmented(), EPOCHS):
            if trainer.step(batch).step == until < STEPS:
                trainer.save()
                trainer.save()
                break
        weights = {name: parameter.detach().numpy().tobytes() for name, parameter in model.named_parameters()}
        return weights, repr([group["lr"] for group in optimizer.param_groups])

    return run_threads(workers, work)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_goes_on_where_it_was(name: str) -> None:
    setup: Setup = (lambda p: torch.optim.SGD(p, 0.05, momentum=0.9), SCHEDULERS[name])
    url = memory_url()
    plain_run(2, url, setup, until=4)
    assert plain_run(1, url, setup) == plain_run(1, None, setup)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_goes_on_where_it_was(name: str) -> None:
    setup: Setup = (OPTIMIZERS[name], None)
    url = memory_url()
    plain_run(3, url, setup, until=4)
    [end] = plain_run(1, None, setup)
    assert plain_run(2, url, setup) == [end, end]


def test_a_checkpoint_of_an_earlier_version_is_resumed(tmp_path: Path, undisturbed: End, monkeypatch: pytest.MonkeyPatch) -> None:
    """It knows neither the user's own state, nor modes, nor strides, nor what the data were."""
    common, save = State.common, RunDirectory.save

    def earlier_common(state: State) -> dict[str, Any]:
        return {name: value for name, value in common(state).items() if name not in ("user", "modes", "strides")}

    def earlier_save(directory: RunDirectory, step: int, *, info: dict[str, Any], **parts: Any) -> None:
        save(directory, step, info={name: value for name, value in info.items() if name not in ("identity", "seeded")}, **parts)

    with monkeypatch.context() as earlier:
        earlier.setattr(State, "common", earlier_common)
        earlier.setattr(RunDirectory, "save", earlier_save)
        with pytest.raises(SystemExit):
            train(2, tmp_path, callbacks=[lambda: Hears(4, 1)])
    assert train(3, tmp_path) == undisturbed
