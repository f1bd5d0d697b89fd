"""A run as TensorBoard shows it."""

from __future__ import annotations

import os
import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING

from unisono.errors import ConfigurationError
from unisono.training.callbacks import Callback

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from unisono.training.step import StepResult
    from unisono.training.trainer import Trainer

_FOLDER = "tensorboard"


class TensorBoard(Callback):
    """Writes TensorBoard event files: loss, gradient norm, learning rate, samples a second, seconds a step by phase, and what
    evaluations found. *Local*: worker 0 writes.

    A run that goes on from a checkpoint adds to its events, and TensorBoard drops those of the steps that are done again.

    Args:
        log_dir: Where to write; ``tensorboard`` in the run directory by default.
        every: Steps between two points, from 1; evaluations are all written.

    Raises:
        ConfigurationError: The ``tensorboard`` package is missing, or ``every`` is below 1; at the first point, also: there is
            neither ``log_dir`` nor a run directory that is a local folder.
    """

    edits_weights = False

    def __init__(self, log_dir: str | os.PathLike[str] | None = None, *, every: int = 1) -> None:
        try:
            import tensorboard  # noqa: F401 (torch.utils.tensorboard says less when it is missing)
        except ImportError as error:
            raise ConfigurationError(
                f"TensorBoard event files need the tensorboard package ({error}). Install it: pip install 'unisono[tensorboard]'"
            ) from error
        if every < 1:
            raise ConfigurationError(f"TensorBoard(every={every}): the number of steps between two points must be 1 or more.")
        self._log_dir = None if log_dir is None else os.fspath(log_dir)
        self._every = every
        self._writer: SummaryWriter | None = None

    def on_step(self, trainer: Trainer, result: StepResult) -> None:
        """Write a point."""
        if trainer.collective.rank or result.step % self._every:
            return
        writer = self._writer or self._open(trainer, purge_step=result.step)
        rates = result.learning_rates
        values = {
            "loss": result.loss,
            "gradient_norm": result.gradient_norm,
            **{f"learning_rate/{group}" if len(rates) > 1 else "learning_rate": rate for group, rate in enumerate(rates)},
            "samples_per_second": trainer.clock.rate,
            **{f"seconds_a_step/{name}": value for name, value in trainer.clock.last.items()},
        }
        for name, value in values.items():
            writer.add_scalar(name, value, result.step)

    def on_epoch(self, trainer: Trainer, epoch: int) -> None:
        """Write the epoch's number, and all that is still in memory."""
        if self._writer is not None:
            self._writer.add_scalar("epoch", epoch + 1, trainer.position.step)
            self._writer.flush()

    def on_evaluate(self, trainer: Trainer, results: Mapping[str, float]) -> None:
        """Write the results, at the number of steps done."""
        if trainer.collective.rank:
            return
        step = trainer.position.step
        writer = self._writer or self._open(trainer, purge_step=step + 1)  # this step's points of an earlier start stay
        for name, value in results.items():
            writer.add_scalar(f"evaluation/{name}", value, step)
        writer.flush()

    def _open(self, trainer: Trainer, *, purge_step: int) -> SummaryWriter:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(self._log_dir or _default_folder(trainer), purge_step=purge_step)
        weakref.finalize(self, self._writer.close)  # it runs at the interpreter's end
        return self._writer


def _default_folder(trainer: Trainer) -> str:
    run_dir = trainer.run_dir
    if run_dir is None or "://" in run_dir:
        where = "this trainer has no run_dir" if run_dir is None else f"run_dir {run_dir!r} is not a local folder"
        raise ConfigurationError(f"TensorBoard() writes into the run directory, but {where}. Pass TensorBoard(log_dir=...).")
    return os.path.join(run_dir, _FOLDER)  # noqa: PTH118 (TensorBoard takes a string)
