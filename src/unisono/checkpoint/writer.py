"""Writing beside training: one background thread, one job at a time."""

from __future__ import annotations

import atexit
import threading
import weakref
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from unisono.errors import CheckpointError, UnisonoError

T = TypeVar("T")

AT_EXIT_S = 5.0
"""How long a process that ends waits for what it is still writing, in seconds."""


class BackgroundWriter(Generic[T]):
    """Runs jobs, one after the other, in a daemon thread. All methods are *local* and meant for one owner thread.

    At most one job is in flight. The thread is a daemon, and a process that ends gives it `AT_EXIT_S` seconds: an owner that
    wants its job finished calls `wait` before it ends. A job must not touch what training changes meanwhile: hand it a snapshot.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._job: tuple[int, Callable[[], T]] | None = None
        self._finished: list[tuple[int, T]] = []
        self._failed: list[tuple[int, BaseException]] = []
        self._closed = False

    def submit(self, step: int, job: Callable[[], T]) -> None:
        """Starts `job` in the background, after waiting for the job before it.

        An error of the job before it is kept for `done` or `wait`.

        Raises:
            RuntimeError: The writer was closed.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._job is None)
            if self._closed:
                raise RuntimeError("the checkpoint writer was closed")
            self._job = (step, job)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="unisono-checkpoint", daemon=True)
                self._thread.start()
                atexit.register(_at_exit, weakref.ref(self))
            self._changed.notify_all()

    def done(self) -> list[tuple[int, T]]:
        """(step, result) of the jobs that finished since the last call, without waiting.

        Raises:
            CheckpointError: A job failed. Each failure is raised once; results of other jobs come with the next call.
        """
        with self._changed:
            if self._failed:
                step, error = self._failed.pop(0)
                raise _as_checkpoint_error(step, error)
            finished, self._finished = self._finished, []
            return finished

    def wait(self) -> list[tuple[int, T]]:
        """Waits until no job is in flight, then as `done`."""
        with self._changed:
            self._changed.wait_for(lambda: self._job is None)
            return self.done()

    def settle(self, timeout_s: float) -> None:
        """Waits until no job is in flight, at most so many seconds."""
        with self._changed:
            self._changed.wait_for(lambda: self._job is None, timeout=timeout_s)

    def close(self) -> None:
        """Waits for the job in flight, then ends the thread. Results and errors stay for `done`."""
        with self._changed:
            self._changed.wait_for(lambda: self._job is None)
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._job is not None or self._closed)
                if self._job is None:
                    return
                step, job = self._job
            result: list[T] = []
            failure: BaseException | None = None
            try:
                result.append(job())
            except BaseException as error:  # whatever it is, the owner must hear of it, and must not wait forever
                failure = error
            # The snapshot that the job holds may be as large as the model.
            del job
            with self._changed:
                self._finished += [(step, value) for value in result]
                if failure is not None:
                    self._failed.append((step, failure))
                self._job = None
                self._changed.notify_all()


def _at_exit(writer: weakref.ref[BackgroundWriter[Any]]) -> None:
    """A daemon thread that is within C++ code when the interpreter goes takes the process with it, by SIGABRT."""
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
