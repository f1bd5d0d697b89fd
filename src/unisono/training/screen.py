"""What a person sees of a run while it trains. *Local.*"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator, Mapping

from unisono.observe.progress import Progress, ProgressDisplay, SilentProgress
from unisono.observe.summary import Summary, show_summary
from unisono.observe.timing import StepClock
from unisono.system.output import say
from unisono.training.record import show
from unisono.training.run import Run
from unisono.training.step import StepResult


class Screen:
    """Shows progress on the worker that speaks for all, whoever that is by now.

    Args:
        batch_size: Samples of a step.
    """

    def __init__(self, batch_size: int) -> None:
        self._batch_size = batch_size
        self._progress: ProgressDisplay = SilentProgress()
        self._stack = contextlib.ExitStack()
        self._has_told_mode = False
        self._plan: tuple[int | None, int | None] | None = None

    @contextlib.contextmanager
    def planned(self, total_steps: int | None, epochs: int | None) -> Iterator[None]:
        """Around the steps of a run of so many steps, if that is known; nothing is shown before ``begin``."""
        with self._stack:
            self._plan = (total_steps, epochs)
            try:
                yield
            finally:
                progress, self._progress, self._plan = self._progress, SilentProgress(), None
            progress.finish()

    def begin(self, run: Run, workers: int) -> None:
        """This worker speaks for all from now on."""
        if self._plan is None or not isinstance(self._progress, SilentProgress):
            return
        total_steps, epochs = self._plan
        step = run.position.step
        self._progress = self._stack.enter_context(
            Progress(total_steps=total_steps, step=step, epochs=epochs, workers=workers, batch_size=self._batch_size)
        )
        if step and not run.record.steps:
            self._progress.note(f"resumed after step {step}")

    def step(self, result: StepResult, clock: StepClock) -> None:
        """A step has been taken."""
        show(self._progress, result, clock)

    def tell(self, text: str) -> None:
        """Says something, also where no progress is shown."""
        self._progress.note(text)
        if isinstance(self._progress, SilentProgress):
            say(text)

    def tell_measured(self, run: Run, results: Mapping[str, float]) -> None:
        """The model was evaluated."""
        if run.is_main:
            self.tell(f"after step {run.position.step}: " + ", ".join(f"{name} {value:.5g}" for name, value in results.items()))

    def tell_mode(self, was_resting: bool) -> None:
        """Says once if the model was in evaluation mode, as a whole."""
        if was_resting and not self._has_told_mode:
            self._has_told_mode = True
            self.tell(
                "the model was in evaluation mode, and is trained in training mode (dropout, BatchNorm's own statistics). Parts "
                "that are to stay in evaluation mode: call model.train() and their eval() before Trainer(...)"
            )

    def sum_up(self, run: Run, summary: Summary) -> None:
        """The run is finished."""
        if run.is_main and run.url is not None:
            show_summary(summary, run.url, seeded=run.seeded)

    def tell_finished(self, run: Run, summary: Summary) -> None:
        """The run was finished before this start."""
        if run.is_main:
            where = f"the run in {run.url}" if run.is_kept else "this run"
            early = " early, by trainer.finish()" if run.position.finished else ""
            say(f"{where} is finished{early} ({run.position.epoch} epochs, {run.position.step} steps): nothing to do")
        self.sum_up(run, summary)

    def tell_stopped(self, run: Run, stop: int) -> None:
        """The run has stopped, as this signal asked it to."""
        note = f"stopped by {signal.Signals(stop).name} after step {run.position.step}"
        if not run.is_kept:
            note += "; nothing is saved, since the Trainer has no run_dir"
        else:
            note += f"; checkpoint written to {run.url}. Start the same command again to go on, on any number of workers"
        if run.is_main:
            self.tell(note)
