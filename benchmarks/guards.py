"""What each guard costs of a step, by timers around it, while two workers train with `fit`.

A timer around a call sees what the call costs where it stands: a guard's code and data are no longer in the caches when its turn
comes, so the same call in a tight loop would take half as long. Not seen is what it pushes out of the caches itself, nor what is
no call: adding a batch's entry to that of the epoch, asking whether the summed loss is finite and whether weights are shared::

    python benchmarks/guards.py
    python benchmarks/guards.py --cases tiny middle --repeats 3
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.data import TensorDataset
from workloads import WORKLOADS

import unisono
from unisono.collective import Collective
from unisono.data import batches
from unisono.guard import replicas, stragglers
from unisono.testing import Workers
from unisono.training import run, step, weights

STEPS = {"tiny": 2560, "middle": 512, "wide": 64, "gpt": 128, "cnn": 128}
"""A multiple of 64, within which everything is looked at once."""
WARM_UP = 64

GUARDS: dict[str, Sequence[tuple[Any, str]]] = {
    "replicas": [(replicas.ReplicaGuard, "digest")],
    "ledger": [
        (batches.BatchStream, "_accounts"),
        (run.Run, "_check_epoch"),
    ],
    "headers": [(step, "check_headers")],
    "stragglers": [(stragglers.Stragglers, "add"), (stragglers.HostMonitor, "troubles")],
    "shared weights": [(weights.Weights, "check_untouched"), (weights.Weights, "remember")],
}
"""The calls that make up each guard."""


class Timers:
    """Seconds spent in each guard."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(GUARDS, 0.0)
        self._inside = False
        for guard, calls in GUARDS.items():
            for owner, name in calls:
                setattr(owner, name, self._timed(guard, getattr(owner, name)))

    def _timed(self, guard: str, call: Callable[..., Any]) -> Callable[..., Any]:
        clock, seconds = time.perf_counter, self.seconds

        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._inside:  # a guard that calls another one
                return call(*args, **kwargs)
            self._inside = True
            began = clock()
            try:
                return call(*args, **kwargs)
            finally:
                seconds[guard] += clock() - began
                self._inside = False

        return timed


class Window(unisono.Callback):
    """Notes what the timers show, and the time, when warming up is done and at the end."""

    edits_weights = False

    def __init__(self, timers: Timers, steps: int) -> None:
        self.timers, self.ends = timers, (WARM_UP, WARM_UP + steps)
        self.seen: list[tuple[float, dict[str, float]]] = []

    def on_step(self, trainer: unisono.Trainer, result: unisono.StepResult) -> None:
        if result.step in self.ends:
            self.seen.append((time.perf_counter(), dict(self.timers.seconds)))


def measure(collective: Collective, case: str, steps: int) -> tuple[float, dict[str, float]]:
    """Seconds of a step, and of each guard in it, over so many steps, a multiple of 64."""
    torch.manual_seed(0)
    workload = WORKLOADS[case]
    model = workload.model()
    window = Window(Timers(), steps)
    trainer = unisono.Trainer(
        model,
        torch.optim.AdamW(model.parameters(), lr=1e-12, fused=True),
        lambda model, batch: (workload.loss(model(batch[0]), batch[1]), workload.count(batch[1])),
        batch_size=workload.batch_size,
        microbatches=collective.size,
        collective=collective,
        callbacks=[window],
    )
    samples = [tensor.repeat(64, *[1] * (tensor.dim() - 1)) for tensor in workload.batch()]
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():  # the progress; a straggler, once in a run
        warnings.simplefilter("ignore")
        trainer.fit(TensorDataset(*samples), epochs=(WARM_UP + steps) // 64)
    (began, before), (ended, after) = window.seen
    return (ended - began) / steps, {guard: (after[guard] - before[guard]) / steps for guard in GUARDS}


def row(case: str, runs: Sequence[tuple[float, dict[str, float]]]) -> str:
    """A line of the table: medians over repeats and workers."""
    step_s = statistics.median(seconds for seconds, _ in runs)
    guards = {guard: statistics.median(found[guard] for _, found in runs) for guard in GUARDS}
    share = statistics.median(sum(found.values()) / seconds for seconds, found in runs)
    each = " | ".join(f"{1e6 * seconds:.1f}" for seconds in guards.values())
    return f"| {case} | {1e3 * step_s:.2f} | {each} | {1e6 * sum(guards.values()):.1f} | {share:.2%} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(STEPS), default=list(STEPS))
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    print(f"| case | ms a step | {' | '.join(f'{guard}, µs' for guard in GUARDS)} | together, µs | share |")
    print("|---" * (len(GUARDS) + 4) + "|")
    with Workers() as workers:
        for case in options.cases:
            found = [workers.run(2, measure, case, STEPS[case], transport="shared memory") for _ in range(options.repeats)]
            runs = [run for both in found for run in both]
            print(row(case, runs), flush=True)


if __name__ == "__main__":
    main()
