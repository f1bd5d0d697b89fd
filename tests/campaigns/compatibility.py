"""Campaign: trainings with other people's libraries, in every way in which the weights must come out the same.

    python -m venv /tmp/compatibility && . /tmp/compatibility/bin/activate
    pip install -c constraints.txt -e '.[test]' -r tests/campaigns/compatibility.txt
    python -m tests.campaigns.compatibility [NAME...]

Each of ``compatible_trainings.py`` is trained in threads on 1, 2 and 3 workers, stopped and resumed on another number of them,
and with a worker that dies and another that joins. It prints a line for each: *exact*; *refused* by unisono, with the message;
*fails* with an error that is not unisono's; or *different*, with the ways in which it comes out otherwise and the first tensor.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import io
import random
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

import unisono
from tests.campaigns.compatible_trainings import CASES, Case, MovingAverage
from tests.catalogue.unbroken import Found, weights
from tests.fault_injection import Death, run_lives
from tests.memory import empty_memory
from tests.training.hard_problem import digest
from tests.training.small_run import Dies, Killed, memory_url
from unisono.testing import run_threads

STOP = 4
"""The run is stopped after this step of six, in its second epoch."""
RESUMES = ((2, 3), (3, 1), (1, 2))
DEATHS = ((2, 1, 21), (3, 0, 26))
"""Workers, the one that dies, and at which of its calls to the others."""


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What came of one training."""

    word: str
    detail: str = ""


def train(case: Case, workers: Any, run_dir: str | None, callbacks: Sequence[unisono.Callback] = ()) -> Found:
    """The digests of all parameters and buffers after training."""
    torch.manual_seed(3)
    np.random.seed(3)
    random.seed(3)
    training = case.make()
    defaults: dict[str, Any] = {"batch_size": 8, "microbatches": 4, "sync": unisono.Exact(replicate_kib=0), "max_grad_norm": 1.0}
    optimizer = training.optimizer(training.model)
    if training.scheduler is not None:
        defaults["scheduler"] = training.scheduler(optimizer)
    trainer = unisono.Trainer(
        training.model,
        optimizer,
        training.loss,
        **{**defaults, **training.settings},
        run_dir=run_dir,
        checkpoint_every=None if run_dir is None else 2,
        callbacks=[*training.callbacks, *callbacks],
        collective=workers,
    )
    before = weights(trainer)
    trainer.fit(training.dataset, 2)
    after = weights(trainer)
    for callback in filter(lambda one: isinstance(one, MovingAverage), training.callbacks):
        state = callback.state_dict()["average"]
        after |= {f"average.{name}": digest(value) for name, value in state.items() if isinstance(value, torch.Tensor)}
        after |= {f"average.{n}[{i}]": digest(x) for n, v in state.items() if isinstance(v, list) for i, x in enumerate(v)}
    assert run_dir is not None or before != after, "nothing was trained"
    assert all(bool(parameter.isfinite().all()) for parameter in training.model.parameters())
    return after


def judge(case: Case) -> Verdict:
    """One training in every way."""
    try:
        expected = train(case, None, None)
        if train(case, None, None) != expected:
            run_threads(2, partial(train, case, run_dir=None))  # for its warnings
            return Verdict("different", "does not even repeat itself on one worker")
        different = [*_on_workers(case, expected), *_resumed(case, expected), *_with_deaths(case, expected)]
    except unisono.UnisonoError as error:
        return Verdict("refused", _first_line(error))
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        return Verdict("fails", f"{_first_line(error)} ({place.filename.rpartition('site-packages/')[2]}:{place.lineno})")
    finally:
        empty_memory()
    return Verdict("different", "; ".join(different)) if different else Verdict("exact")


def _on_workers(case: Case, expected: Found) -> list[str]:
    return [
        f"on {workers} workers{_where(found, expected)}"
        for workers in (2, 3)
        for found in run_threads(workers, partial(train, case, run_dir=None))[:1]
        if found != expected
    ]


def _resumed(case: Case, expected: Found) -> list[str]:
    different = []
    for first, second in RESUMES:
        run_dir = memory_url()
        with contextlib.suppress(Killed):
            run_threads(first, partial(train, case, run_dir=run_dir, callbacks=[Dies(STOP)]))
        found = run_threads(second, partial(train, case, run_dir=run_dir))[0]
        if found != expected:
            different.append(f"stopped on {first} and resumed on {second}{_where(found, expected)}")
    return different


def _with_deaths(case: Case, expected: Found) -> list[str]:
    different = []
    for workers, victim, call in DEATHS:
        work = partial(train, case, run_dir=memory_url())
        lives = run_lives(workers, work, {victim: Death(call)}, joiners=1)
        if victim in lives.results:
            raise RuntimeError(f"worker {victim} makes fewer than {call} calls")
        for rank, found in lives.results.items():
            if found != expected:
                what = f"who joined after a death on {workers}" if rank >= workers else f"after a death on {workers}"
                different.append(f"{what}{_where(found, expected)}")
    return different


def _where(found: Found, expected: Found) -> str:
    names = [name for name, value in expected.items() if found.get(name) != value]
    return f": {names[0]} and {len(names) - 1} more" if names else ""


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"


def versions(case: Case) -> str:
    """Of the case's packages."""
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in case.packages)


def quietly(work: Callable[[], Verdict]) -> tuple[Verdict, list[str]]:
    """What came of it, and what unisono has warned of."""
    with warnings.catch_warnings(record=True) as caught, contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("always")
        verdict = work()
    ours = [str(entry.message) for entry in caught if "unisono" in entry.filename or "unisono" in str(entry.message)]
    return verdict, list(dict.fromkeys(ours))


def main(wanted: Sequence[str]) -> int:
    torch.set_num_threads(1)
    count: dict[str, int] = {}
    for name, case in CASES.items():
        if wanted and not any(name.startswith(word) for word in wanted):
            continue
        began_s = time.monotonic()
        verdict, warned = quietly(partial(judge, case))
        count[verdict.word] = count.get(verdict.word, 0) + 1
        print(f"{name:34} {verdict.word:10} {time.monotonic() - began_s:5.1f} s  {versions(case)}  {verdict.detail}", flush=True)
        for text in warned:
            print(f"{'':34} warned: {text[:300]}", flush=True)
    print(", ".join(f"{number} {word}" for word, number in sorted(count.items())))
    return int("different" in count)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
