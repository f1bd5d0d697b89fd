"""What the demos have in common beside data: their options, what they keep beside the weights, and how results are shown."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from unisono.checkpoint.format import decode
from unisono.checkpoint.store import Store
from unisono.errors import CheckpointError, ConfigurationError
from unisono.report import charts
from unisono.report.attachments import attach
from unisono.training.callbacks import Callback

if TYPE_CHECKING:
    from unisono.replica.base import MetricFunction
    from unisono.training.trainer import Trainer

SETTINGS_FILE = "application.json"
"""What a prediction needs beside the weights, in the run directory."""

_MODEL_FILE = "model.safetensors"


def program(name: str) -> str:
    """*local*. What the person typed to run the demo: the command, or the file's name where that is run as a script."""
    script = Path(sys.argv[0])
    return f"unisono demo {name}" if script.parent == Path(__file__).parent else script.name


def options(
    name: str, description: str, *, data: str, predict: str, epochs: int | None = None, batch_size: int | None = None
) -> argparse.ArgumentParser:
    """*local*. The options that all demos take.

    Args:
        epochs: The default; None if a preset says it. The same for ``batch_size``.
        data: What ``--data`` names.
        predict: What ``--predict`` names, and what is done with it.
    """
    parser = argparse.ArgumentParser(prog=program(name), description=description)
    parser.add_argument("--epochs", type=_at_least_one, default=epochs, help=f"default: {epochs or 'by preset'}")
    parser.add_argument(
        "--batch-size", type=_at_least_one, default=batch_size, help=f"samples of a step; default: {batch_size or 'by preset'}"
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights, order and dropout; default: %(default)s")
    parser.add_argument("--data", metavar="PATH", help=data)
    parser.add_argument("--run-dir", default=f"runs/{name}", help="what training leaves behind; default: %(default)s")
    parser.add_argument("--predict", metavar="X", help=f"train nothing; {predict}, with the weights in --run-dir")
    return parser


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1")
    return int(text)


class Evaluation(Callback):
    """*collective*. Metrics over one dataset, at the end of every few epochs and, by ``measure``, after the last one.

    They are only shown, over steps: nothing is chosen by them, so that the dataset may be the test's.

    Args:
        dataset: Map-style.
        metrics: As for ``Trainer.evaluate``; the same for ``batch_size``.
        every: Epochs from one evaluation to the next: a few, where it takes long.
        epochs: Of the whole run. What the last one leads to is left to ``measure``.
    """

    edits_weights = False

    def __init__(self, dataset: Any, metrics: Mapping[str, MetricFunction], *, batch_size: int, every: int, epochs: int) -> None:
        self._dataset, self._metrics, self._batch_size = dataset, metrics, batch_size
        self._every, self._epochs = every, epochs

    def on_epoch(self, trainer: Trainer, epoch: int) -> None:
        """Evaluates if it is the turn."""
        if (epoch + 1) % self._every == 0 and epoch + 1 < self._epochs:
            self.measure(trainer)

    def measure(self, trainer: Trainer) -> dict[str, float]:
        """*collective*. The metrics of the weights of now."""
        return trainer.evaluate(self._dataset, self._metrics, batch_size=self._batch_size)


def keep_settings(run_dir: str, settings: Mapping[str, Any]) -> None:
    """*local*: worker 0 calls it. Writes what ``trained`` gives back."""
    Store(run_dir).write(SETTINGS_FILE, (json.dumps(settings, indent=1) + "\n").encode())


def trained(run_dir: str, name: str) -> dict[str, Any]:
    """*local*. The settings of a trained run.

    Raises:
        ConfigurationError: Nothing was trained there.
        CheckpointError: The file is damaged.
    """
    store = Store(run_dir)
    if not store.exists(SETTINGS_FILE) or not store.exists(_MODEL_FILE):
        raise ConfigurationError(f"{run_dir} holds no trained weights: run `unisono demo {name}` first, or pass its --run-dir")
    try:
        settings = json.loads(store.read(SETTINGS_FILE))
        if not isinstance(settings, dict):
            raise ValueError(f"it holds a {type(settings).__name__}")
    except ValueError as error:
        raise CheckpointError(f"{SETTINGS_FILE} of {run_dir} is damaged ({error}): train again", file=SETTINGS_FILE) from None
    if settings.get("demo") != name:
        raise ConfigurationError(
            f"{run_dir} was trained by `unisono demo {settings.get('demo')}`, not {name}: pass another --run-dir"
        )
    return settings


def load_weights(model: nn.Module, run_dir: str) -> None:
    """*local*. Puts the weights of ``model.safetensors`` into the model, and the model into evaluation mode.

    Raises:
        CheckpointError: The file is damaged.
        ConfigurationError: It holds the weights of another model.
    """
    try:
        model.load_state_dict(decode(Store(run_dir).read(_MODEL_FILE)))
    except RuntimeError as error:
        what = str(error).strip().splitlines()[-1].strip()
        raise ConfigurationError(
            f"the weights in {run_dir} are those of another model ({what}): pass the --data that they were trained with, or "
            "another --run-dir"
        ) from None
    model.eval()


def compare(run_dir: str, title: str, measure: str, values: Mapping[str, float], *, ours: str, higher_is_better: bool) -> None:
    """*local*: worker 0 calls it. Prints one number of this run beside those of others, and adds it to the report."""
    width = max(len(name) for name in values)
    print(f"\n{title}: {measure}, {'higher' if higher_is_better else 'lower'} is better")
    for name, value in values.items():
        print(f"  {name:<{width}}  {value:.4f}")
    attach(run_dir, title, charts.comparison_bars(measure, values, ours, higher_is_better=higher_is_better))
