from __future__ import annotations

import contextlib
import hashlib
import json
import math
import re
import runpy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

from tests.integrations.transformers_tasks import TASKS, Samples, Task, tokenizer
from tests.launch.conftest import Launcher
from tests.launch.warm import warm_parent
from unisono.collective import Collective
from unisono.errors import ConfigurationError
from unisono.integrations import transformers as ours
from unisono.system.fork_server import is_possible
from unisono.testing import run_threads

DOCUMENT = Path(__file__).parents[2] / "docs" / "integrations.md"
CLASSES = TASKS["sequence classification"]

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


def arguments(kind: Any = ours.TrainingArguments, folder: Path | str = "unused", **more: Any) -> Any:
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_steps": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "warmup_steps": 1,
        "max_grad_norm": 0.5,
        "log_level": "error",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return kind(str(folder), **{**settings, **more})


def made(
    task: Task,
    collective: Collective | None = None,
    kind: Any = ours.Trainer,
    *,
    dropout: float = 0.1,
    parts: dict[str, Any] | None = None,
    **more: Any,
) -> Any:
    """A trainer of ours for a worker, or one of transformers.

    Args:
        parts: Further arguments of its constructor.
        more: Arguments in `TrainingArguments`.
    """
    mine = issubclass(kind, ours.Trainer)
    words = tokenizer()
    args = arguments(ours.TrainingArguments if mine else transformers.TrainingArguments, **more)
    given = {"train_dataset": task.data(), "data_collator": task.collator(words), "processing_class": words, **(parts or {})}
    if mine:
        given = {"unisono": {"collective": collective}, **given}
    return kind(**{"model": task.make(dropout), "args": args, **given})


def trained(workers: int, make: Callable[[Collective], Any]) -> list[Any]:
    """Every worker's trainer, after its training."""

    def work(collective: Collective) -> Any:
        trainer = make(collective)
        trainer.train()
        assert trainer.exact.collective.size == workers
        return trainer

    return run_threads(workers, work)


def digest(model: nn.Module) -> str:
    return hashlib.sha256(b"".join(value.numpy().tobytes() for value in model.state_dict().values())).hexdigest()


def series(trainer: Any, name: str) -> list[float]:
    return [line[name] for line in trainer.state.log_history if name in line]


def log(trainer: Any) -> list[dict[str, Any]]:
    """What was logged, without times."""
    return [{k: v for k, v in line.items() if not k.endswith(("_runtime", "_per_second"))} for line in trainer.state.log_history]


# ---- as transformers trains, and the same on any number of workers


@pytest.mark.parametrize("name", [name for name, task in TASKS.items() if not task.is_random])
def test_losses_gradients_and_rates_are_those_of_transformers_over_whole_batches(name: str) -> None:
    task, same = TASKS[name], {"dropout": 0.0, "train_sampling_strategy": "sequential", "lr_scheduler_type": "cosine"}
    theirs = made(task, kind=transformers.Trainer, per_device_train_batch_size=8, gradient_accumulation_steps=1, **same)
    theirs.train()
    (mine,) = trained(1, lambda collective: made(task, collective, **same))
    for key in ("loss", "grad_norm", "learning_rate", "epoch", "train_loss"):
        assert series(mine, key) == pytest.approx(series(theirs, key), rel=2e-6), key
    assert [set(line) for line in mine.state.log_history] == [set(line) for line in theirs.state.log_history]


@pytest.mark.parametrize("name", TASKS)
def test_weights_are_the_same_on_any_number_of_workers(name: str) -> None:
    worlds = (1, 2, 3, 5) if name == "causal language model" else (1, 3)
    digests = {digest(one.model) for workers in worlds for one in trained(workers, lambda c: made(TASKS[name], c, max_steps=3))}
    assert len(digests) == 1


@pytest.mark.parametrize(
    "more",
    [
        {"bf16": True},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {"label_smoothing_factor": 0.2},
        {"neftune_noise_alpha": 5.0},
        {"train_sampling_strategy": "group_by_length", "data_seed": 3},
    ],
    ids=lambda more: next(iter(more)),
)
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_settings_that_change_the_step_keep_the_bits(more: dict[str, Any]) -> None:
    task = TASKS["causal language model"]

    def digests(**settings: Any) -> set[str]:
        return {digest(one.model) for w in (1, 3) for one in trained(w, lambda c: made(task, c, max_steps=3, **settings))}

    changed = digests(**more)
    assert len(changed) == 1
    assert (changed == digests()) == ("gradient_checkpointing" in more)  # which changes memory alone


