"""One training in every way: on 1, 2 and 3 workers, stopped and resumed on another number of them, with deaths."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

from tests.fault_injection import Death, run_lives
from tests.memory import empty_memory
from tests.training.hard_problem import digest
from tests.training.small_run import Dies, Killed, memory_url
from unisono import Callback, Trainer
from unisono.testing import run_threads

Found = dict[str, str]


class Train(Protocol):
    """Trains with these workers (None: alone) in this run directory, with these callbacks besides its own."""

    def __call__(self, workers: Any, run_dir: str | None, callbacks: Sequence[Callback]) -> Found:
        """What came out."""
        ...


def weights(trainer: Trainer) -> Found:
    """Digests of all parameters and buffers, hidden ones included."""
    return {name: digest(value) for name, value in [*trainer.model.named_parameters(), *trainer.model.named_buffers()]}


def check_numbers_of_workers(train: Train) -> Found:
    """What comes out on one worker; it is the same on two and three."""
    expected = train(None, None, ())
    for workers in (2, 3):
        for found in run_threads(workers, partial(train, run_dir=None, callbacks=())):
            assert found == expected, f"on {workers} workers"
    return expected


def check_resume(train: Train, expected: Found, *, stop: int) -> None:
    """Stopped after step ``stop`` by an error, with a checkpoint before it, and resumed on another number of workers."""
    for first, second in ((2, 3), (1, 2), (3, 1)):
        run_dir = memory_url()
        try:
            run_threads(first, partial(train, run_dir=run_dir, callbacks=[Dies(stop)]))
        except Killed:
            pass
        else:
            raise AssertionError("it did not stop")
        for found in run_threads(second, partial(train, run_dir=run_dir, callbacks=())):
            assert found == expected, f"stopped on {first}, resumed on {second}"
    empty_memory()


def check_deaths(train: Train, expected: Found, *, calls: Sequence[int] = (12, 31, 47), joiners: int = 1) -> None:
    """One of two or three workers dies at one of its calls to the others, and another one comes and takes its place."""
    late = 0
    for number, call in enumerate(calls):
        workers = 2 + number % 2
        victim = number % workers
        for told in (False, True):
            deaths = {victim: Death(call, told)}
            work = partial(train, run_dir=memory_url(), callbacks=())
            lives = run_lives(workers, work, deaths, joiners=joiners)
            for rank, found in lives.results.items():
                if rank >= workers and lives.calls[rank] <= 10:
                    continue  # it came when all was done, and took the weights alone
                assert found == expected, f"worker {rank}, when {victim} of {workers} died at call {call}, told: {told}"
            late += any(lives.calls[rank] > 10 for rank in range(workers, workers + joiners))
            empty_memory()
    assert late or not joiners, "nobody came in time"


def check_all(train: Train, *, stop: int, calls: Sequence[int] = (12, 31, 47)) -> Found:
    """All of these."""
    expected = check_numbers_of_workers(train)
    check_resume(train, expected, stop=stop)
    check_deaths(train, expected, calls=calls)
    return expected
