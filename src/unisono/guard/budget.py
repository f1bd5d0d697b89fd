"""How much of the time guards may take that do more the more time they have. *Local.*"""

from __future__ import annotations

import time
from collections.abc import Callable


class Credit:
    """Seconds that may be spent: a share of those that pass. All workers can reckon alike, if they are told alike.

    Args:
        share: Of the time that passes.
    """

    def __init__(self, share: float) -> None:
        self._share = share
        self._left_s = 0.0

    def earn(self, elapsed_s: float) -> None:
        """So much time has passed."""
        self._left_s += self._share * elapsed_s

    def affords(self, cost_s: float) -> bool:
        """Whether there is as much."""
        return self._left_s >= cost_s

    def missing(self, cost_s: float) -> float:
        """How many seconds must pass until there is as much."""
        return max(0.0, cost_s - self._left_s) / self._share

    def spend(self, cost_s: float) -> None:
        """Takes it, or all there is if that is less: what must be done is done, and nobody is in debt for it."""
        self._left_s = max(0.0, self._left_s - cost_s)


class Dose:
    """How much to do each time, so that it takes a share of the time, by this worker's own clock: at least 1.

    Args:
        share: Of the time from one time to the next.
        most: Not more than this.
        clock: Gives seconds; only differences are used.
    """

    def __init__(self, share: float, most: int, *, clock: Callable[[], float] = time.perf_counter) -> None:
        self.amount = 1
        self._share, self._most = share, most
        self._clock = clock
        self._spent_s = 0.0
        self._began_s: float | None = None

    def begin(self) -> float:
        """A part of what is done each time begins: the time, for ``end``."""
        return self._clock()

    def end(self, began_s: float) -> None:
        """The part that began then is done."""
        self._spent_s += self._clock() - began_s

    def adjust(self) -> None:
        """The next time begins: with twice as much, if all of the last time took less than half of what it may; with half as
        much if it took more than it may."""
        now_s = self._clock()
        if self._began_s is not None:
            may_s = self._share * (now_s - self._began_s)
            if self._spent_s > may_s:
                self.amount = max(1, self.amount // 2)
            elif 2 * self._spent_s < may_s:
                self.amount = min(self._most, 2 * self.amount)
        self._began_s, self._spent_s = now_s, 0.0
