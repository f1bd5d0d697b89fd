"""The display of a running training: a bar on a terminal, plain lines anywhere else.

``Progress`` decides when something is drawn, so that ``update`` may be called after every step; a view draws it. The
view for terminals is ``unisono.observe.live``, the plain one is here.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Self

from unisono.observe.reading import Reading
from unisono.system import output

if TYPE_CHECKING:
    from rich.console import Console

    from unisono.observe.live import LiveView

Loss = float | Callable[[], float]
"""A loss, or a function that fetches it: where the loss lives on a GPU, fetching it waits for the GPU."""

_EVERY_S = {"live": 0.1, "plain": 5.0}
_EPOCH_END_EVERY_S = 1.0
_FEW_EPOCHS = 20
_LONGEST_LEFT_S = 1000 * 86400.0


def standard_output() -> Console:
    """A console on standard output that is interactive only if that is a terminal, and does not fail. *Local*.

    On its own, rich also takes ``FORCE_COLOR`` for a terminal, which build servers set, and would fill their logs with bars; and
    it ends the process when the reader of a pipe goes away.
    """
    from rich.console import Console

    stream = output.standard_output()
    return Console(file=stream, force_interactive=None if stream.isatty() else False)


class ProgressDisplay:
    """What the trainer needs of a display. This one shows nothing. *Local*: nothing here communicates."""

    def __enter__(self) -> Self:
        """Begin to display."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Leave the terminal as it was."""

    def update(self, *, step: int, epoch: int, loss: Loss, samples_per_second: float, waiting_share: float) -> None:
        """Report a step; cheap enough to be called after each."""

    def note(self, text: str) -> None:
        """Print a line that stays, above the bar."""

    def finish(self) -> None:
        """Draw the last step reported and end the display."""


class SilentProgress(ProgressDisplay):
    """Shows nothing: for all workers but rank 0, and for those who want quiet. *Local*."""


class PlainView:
    """One self-contained line a reading, without colour or control characters, never wrapped."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def begin(self, reading: Reading) -> None:
        """Nothing: the first step is the first line."""

    def show(self, reading: Reading) -> None:
        """Print the reading as a line."""
        self.note("  ".join([reading.position(), *reading.facts(), *reading.left()]))

    def note(self, text: str) -> None:
        """Print a line."""
        self._console.print(text, style=None, markup=False, emoji=False, highlight=False, soft_wrap=True)

    def stop(self) -> None:
        """Nothing to end."""


class Progress(ProgressDisplay):
    """Shows a run while it trains. *Local*: rank 0 has one, the other workers have a ``SilentProgress``.

    On an interactive terminal a bar over the steps of the whole run, redrawn at most ten times a second by a thread of
    its own. Elsewhere plain lines: the first step, then one about every 5 s, the end of each epoch (of more than 20
    epochs: at most one a second), and the last step.

    ``update`` costs a few microseconds at most, except when it is time to draw. Only then it calls ``loss``, if that
    is a function, and always on the caller's thread; so a loss that has to be fetched from a GPU is fetched rarely.

    Use it as a context manager. If the body raises, the display ends without another look at the loss.

    Args:
        total_steps: Optimizer steps of the whole run, None if unknown.
        step: Steps already done, by earlier starts of the same run.
        epochs: Epochs of the whole run, None if unknown.
        workers: Workers that train now.
        batch_size: Samples of a global batch.
        console: Where to draw; standard output by default.
        clock: Gives seconds; only differences are used.
    """

    def __init__(
        self,
        *,
        total_steps: int | None,
        step: int,
        epochs: int | None,
        workers: int,
        batch_size: int,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        console = console or standard_output()
        self._view: LiveView | PlainView
        if console.is_interactive:
            from unisono.observe.live import LiveView

            self._view, self._every_s = LiveView(console, workers=workers), _EVERY_S["live"]
        else:
            self._view, self._every_s = PlainView(console), _EVERY_S["plain"]
        self._clock = clock
        self._total_steps = total_steps
        self._epochs = epochs
        self._workers = workers
        self._batch_size = batch_size
        self._first_step = step
        whole_epochs = total_steps and epochs and total_steps % epochs == 0
        self._steps_per_epoch = total_steps // epochs if total_steps and epochs and whole_epochs else None
        self._last: tuple[int, int, Loss, float, float] | None = None
        self._epoch: int | None = None
        self._drawn_step: int | None = None
        self._drawn_at = -math.inf
        self._finished = False

    def __enter__(self) -> Self:
        self._view.begin(Reading(step=self._first_step, total_steps=self._total_steps, epochs=self._epochs))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self.finish()
        else:
            self._stop()

    def update(self, *, step: int, epoch: int, loss: Loss, samples_per_second: float, waiting_share: float) -> None:
        """Report a step. *Local*.

        Args:
            step: Steps done in the whole run, this one included.
            epoch: Number of the current epoch, from 1.
            loss: The loss of this step, or a function that fetches it.
            samples_per_second: Global batch samples per second; 0 or NaN if not known yet.
            waiting_share: Share of time spent waiting for other workers, 0 to 1; not shown for a single worker.
        """
        self._last = (step, epoch, loss, samples_per_second, waiting_share)
        now = self._clock()
        due = now - self._drawn_at >= self._every_s or step == self._total_steps or self._epoch_line(step, epoch, now)
        self._epoch = epoch
        if due:
            self._draw(now)

    def note(self, text: str) -> None:
        """Print a line that stays, above the bar. *Local*."""
        self._view.note(text)

    def finish(self) -> None:
        """Draw the last step reported, if that is not done, and end the display. *Local*.

        A second call does nothing.
        """
        try:
            if not self._finished and self._last is not None and self._last[0] != self._drawn_step:
                self._draw(self._clock())
        finally:
            self._stop()

    def _epoch_line(self, step: int, epoch: int, now: float) -> bool:
        """Whether an epoch ends here (or, where its length is not known, has just begun) and is worth a line."""
        if self._steps_per_epoch is not None:
            ends = step % self._steps_per_epoch == 0
        else:
            ends = self._epoch is not None and epoch != self._epoch
        few = self._epochs is not None and self._epochs <= _FEW_EPOCHS
        return ends and (few or now - self._drawn_at >= _EPOCH_END_EVERY_S)

    def _draw(self, now: float) -> None:
        if self._last is None or self._finished:
            return
        step, epoch, loss, speed, waiting_share = self._last
        known_speed = speed if math.isfinite(speed) and speed > 0 else None
        seconds_left = None
        if known_speed is not None and self._total_steps is not None:
            seconds_left = max(self._total_steps - step, 0) * self._batch_size / known_speed
            # Beyond this the guess is worth nothing.
            seconds_left = seconds_left if seconds_left < _LONGEST_LEFT_S else None
        self._view.show(
            Reading(
                step=step,
                total_steps=self._total_steps,
                epoch=epoch,
                epochs=self._epochs,
                loss=float(loss() if callable(loss) else loss),
                samples_per_second=known_speed,
                waiting_share=waiting_share if self._workers > 1 and math.isfinite(waiting_share) else None,
                seconds_left=seconds_left,
            )
        )
        self._drawn_step, self._drawn_at = step, now

    def _stop(self) -> None:
        self._finished = True
        self._last = None
        self._view.stop()
