"""What a worker notes about the steps it has trained: totals, the log's lines, the numbers of the summary. *Local.*"""

from __future__ import annotations

import dataclasses

from unisono.guard.ledger import NOTHING, Entry
from unisono.observe.progress import ProgressDisplay
from unisono.observe.timing import StepClock
from unisono.training.step import StepResult


@dataclasses.dataclass
class Position:
    """How far a run has come: the cursor in the data, and totals."""

    step: int = 0
    """Optimizer steps done."""
    epoch: int = 0
    """Epoch of the next batch."""
    batch: int = 0
    """Number of the next batch in that epoch."""
    samples: int = 0
    """Samples trained; one seen in two epochs counts twice."""
    skipped: int = 0
    """Steps that updated nothing, since the loss or the gradient was not finite."""
    ledger: Entry | None = NOTHING
    """Of the samples used so far in this epoch; None: the batches do not tell."""


@dataclasses.dataclass
class Record:
    """Totals over the steps of this start of the run."""

    steps: int = 0
    samples: int = 0
    seconds: float = 0.0
    waiting_s: float = 0.0
    bytes_sent: int = 0
    last_seconds: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    """Of the last step: data, compute, communication, waiting."""
    last: StepResult | None = None
    """The last step of the run, perhaps of an earlier start."""

    def add(self, result: StepResult, clock: StepClock, bytes_sent: int) -> dict[str, float]:
        """Counts a step; the seconds of its phases."""
        seconds = clock.lap(result.samples)
        self.steps += 1
        self.samples += result.samples
        self.seconds += seconds["step"]
        self.waiting_s += seconds["waiting"]
        self.bytes_sent += bytes_sent
        self.last = result
        self.last_seconds = (seconds["data"], seconds["compute"], seconds["communication"], seconds["waiting"])
        return seconds

    def rates(self) -> dict[str, float]:
        """The averages that a summary holds."""
        return {
            "seconds": self.seconds,
            "samples_per_second": self.samples / self.seconds if self.seconds else 0.0,
            "waiting_share": self.waiting_s / self.seconds if self.seconds else 0.0,
            "bytes_sent_per_step": self.bytes_sent / self.steps if self.steps else 0.0,
        }


def show(display: ProgressDisplay, result: StepResult, clock: StepClock) -> None:
    """Tells the progress display about a step."""
    display.update(
        step=result.step,
        epoch=result.epoch + 1,
        loss=result.loss,
        samples_per_second=clock.rate,
        waiting_share=clock.waiting_share,
    )


def log_line(result: StepResult, position: Position, clock: StepClock, seconds: dict[str, float]) -> dict[str, int | float | str]:
    """The step's line in ``metrics.jsonl``."""
    rates = {f"lr_{number}" if number else "lr": rate for number, rate in enumerate(result.learning_rates)}
    return {
        "step": result.step,
        "epoch": result.epoch + 1,
        "loss": result.loss,
        "gradient_norm": result.gradient_norm,
        "samples": position.samples,
        **({"skipped": position.skipped} if position.skipped else {}),
        "samples_per_second": round(clock.rate, 1),
        **{f"{name}_s": round(value, 6) for name, value in seconds.items()},
        **rates,
    }