def test_label_smoothing_is_normalised_as_in_transformers() -> None:
    same = {"dropout": 0.0, "train_sampling_strategy": "sequential", "label_smoothing_factor": 0.2}
    task = TASKS["causal language model"]
    theirs = made(task, kind=transformers.Trainer, **same)
    theirs.train()
    (mine,) = trained(1, lambda collective: made(task, collective, **same))
    assert series(mine, "loss") == pytest.approx(series(theirs, "loss"), rel=2e-6)


def test_the_batch_does_not_grow_with_the_workers_and_microbatches_follow_accumulation() -> None:
    for each, accumulated, expected in ((4, 2, 8), (2, 3, 6), (4, 3, 9), (16, 1, 8)):
        sizes = {"per_device_train_batch_size": each, "gradient_accumulation_steps": accumulated, "max_steps": 1}
        for one in trained(2, lambda c: made(CLASSES, c, **sizes)):  # noqa: B023 - called at once
            assert (one.exact.batch_size, one.exact.microbatches) == (each * accumulated, expected)
    (own,) = trained(1, lambda c: made(CLASSES, c, max_steps=1, parts={"unisono": {"collective": c, "microbatches": 4}}))
    assert own.exact.microbatches == 4


def test_a_data_seed_changes_the_order_alone() -> None:
    first, other, again = (
        trained(1, lambda c: made(CLASSES, c, dropout=0.0, max_steps=2, data_seed=seed))[0]  # noqa: B023
        for seed in (None, 5, 5)
    )
    assert series(first, "loss") != series(other, "loss") == series(again, "loss")


def test_a_loss_of_ones_own_and_an_optimizer_of_ones_own_are_used() -> None:
    def loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | None = None) -> Tensor:
        total = nn.functional.cross_entropy(outputs["logits"], labels, reduction="sum")
        return total / (len(labels) if num_items_in_batch is None else num_items_in_batch)

    def make(collective: Collective | None, kind: Any) -> Any:
        model = CLASSES.make()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        parts = {"compute_loss_func": loss, "optimizers": (optimizer, schedule), "model": model}
        return made(CLASSES, collective, kind, parts=parts, dropout=0.0, train_sampling_strategy="sequential")

    theirs = make(None, transformers.Trainer)
    theirs.train()
    (mine,) = trained(1, lambda collective: make(collective, ours.Trainer))
    assert series(mine, "loss") == pytest.approx(series(theirs, "loss"), rel=2e-6)
    assert series(mine, "learning_rate") == [0.5, 0.25, 0.5 / 3, 0.125]


# ---- evaluation, prediction, the best model


