"""What the demos share besides data: their options, what they keep beside the weights, and how results are shown."""

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
    """*local*. How the demo was started: the command, or the file's name if it runs as a script."""
    script = Path(sys.argv[0])
    return f"unisono demo {name}" if script.parent == Path(__file__).parent else script.name


def options(
    name: str, description: str, *, data: str, predict: str, epochs: int | None = None, batch_size: int | None = None
) -> argparse.ArgumentParser:
    """*local*. The options that all demos take.

    Args:
        data: Help of ``--data``; ``predict``: of ``--predict``.
        epochs: The default, as is ``batch_size``; None if a preset sets it.
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


def settings(arguments: argparse.Namespace, microbatches: int) -> dict[str, Any]:
    """*local*. The arguments of ``Trainer`` that come from the options."""
    return {
        "batch_size": arguments.batch_size,
        "microbatches": microbatches,
        "seed": arguments.seed,
        "run_dir": arguments.run_dir,
    }


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)


class Evaluation(Callback):
    """*collective*. Metrics over one dataset, at the end of every few epochs and, by ``measure``, after the last one.

    They are only shown; nothing is selected by them, so the dataset may be the test set.

    Args:
        dataset: Map-style; ``metrics`` and ``batch_size`` are as for ``Trainer.evaluate``.
        every: Epochs from one evaluation to the next.
        epochs: Of the whole run; the last one is left to ``measure``.
    """

    edits_weights = False

    def __init__(self, dataset: Any, metrics: Mapping[str, MetricFunction], *, batch_size: int, every: int, epochs: int) -> None:
        self._dataset, self._metrics, self._batch_size = dataset, metrics, batch_size
        self._every, self._epochs = every, epochs

    def on_epoch(self, trainer: Trainer, epoch: int) -> None:
        """Evaluates if an evaluation is due."""
        if (epoch + 1) % self._every == 0 and epoch + 1 < self._epochs:
            self.measure(trainer)

    def measure(self, trainer: Trainer) -> dict[str, float]:
        """*collective*. The metrics of the present weights."""
        return trainer.evaluate(self._dataset, self._metrics, batch_size=self._batch_size)


def keep_settings(run_dir: str, settings: Mapping[str, Any]) -> None:
    """*local*, on worker 0. Writes what ``trained`` reads."""
    Store(run_dir).write(SETTINGS_FILE, (json.dumps(settings, indent=1) + "\n").encode())


def trained(run_dir: str, name: str) -> dict[str, Any]:
    """*local*. The settings of a trained run.

    Raises:
        ConfigurationError: Nothing, or another demo, was trained there.
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
    if (other := settings.get("demo")) != name:
        raise ConfigurationError(f"{run_dir} was trained by `unisono demo {other}`, not {name}: pass another --run-dir")
    return settings


def load_weights(model: nn.Module, run_dir: str) -> None:
    """*local*. Loads ``model.safetensors`` into the model, and puts the model into evaluation mode.

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


def compare(run_dir: str, title: str, measure: str, values: Mapping[str, float], *, higher_is_better: bool) -> None:
    """*local*, on worker 0. Prints one number of this run, which comes first, beside those of others; adds it to the report."""
    width = max(len(name) for name in values)
    print(f"\n{title}: {measure}, {'higher' if higher_is_better else 'lower'} is better")
    for name, value in values.items():
        print(f"  {name:<{width}}  {value:.4f}")
    picture = charts.comparison_bars(measure, values, next(iter(values)), higher_is_better=higher_is_better)
    attach(run_dir, title, picture)
