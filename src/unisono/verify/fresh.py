"""A dataset that reading does not change, and what reading would have changed."""

from __future__ import annotations

import copy
import os
import pickle
from collections.abc import Callable
from typing import Any

from unisono.verify.places import Snapshot
from unisono.verify.record import add


def fresh(dataset: Any, changed: list[str]) -> Any:
    """*local*. The dataset, of which reading changes nothing."""
    return (_FreshInOneGo if callable(getattr(dataset, "__getitems__", None)) else _Fresh)(dataset, changed)


class _Fresh:
    """A dataset of which every sample is read from the state that it had at the beginning.

    Where all of that state can be seen, it is put back after each sample. Else each is read in a forked child, which is then gone
    with all that reading has changed.
    """

    def __init__(self, dataset: Any, changed: list[str]) -> None:
        self._dataset, self._changed = dataset, changed
        snapshot = Snapshot({"dataset": dataset}, largest=1 << 40)
        self._snapshot = snapshot if snapshot.whole else None

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: Any) -> Any:
        return self._aside(lambda: self._dataset[index])

    def _aside(self, read: Callable[[], Any]) -> Any:
        if self._snapshot is None:
            return self._forked(read)
        try:
            return copy.deepcopy(read())  # it may be a view of what is put back now
        finally:
            add(self._changed, self._snapshot.restore())

    def _forked(self, read: Callable[[], Any]) -> Any:
        receives, sends = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(receives)
            try:
                snapshot = Snapshot({"dataset": self._dataset}) if not self._changed else None
                answer = pickle.dumps((None, read(), snapshot.changed() if snapshot is not None else []))
            except BaseException as error:
                answer = pickle.dumps((repr(error), None, []))
            with os.fdopen(sends, "wb") as pipe:
                pipe.write(answer)
            os._exit(0)
        os.close(sends)
        with os.fdopen(receives, "rb") as pipe:
            data = pipe.read()
        os.waitpid(pid, 0)
        failure, sample, changed = pickle.loads(data)
        if failure is not None:
            raise RuntimeError(failure)
        add(self._changed, changed)
        return sample


class _FreshInOneGo(_Fresh):
    def __getitems__(self, indices: list[int]) -> Any:
        return self._aside(lambda: list(self._dataset.__getitems__(indices)))
