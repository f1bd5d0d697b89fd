"""Keeping optional work within a share of the time. *Local.*"""

from __future__ import annotations

import time
from collections.abc import Callable


class Credit:
    """Seconds that may be spent: a share of those that pass. Workers that are told the same compute the same.

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
        """Whether that much is left."""
        return self._left_s >= cost_s

    def missing(self, cost_s: float) -> float:
        """Seconds that must pass until that much is left."""
        return max(0.0, cost_s - self._left_s) / self._share

    def spend(self, cost_s: float) -> None:
        """Takes that much, or all that is left: work that had to be done leaves no debt."""
        self._left_s = max(0.0, self._left_s - cost_s)


class Dose:
    """How much to do each time, at least 1, so that it takes a share of the time by this worker's own clock.

    Args:
        share: Of the time from one ``adjust`` to the next.
        most: The largest amount.
        clock: Gives seconds; only differences are used.
    """

    def __init__(self, share: float, most: int, *, clock: Callable[[], float] = time.perf_counter) -> None:
        self.amount = 1
        self._share, self._most, self._clock = share, most, clock
        self._spent_s = 0.0
        self._began_s: float | None = None

    def begin(self) -> float:
        """Part of the work begins: the time, for ``end``."""
        return self._clock()

    def end(self, began_s: float) -> None:
        """The part that began then is done."""
        self._spent_s += self._clock() - began_s

    def adjust(self) -> None:
        """Halves the amount if the last round took more than its share, doubles it if it took less than half of that."""
        now_s = self._clock()
        if self._began_s is not None:
            share_s = self._share * (now_s - self._began_s)
            if self._spent_s > share_s:
                self.amount = max(1, self.amount // 2)
            elif 2 * self._spent_s < share_s:
                self.amount = min(self._most, 2 * self.amount)
        self._began_s, self._spent_s = now_s, 0.0
