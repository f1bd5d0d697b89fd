"""How a trainer does things together with the other workers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence


class Session:
    """Does them, and nothing else: the workers stay who they are."""

    @contextlib.contextmanager
    def updating(self, step: int, flags: Sequence[int], step_s: float, *, skips: bool = False) -> Iterator[None]:
        """*collective*. Around the update, in place, of what this worker updates in step ``step``.

        Args:
            flags: What every worker's session has told the others with this step, by rank.
            step_s: Seconds that the step before took, as all workers know it; 0 if they do not.
            skips: Whether the step updates nothing.
        """
        yield
