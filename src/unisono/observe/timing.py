"""Where the time of a step goes.

A ``StepClock`` belongs to one worker and one thread. ``start`` and ``stop`` cost well under a microsecond each beyond
reading the clock, so they may stand around every microbatch::

    with clock.phase("compute"):
        ...
    with clock.phase("communication"):
        ...
        with clock.phase("waiting"):      # counts as waiting only, not as communication too
            ...
    seconds = clock.lap(samples=256)
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType
from typing import Literal, Protocol, get_args

Phase = Literal["data", "compute", "communication", "waiting"]
"""Loading samples; forward, backward and update; moving bytes; waiting until the other workers arrive."""

PHASES: tuple[Phase, ...] = get_args(Phase)

PHASE, SINCE, STEP = range(3)
"""Where a clock shows the phase (as a number), since when (by ``time.perf_counter``), and the number of the step."""
OUTSIDE, PAUSED = len(PHASES), len(PHASES) + 1
"""What it shows for no phase, and while it is paused; a phase is its place in ``PHASES``."""

_NUMBERS: dict[Phase, int] = {name: number for number, name in enumerate(PHASES)}
_SMOOTHING_S = 5.0


class Shown(Protocol):
    """Where a clock shows what this worker is doing: three numbers, in a list or in memory that others can read."""

    def __setitem__(self, place: int, value: float, /) -> None: ...


class StepClock:
    """Seconds of each phase of a step, and smoothed rates over recent steps. *Local*.

    Phases may be nested; a second counts for the innermost one. No time counts while the clock is paused.

    The rates are ratios of two exponential moving averages that forget alike, over about the last 5 s of training (or
    the last step, if that took longer). Both start at zero, so the bias of a young average (Adam, Kingma and Ba 2015,
    section 3) cancels in the ratio, and a long step weighs as much as it lasted.

    Args:
        clock: Gives seconds; only differences are used.
        shown: Where to show the phase.
    """

    def __init__(self, *, clock: Callable[[], float] = time.perf_counter, shown: Shown | None = None) -> None:
        self._clock = clock
        self.shown: Shown = [0.0, 0.0, 0.0] if shown is None else shown
        """Where it shows the phase; between two steps another place may be put here."""
        self._contexts = {name: _PhaseContext(self, name) for name in PHASES}
        self._seconds: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        self._open: list[Phase] = []
        self._pauses = 0
        self._paused_at = 0.0
        self._paused_s = 0.0
        self._lap_began = self._mark = self._now()
        self._recent_s = self._recent_samples = self._recent_waiting_s = 0.0
        self.last: Mapping[str, float] = {}
        """What the last ``lap`` returned; empty before the first."""
        self._step = 0
        self._show(OUTSIDE)

    def at(self, step: int) -> None:
        """What follows is step ``step`` of the run; ``lap`` counts on from there."""
        self._step = step
        self.shown[STEP] = step

    def start(self, name: Phase) -> None:
        """Begin a phase; the phase around it, if any, is suspended until the matching ``stop``."""
        self._account()
        self._open.append(name)
        shown = self.shown  # not by a call of _show: this happens a dozen times a step
        shown[PHASE] = _NUMBERS[name]
        shown[SINCE] = self._mark + self._paused_s

    def stop(self) -> None:
        """End the phase begun last."""
        self._account()
        opened = self._open
        opened.pop()
        shown = self.shown
        shown[PHASE] = _NUMBERS[opened[-1]] if opened else OUTSIDE
        shown[SINCE] = self._mark + self._paused_s

    def phase(self, name: Phase) -> AbstractContextManager[None]:
        """``start`` and ``stop`` as a context; the phase also ends if the body raises."""
        return self._contexts[name]

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Leave the body out of everything: an evaluation, a callback. Pauses may be nested."""
        if not self._pauses:
            self._paused_at = self._clock()
            self._show(PAUSED, self._paused_at)
        self._pauses += 1
        try:
            yield
        finally:
            self._pauses -= 1
            if not self._pauses:
                now = self._clock()
                self._paused_s += now - self._paused_at
                self._show(_NUMBERS[self._open[-1]] if self._open else OUTSIDE, now)

    def lap(self, samples: int = 0) -> dict[str, float]:
        """End a step, and begin the next.

        Args:
            samples: Samples of the global batch that was trained, for ``rate``.

        Returns:
            Seconds of ``data``, ``compute``, ``communication`` and ``waiting`` since the last lap, and of the whole
            ``step``, which also holds what was in no phase.
        """
        self._account()
        elapsed = self._mark - self._lap_began
        self._lap_began = self._mark
        self.at(self._step + 1)
        lap = {**self._seconds, "step": elapsed}
        keep = math.exp(-elapsed / _SMOOTHING_S)
        self._recent_s = self._recent_s * keep + elapsed
        self._recent_samples = self._recent_samples * keep + samples
        self._recent_waiting_s = self._recent_waiting_s * keep + self._seconds["waiting"]
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self.last = lap
        return lap

    @property
    def rate(self) -> float:
        """Smoothed samples per second; 0 before the first lap."""
        return self._recent_samples / self._recent_s if self._recent_s > 0 else 0.0

    @property
    def waiting_share(self) -> float:
        """Smoothed share of time spent waiting for other workers, 0 to 1; 0 before the first lap."""
        return self._recent_waiting_s / self._recent_s if self._recent_s > 0 else 0.0

    def _now(self) -> float:
        return (self._paused_at if self._pauses else self._clock()) - self._paused_s

    def _account(self) -> None:
        now = self._now()
        if self._open:
            self._seconds[self._open[-1]] += now - self._mark
        self._mark = now

    def _show(self, phase: int, since: float | None = None) -> None:
        self.shown[PHASE] = phase
        self.shown[SINCE] = self._mark + self._paused_s if since is None else since


class _PhaseContext:
    """Holds no state of its own, so one object serves every use of its phase, nested ones too."""

    __slots__ = ("_name", "_owner")

    def __init__(self, owner: StepClock, name: Phase) -> None:
        self._owner = owner
        self._name = name

    def __enter__(self) -> None:
        self._owner.start(self._name)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._owner.stop()
