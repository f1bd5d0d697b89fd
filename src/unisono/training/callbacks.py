"""What others may do along with training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unisono.training.step import StepResult
    from unisono.training.trainer import Trainer


class Callback:
    """Override what you need. Every worker calls every method at the same moment, so a callback that changes the model must
    do the same on all of them, and only one that does not touch the model may act on one rank alone
    (``trainer.collective.rank``)."""

    edits_weights: bool = True
    """Whether it may change weights. Say False where it only looks: then ``fit`` can keep one copy of the weights for all
    workers of a host, which is faster (see ``Exact.share_weights``)."""

    def on_begin(self, trainer: Trainer) -> None:
        """*local*. Before this worker's first step: after a start, after a resume (``trainer.position.step`` steps are done),
        and, on that worker alone, when it joins others. The place to bring in line with the trainer what depends on how far it
        has come (``dataset.level = trainer.position.epoch``). Unless ``trainer.position.step`` is 0 it must leave alone what all
        workers have in common, other than ``trainer.state.setdefault(...)``."""

    def state_dict(self) -> dict[str, Any]:
        """*local*. What it remembers from step to step (patience, the best so far, an average of the weights): tensors, numbers,
        strings, None, and dicts and lists of these. It is saved with checkpoints, given to workers that join, and compared
        between workers with each checkpoint, so it must be the same on all of them."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """*local*. Takes over what ``state_dict`` returned, on a resume and on a worker that joins; before ``on_begin``. (What
        the loss reads belongs in ``trainer.state``: that is put back, too, when steps are taken again after a death.)"""

    def on_step(self, trainer: Trainer, result: StepResult) -> None:
        """After each optimizer step."""

    def on_epoch(self, trainer: Trainer, epoch: int) -> None:
        """After the last step of epoch number ``epoch`` (from 0)."""

    def on_evaluate(self, trainer: Trainer, results: Mapping[str, float]) -> None:
        """After each evaluation; ``results`` by name, the same on every worker. ``trainer.position.step`` steps are done."""
