"""A world of threads: several workers in one process, in milliseconds."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

from unisono.collective.base import Collective
from unisono.collective.inprocess import InProcess, Meeting
from unisono.errors import WorkerFailure

T = TypeVar("T")


def run_threads(size: int, work: Callable[[Collective], T], *, timeout_s: float = 60.0) -> list[T]:
    """*local*. Runs ``work(collective)`` on ``size`` workers, threads of this process that take turns.

    Args:
        size: Number of workers.
        work: Called once a worker, with that worker's collective.
        timeout_s: How long a worker waits for the others.

    Returns:
        What each worker returned, by rank.

    Raises:
        Exception: The first worker's own error; errors that only follow from it are dropped.
    """
    meeting = Meeting(size, timeout_s=timeout_s)
    results: dict[int, T] = {}
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        with meeting.baton:
            collective = InProcess(meeting, rank)
            try:
                results[rank] = work(collective)
            except BaseException as error:
                errors.append(error)
            finally:
                collective.close()

    threads = [threading.Thread(target=run, args=(rank,), name=f"worker {rank}", daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise next((error for error in errors if not isinstance(error, WorkerFailure)), errors[0])
    return [results[rank] for rank in range(size)]