def correct(prediction: Any) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def test_evaluation_and_prediction_are_those_of_transformers_on_any_number_of_workers() -> None:
    task = TASKS["token classification"]

    def count(prediction: Any) -> dict[str, float]:
        assert prediction.predictions.shape[:2] == prediction.label_ids.shape == prediction.inputs.shape
        return {"right": float((prediction.predictions.argmax(-1) == prediction.label_ids).sum())}

    parts = {"eval_dataset": task.data(10, seed=1), "compute_metrics": count}
    more = {"per_device_eval_batch_size": 4, "include_for_metrics": ["inputs"]}
    theirs = made(task, kind=transformers.Trainer, parts=parts, **more)
    expected, predicted = theirs.evaluate(), theirs.predict(task.data(10, seed=1))
    found: list[Any] = []
    for workers in (1, 3):
        for one in run_threads(workers, lambda c: made(task, c, parts=parts, **more) and _measured(task, c, parts, more)):
            found.append(one)
    for results, prediction in found:
        assert results["eval_right"] == expected["eval_right"]
        assert set(results) == set(expected) - {"eval_model_preparation_time"}
        np.testing.assert_allclose(prediction.predictions, predicted.predictions, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(prediction.label_ids, predicted.label_ids)
        assert results["eval_loss"] == found[0][0]["eval_loss"]
        assert prediction.predictions.tobytes() == found[0][1].predictions.tobytes()
    labels = predicted.label_ids
    rows = torch.tensor(predicted.predictions)[torch.tensor(labels) != -100]
    exact = nn.functional.cross_entropy(rows, torch.tensor(labels[labels != -100]))
    assert found[0][0]["eval_loss"] == pytest.approx(exact.item(), rel=1e-6)


def _measured(task: Task, collective: Collective, parts: dict[str, Any], more: dict[str, Any]) -> Any:
    trainer = made(task, collective, parts=parts, **more)
    return trainer.evaluate(), trainer.predict(task.data(10, seed=1))


def test_sequences_are_generated_as_in_transformers_on_any_number_of_workers() -> None:
    task, words = TASKS["sequence to sequence"], tokenizer()
    more = {"predict_with_generate": True, "generation_max_length": 6, "max_steps": 2, "per_device_eval_batch_size": 3}
    given = {"data_collator": task.collator(words), "train_dataset": task.data()}

    def work(collective: Collective) -> tuple[Any, nn.Module]:
        args = arguments(ours.Seq2SeqTrainingArguments, **more)
        trainer = ours.Seq2SeqTrainer(task.make(), args, unisono={"collective": collective}, **given)
        trainer.train()
        return trainer.predict(task.data(7, seed=1)).predictions, trainer.model

    found = [one for workers in (1, 3) for one in run_threads(workers, work)]
    args = arguments(transformers.Seq2SeqTrainingArguments, **more)
    expected = transformers.Seq2SeqTrainer(found[0][1], args, **given).predict(task.data(7, seed=1)).predictions
    assert len(expected) == 7
    assert all(np.array_equal(predictions, expected) for predictions, _ in found)


class Patience(transformers.EarlyStoppingCallback):
    """transformers' own."""


def test_the_best_model_is_loaded_and_training_stops_early_as_in_transformers(tmp_path: Path) -> None:
    def make(collective: Collective | None, kind: Any, folder: Path) -> Any:
        parts = {
            "eval_dataset": CLASSES.data(9, seed=1),
            "callbacks": [Patience(early_stopping_patience=2)],
            "compute_metrics": correct,
        }
        more = {
            "max_steps": 12,
            "eval_strategy": "steps",
            "eval_steps": 1,
            "save_strategy": "steps",
            "save_steps": 1,
            "load_best_model_at_end": True,
            "metric_for_best_model": "loss",
            "save_total_limit": 2,
            "train_sampling_strategy": "sequential",
            "per_device_eval_batch_size": 9,
            "logging_strategy": "no",
            "folder": folder,
        }
        if kind is transformers.Trainer:
            more |= {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
        return made(CLASSES, collective, kind, parts=parts, dropout=0.0, **more)

    theirs = make(None, transformers.Trainer, tmp_path / "theirs")
    theirs.train()
    best = theirs.state.best_global_step
    assert 0 < best < theirs.state.global_step < 12
    for workers in (1, 3):
        folder = tmp_path / str(workers)
        for one in trained(workers, lambda c: make(c, ours.Trainer, folder)):  # noqa: B023
            assert (one.state.global_step, one.state.best_global_step) == (theirs.state.global_step, best)
            assert series(one, "eval_loss") == pytest.approx(series(theirs, "eval_loss"), rel=1e-5)
            saved = transformers.BertForSequenceClassification.from_pretrained(folder / f"checkpoint-{best}")
            assert digest(saved) == digest(one.model)
        assert sorted(path.name for path in folder.glob("checkpoint-*")) == sorted(
            f"checkpoint-{step}" for step in (best, theirs.state.global_step)
        )
        summary = json.loads((folder / "unisono/summary.json").read_text())
        assert (summary["steps"], summary["finished"]) == (theirs.state.global_step, True)


def test_a_schedule_that_follows_a_metric_is_stepped_after_evaluations(tmp_path: Path) -> None:
    def make(collective: Collective | None, folder: Path, steps: int, kind: Any = ours.Trainer) -> Any:
        return made(
            CLASSES,
            collective,
            kind,
            parts={"eval_dataset": CLASSES.data(9, seed=1)},
            lr_scheduler_type="reduce_lr_on_plateau",
            lr_scheduler_kwargs={"patience": 0, "factor": 0.5, "threshold": 10.0},
            eval_strategy="steps",
            eval_steps=1,
            save_strategy="steps",
            save_steps=1,
            max_steps=steps,
            folder=folder,
        )

    (whole,) = trained(1, lambda c: make(c, tmp_path / "whole", 5))
    theirs = make(None, tmp_path / "theirs", 5, transformers.Trainer)
    theirs.train()
    assert len(set(series(theirs, "learning_rate"))) > 3
    assert series(whole, "learning_rate") == series(theirs, "learning_rate")
    trained(2, lambda c: make(c, tmp_path / "parts", 3))
    for one in trained(3, lambda c: make(c, tmp_path / "parts", 5)):
        assert series(one, "learning_rate") == series(whole, "learning_rate")
        assert digest(one.model) == digest(whole.model)


# ---- stops, resume, callbacks


class Stop(transformers.TrainerCallback):  # type: ignore[misc]
    """As SIGTERM does, after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


class Noted(transformers.TrainerCallback):  # type: ignore[misc]
    """Every event, with the step at which it came."""

    def __init__(self) -> None:
        self.events: list[str] = []


def _noting(event: str) -> Any:
    def note(self: Noted, args: Any, state: Any, control: Any, **others: Any) -> None:
        assert others["model"] is not None
        self.events.append(f"{event} {state.global_step} {state.epoch:.2f}")

    return note


for _event in ["train_begin", "train_end", "epoch_begin", "epoch_end", "step_begin", "step_end", "log", "evaluate", "save"]:
    setattr(Noted, f"on_{_event}", _noting(_event))


def test_callbacks_see_what_they_see_in_transformers(tmp_path: Path) -> None:
    def make(collective: Collective | None, kind: Any) -> tuple[Any, Noted]:
        noted = Noted()
        parts = {"callbacks": [noted], "eval_dataset": CLASSES.data(9, seed=1)}
        more = {"max_steps": 5, "logging_steps": 2, "eval_strategy": "epoch", "save_strategy": "steps", "save_steps": 2}
        return made(CLASSES, collective, kind, parts=parts, folder=tmp_path / kind.__name__, **more), noted

    theirs, expected = make(None, transformers.Trainer)
    theirs.train()

    def work(collective: Collective) -> list[str]:
        trainer, noted = make(collective, ours.Trainer)
        trainer.train()
        return noted.events

    for seen in run_threads(2, work):
        # Parts of an epoch are counted in global batches, where transformers counts its own.
        assert [event.rsplit(" ", 1)[0] for event in seen] == [event.rsplit(" ", 1)[0] for event in expected.events]
        assert {event.rsplit(" ", 1)[1] for event in seen} <= {event.rsplit(" ", 1)[1] for event in expected.events}


def test_a_run_goes_on_on_another_number_of_workers_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    def make(collective: Collective, folder: Path, *callbacks: Any) -> Any:
        parts = {"eval_dataset": CLASSES.data(9, seed=1), "callbacks": [*callbacks]}
        more = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2, "max_steps": 7}
        return made(CLASSES, collective, parts=parts, logging_steps=3, folder=folder, **more)

    (whole,) = trained(1, lambda c: make(c, tmp_path / "whole"))
    folder = tmp_path / "parts"
    for workers, step in ((3, 3), (1, 5)):
        with pytest.raises(KeyboardInterrupt):
            trained(workers, lambda c: make(c, folder, Stop(step)))  # noqa: B023

    def go_on(collective: Collective) -> Any:
        trainer = make(collective, folder)
        trainer.train(resume_from_checkpoint=True)
        return trainer

    for one in run_threads(2, go_on):
        assert digest(one.model) == digest(whole.model)
        assert log(one) == log(whole)
    model = (folder / "unisono/model.safetensors").read_bytes()
    assert model == (tmp_path / "whole/unisono/model.safetensors").read_bytes()

    (finished,) = run_threads(1, go_on)  # which trains no further, and says the same
    assert digest(finished.model) == digest(whole.model)
    assert log(finished) == log(whole)


def test_a_checkpoint_that_the_run_does_not_go_on_from_is_refused(tmp_path: Path) -> None:
    def make(collective: Collective, folder: Path) -> Any:
        return made(CLASSES, collective, save_strategy="steps", save_steps=2, folder=folder)

    trained(1, lambda c: make(c, tmp_path / "ours"))
    with pytest.raises(ConfigurationError, match=r"goes on from its newest checkpoint, after .*checkpoint-4: pass True"):
        run_threads(1, lambda c: make(c, tmp_path / "ours").train(resume_from_checkpoint=str(tmp_path / "ours/checkpoint-2")))
    made(CLASSES, kind=transformers.Trainer, save_strategy="steps", save_steps=2, folder=tmp_path / "theirs").train()
    with pytest.raises(ConfigurationError, match=r"weights only. Load them with from_pretrained"):
        run_threads(1, lambda c: make(c, tmp_path / "theirs").train(resume_from_checkpoint=True))


# ---- what cannot be kept


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"fp16": True}, "fp16=True.* use bf16=True"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size=True.*would depend on the machine"),
        ({"batch_eval_metrics": True}, "batch_eval_metrics=True"),
        ({"include_num_input_tokens_seen": "all"}, "include_num_input_tokens_seen='all'.*'no'"),
        ({"train_sampling_strategy": "batch_rebalance"}, "batch_rebalance.*use 'group_by_length'"),
        ({"save_on_each_node": True}, "save_on_each_node=True"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_arguments_that_cannot_be_kept_are_refused_by_name(more: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        made(CLASSES, **more)


def test_methods_callbacks_and_data_that_are_not_reached_are_refused_by_name() -> None:
    class Stepping(ours.Trainer):
        def training_step(self, *args: Any) -> Any:
            raise AssertionError

    class Watching(transformers.TrainerCallback):  # type: ignore[misc]
        def on_optimizer_step(self, *args: Any, **others: Any) -> None:
            raise AssertionError

    class Endless(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            raise AssertionError

    class Hasty(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            control.should_epoch_stop = True

    with pytest.raises(ConfigurationError, match=r"Stepping overrides training_step, .*override compute_loss"):
        made(CLASSES, kind=Stepping)
    with pytest.raises(ConfigurationError, match=r"Watching has on_optimizer_step"):
        made(CLASSES, parts={"callbacks": [Watching()]}).train()
    late = made(CLASSES, parts={"eval_dataset": CLASSES.data(4)})
    late.evaluate()
    late.add_callback(Watching)
    with pytest.raises(ConfigurationError, match=r"Watching has on_optimizer_step"):
        late.train()
    with pytest.raises(ConfigurationError, match=r"Endless is not a map-style dataset"):
        made(CLASSES, parts={"train_dataset": Endless()}).train()
    with pytest.raises(ConfigurationError, match=r"Set control.should_training_stop"):
        made(CLASSES, parts={"callbacks": [Hasty()]}).train()
    with pytest.raises(ConfigurationError, match=r"leaves 5 batches of 4 samples"):
        made(CLASSES, dataloader_drop_last=True).train()
    with pytest.raises(ConfigurationError, match=r"needs data"):
        made(CLASSES, parts={"train_dataset": None}).train()


def test_labels_that_are_all_ignored_weigh_nothing() -> None:
    def describe(generator: torch.Generator, n: int) -> dict[str, Any]:
        return {"input_ids": [3, 4, 5], "labels": [-100, 1, 2] if n < 3 else [-100] * 3}

    data, task = Samples(describe, 8), TASKS["token classification"]
    same = {"dropout": 0.0, "train_sampling_strategy": "sequential", "max_steps": 1, "parts": {"train_dataset": data}}
    theirs = made(task, kind=transformers.Trainer, per_device_train_batch_size=8, gradient_accumulation_steps=1, **same)
    theirs.train()
    (mine,) = trained(1, lambda c: made(task, c, **same))
    assert math.isfinite(series(mine, "loss")[0])
    assert series(mine, "loss") == pytest.approx(series(theirs, "loss"), rel=2e-6)


# ---- the script of the documentation


KILL = """
    class Kill(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **others):
            if state.global_step == 9 and os.environ["LOCAL_RANK"] == "1" and not os.path.exists("killed"):
                open("killed", "w").close()
                os.kill(os.getpid(), signal.SIGKILL)

    trainer.add_callback(Kill())
    trainer.train()
"""


@pytest.fixture
def launcher(tmp_path: Path) -> Iterator[Launcher]:
    """Forks from a process that has imported transformers, which takes every worker seconds."""
    with contextlib.ExitStack() as stack:
        source = stack.enter_context(warm_parent("unisono.integrations.transformers")) if is_possible() else None
        yield stack.enter_context(contextlib.closing(Launcher(tmp_path, source)))


def test_the_documented_script_keeps_its_digest_when_a_worker_is_killed(
    launcher: Launcher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = re.findall(r"```python\n(import torch\n.*?)```", DOCUMENT.read_text(), flags=re.DOTALL)
    assert len(code) == 1
    (tmp_path / "alone.py").write_text(code[0])
    alone = tmp_path / "alone"
    alone.mkdir()
    monkeypatch.chdir(alone)
    runpy.run_path(str(tmp_path / "alone.py"), run_name="__main__")
    said = capsys.readouterr().out
    script = code[0].replace("    trainer.train()\n", KILL)
    assert script != code[0]
    launch = launcher.run(script, workers=3)
    status, out, err = launch.finish()
    assert status == 0, out + err
    folder = launcher.folder / "0"
    assert (folder / "killed").exists()
    lines = [json.loads(line) for line in (folder / "run/unisono/metrics.jsonl").read_text().splitlines()]
    assert next(line["workers"] for line in lines if line.get("event") == "generation") == 2
    for name in ("run/unisono/model.safetensors", "best/model.safetensors"):
        assert (folder / name).read_bytes() == (alone / name).read_bytes()
    accuracy = re.findall(r"'eval_accuracy': [0-9.]+", said)
    assert re.findall(r"'eval_accuracy': [0-9.]+", out)[-1] == accuracy[-1]
