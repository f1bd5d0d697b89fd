"""What the display of a running training shows at one moment. *Local.*"""

from __future__ import annotations

from dataclasses import dataclass

from unisono.observe import formats


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """What the display shows at one moment. Numbers that are not known are None."""

    step: int
    """Optimizer steps done in the whole run."""
    total_steps: int | None
    """Optimizer steps of the whole run."""
    epoch: int | None = None
    """Number of the current epoch, from 1."""
    epochs: int | None = None
    """Epochs of the whole run."""
    loss: float | None = None
    samples_per_second: float | None = None
    waiting_share: float | None = None
    """Share of time spent waiting for other workers, 0 to 1."""
    seconds_left: float | None = None

    def position(self) -> str:
        """``step 120/705``."""
        return f"step {self.step}" + ("" if self.total_steps is None else f"/{self.total_steps}")

    def facts(self) -> list[str]:
        """What is known besides position and time left: ``epoch 2/5``, ``loss 0.1234``, ..."""
        facts = []
        if self.epoch is not None:
            facts.append(f"epoch {self.epoch}" + ("" if self.epochs is None else f"/{self.epochs}"))
        if self.loss is not None:
            facts.append(f"loss {formats.number(self.loss)}")
        if self.samples_per_second is not None:
            facts.append(f"{formats.rate(self.samples_per_second)} samples/s")
        if self.waiting_share is not None:
            facts.append(f"waiting {formats.percent(self.waiting_share)}")
        return facts

    def left(self) -> list[str]:
        """``left 0:12``, or nothing while that is not known."""
        return [] if self.seconds_left is None else [f"left {formats.duration(self.seconds_left)}"]
