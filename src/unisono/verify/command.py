"""The command ``unisono verify``, from options to exit status."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich.console import Console

from unisono.verify.against import reproduce
from unisono.verify.against import show as show_reproduction
from unisono.verify.against import to_json as reproduction_to_json
from unisono.verify.inquiry import EXIT_STATUS, inquire
from unisono.verify.report import show, to_json
from unisono.world import usable_cores


def verify(script: str, args: Sequence[str], *, workers: Sequence[int] | None, steps: int, threads: int, as_json: bool) -> int:
    """*local*. Verifies a script, shows the report, and returns the exit status: 0 equal, 1 not, 2 could not tell.

    Args:
        script: Its path.
        args: Its arguments.
        workers: Numbers of workers to compare with one; None: 2, 3 and the cores of this machine.
        steps: Optimizer steps of each trainer.
        threads: Threads per worker.
        as_json: JSON instead of a table.
    """
    counts = sorted(set(workers or (2, 3, usable_cores())) - {1})
    with _progress(quiet=as_json) as say:
        report = inquire(script, args, workers=counts, steps=steps, threads=threads, say=say)
    if as_json:
        print(to_json(report))
    else:
        show(report, Console())
    return EXIT_STATUS[report.verdict]


def verify_against(run_dir: str, script: str | None, args: Sequence[str], *, steps: int, as_json: bool) -> int:
    """*local*. Reproduces the beginning of a run; exit status as of ``verify``."""
    with _progress(quiet=as_json) as say:
        reproduction = reproduce(run_dir, script, args, steps=steps, say=say)
    if as_json:
        print(reproduction_to_json(reproduction))
    else:
        show_reproduction(reproduction, Console())
    return EXIT_STATUS[reproduction.verdict]


@contextlib.contextmanager
def _progress(*, quiet: bool) -> Iterator[Callable[[str], None]]:
    """Says on standard error what is going on; a stop ends what was started, and then this process, with the signal's status."""
    console = Console(stderr=True, quiet=quiet)

    def say(text: str) -> None:
        console.print(f"unisono verify: {text} ...", markup=False, highlight=False, soft_wrap=True)

    def stop(signum: int, _: Any) -> None:
        raise SystemExit(128 + signum)  # unwinds: runs are ended and their folder is removed

    before = {signum: signal.signal(signum, stop) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield say
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
