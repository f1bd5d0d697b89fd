"""What others may do along with training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

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

    def on_step(self, trainer: Trainer, result: StepResult) -> None:
        """After each optimizer step."""

    def on_epoch(self, trainer: Trainer, epoch: int) -> None:
        """After the last step of epoch number ``epoch`` (from 0)."""

    def on_evaluate(self, trainer: Trainer, results: Mapping[str, float]) -> None:
        """After each evaluation; ``results`` by name, the same on every worker. ``trainer.position.step`` steps are done."""
