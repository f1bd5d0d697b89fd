"""Writing in the background while training goes on: one job at a time, in a thread of its own."""

from __future__ import annotations

import atexit
import threading
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from unisono.errors import CheckpointError, UnisonoError

T = TypeVar("T")

AT_EXIT_S = 5.0
"""How long a process that ends waits for what it is still writing, in seconds."""


class BackgroundWriter(Generic[T]):
    """Runs jobs, one after the other, in daemon threads. All methods are *local* and meant for one owner thread.

    At most one job is in flight. A process that ends gives it `AT_EXIT_S` seconds: an owner that wants its job finished calls
    `wait` before. A job must not touch what training changes meanwhile: hand it a snapshot.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._finished: deque[tuple[int, T]] = deque()
        self._failed: deque[tuple[int, BaseException]] = deque()
        self._closed = False
        self._registered = False

    def submit(self, step: int, job: Callable[[], T]) -> None:
        """Starts `job` in the background, after waiting for the job before it, whose error is kept for `done` or `wait`.

        Raises:
            RuntimeError: The writer was closed.
        """
        self.settle()
        if self._closed:
            raise RuntimeError("the checkpoint writer was closed")
        if not self._registered:
            atexit.register(_at_exit, weakref.ref(self))
            self._registered = True
        self._thread = threading.Thread(target=self._run, args=(step, job), name="unisono-checkpoint", daemon=True)
        self._thread.start()

    def done(self) -> list[tuple[int, T]]:
        """(step, result) of the jobs that finished since the last call, without waiting.

        Raises:
            CheckpointError: A job failed. Each failure is raised once; results of other jobs come with the next call.
        """
        if self._failed:
            raise _as_checkpoint_error(*self._failed.popleft())
        return [self._finished.popleft() for _ in range(len(self._finished))]

    def wait(self) -> list[tuple[int, T]]:
        """Waits until no job is in flight, then as `done`."""
        self.settle()
        return self.done()

    def settle(self, timeout_s: float | None = None) -> None:
        """Waits until no job is in flight, at most so many seconds."""
        if self._thread is not None:
            self._thread.join(timeout_s)

    def close(self) -> None:
        """Waits for the job in flight, and accepts no others. Results and errors stay for `done`."""
        self.settle()
        self._closed = True

    def _run(self, step: int, job: Callable[[], T]) -> None:
        try:
            self._finished.append((step, job()))
        except BaseException as error:  # of any kind: the owner must get it
            self._failed.append((step, error))


def _at_exit(writer: weakref.ref[BackgroundWriter[Any]]) -> None:
    """A daemon thread that runs C++ code when the interpreter ends would abort the process (SIGABRT)."""
    if (alive := writer()) is not None:
        alive.settle(AT_EXIT_S)


def _as_checkpoint_error(step: int, error: BaseException) -> UnisonoError:
    if isinstance(error, CheckpointError):
        return error
    wrapped = CheckpointError(
        f"the checkpoint of step {step} could not be written: {type(error).__name__}: {error}. What was saved before is whole."
    )
    wrapped.__cause__ = error
    return wrapped
