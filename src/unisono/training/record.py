"""What a worker notes about the steps it has trained: totals, the log's lines, the numbers of the summary. *Local.*"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from unisono.collective import Collective
from unisono.guard.ledger import NOTHING, Entry
from unisono.guard.stragglers import Straggler, TimingBlock, reason
from unisono.observe.progress import ProgressDisplay
from unisono.observe.timing import PHASES, StepClock
from unisono.system.memory import peak_memory_bytes
from unisono.training.step import StepResult
from unisono.tree import Span

EVALUATION = "evaluation"
"""What the log calls an evaluation."""
LOGGED_WORKERS = 16
"""The log holds the times of so many workers."""


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
    finished: bool = False
    """Whether ``Trainer.finish`` has ended the run, however many epochs it was given."""
    best: float | None = None
    """The highest value so far of what ``fit(keep_best=...)`` keeps the weights by; its negative for "-name"."""


@dataclasses.dataclass
class Record:
    """Totals over the steps of this start of the run."""

    steps: int = 0
    samples: int = 0
    seconds: float = 0.0
    phases_s: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    """Seconds in data, compute, communication, waiting."""
    bytes_sent: int = 0
    microbatches: int = 0
    """Microbatches that this worker had in a full step, added up over these steps."""
    last: StepResult | None = None
    """The last step of the run, perhaps of an earlier start."""

    def add(self, result: StepResult, clock: StepClock, bytes_sent: int, microbatches: int) -> dict[str, float]:
        """Counts a step; the seconds of its phases.

        Args:
            microbatches: How many this worker had, as in a full step.
        """
        seconds = clock.lap(result.samples)
        self.steps += 1
        self.samples += result.samples
        self.seconds += seconds["step"]
        self.bytes_sent += bytes_sent
        self.microbatches += microbatches
        self.last = result
        data, compute, communication, waiting = self.phases_s
        self.phases_s = (
            data + seconds["data"],
            compute + seconds["compute"],
            communication + seconds["communication"],
            waiting + seconds["waiting"],
        )
        return seconds

    def rates(self, collective: Collective) -> dict[str, Any]:
        """*collective*. The averages that a summary holds, each worker's share of the work, and where its time went."""
        sent = self.bytes_sent / self.steps if self.steps else 0.0
        share = self.microbatches / self.steps if self.steps else 0.0  # of its own steps: it may have come later
        mine = torch.tensor([*self.phases_s, share, peak_memory_bytes(), sent], dtype=torch.float64)
        *phases, microbatches, peaks, everybodys_sent = torch.stack(collective.all_gather(mine)).T
        waiting_s = self.phases_s[PHASES.index("waiting")]
        return {
            **{f"{name}_s": column.tolist() for name, column in zip(PHASES, phases, strict=True)},
            "microbatches": microbatches.tolist() if self.steps else [],
            "peak_memory_bytes": peaks.tolist(),
            "bytes_sent": everybodys_sent.tolist(),
            "seconds": self.seconds,
            "samples_per_second": self.samples / self.seconds if self.seconds else 0.0,
            "waiting_share": waiting_s / self.seconds if self.seconds else 0.0,
            "bytes_sent_per_step": sent,
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


def log_line(
    result: StepResult,
    position: Position,
    clock: StepClock,
    seconds: dict[str, float],
    block: TimingBlock | None,
    moved: Sequence[Span] | None = None,
) -> dict[str, int | float | str]:
    """The step's line in ``metrics.jsonl``.

    Args:
        seconds: Worker 0's, in this step.
        block: All workers', up to the step before, if a block of steps is complete.
        moved: Each worker's microbatches from the next batch on, if they change.
    """
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
        **(_others(block) if block is not None else {}),
        **(_shares(moved) if moved is not None else {}),
    }


def evaluation_line(step: int, results: Mapping[str, float]) -> dict[str, int | float | str]:
    """The line in ``metrics.jsonl`` of an evaluation after ``step`` steps."""
    return {"step": step, "event": EVALUATION, **{f"metric/{name}": value for name, value in results.items()}}


def straggler_line(step: int, straggler: Straggler) -> dict[str, int | float | str]:
    """The line in ``metrics.jsonl`` that a worker was found slow after ``step`` steps."""
    text = f"worker {straggler.rank} is slow: {reason(straggler)}"
    return {"step": step, "event": "straggler", "worker": straggler.rank, "slowness": straggler.slowness, "text": text}


def _others(block: TimingBlock) -> dict[str, float]:
    """Seconds a step, on average over the block."""
    return {
        f"{name}_s_{rank}": round(value, 6)
        for rank, line in enumerate((block.seconds[:LOGGED_WORKERS] / block.steps).tolist())
        if rank
        for name, value in zip(PHASES, line, strict=True)
    }


def _shares(ranges: Sequence[Span]) -> dict[str, int]:
    return {f"microbatches_{rank}" if rank else "microbatches": hi - lo for rank, (lo, hi) in enumerate(ranges[:LOGGED_WORKERS])}
