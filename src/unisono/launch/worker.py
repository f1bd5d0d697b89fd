"""What runs inside each worker, a child of the fork server or `python -m unisono.launch.worker SCRIPT ARGS…`: the script.

It runs as under `python SCRIPT ARGS…`.

Differences from plain Python: an exception is not printed but recorded for the launcher, which prints the one that
caused the others; and nothing starts if the launcher is gone already.
"""

from __future__ import annotations

import faulthandler
import os
import re
import runpy
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

from unisono.launch.report import ERROR_FILE, describe, write_record
from unisono.system.fork_server import BLOCKED_SIGNALS
from unisono.system.output import say
from unisono.system.process import run_exit_functions

LAUNCHER_PID = "UNISONO_LAUNCHER_PID"
"""Environment variable: the process that must be this one's parent."""

TERMINAL = "UNISONO_TERMINAL"
"""Environment variable: numbers of the descriptors that are the launcher's standard output and error."""


def main() -> None:
    """Run the script named by the arguments, in an interpreter of its own, then end with its status."""
    for descriptor in filter(None, os.environ.get(TERMINAL, "").split(",")):
        os.set_inheritable(int(descriptor), False)  # for this process, and not for what it starts
    # If the launcher was killed before its reaper heard of this process, nothing would ever end it.
    if os.getppid() != int(os.environ[LAUNCHER_PID]):
        sys.exit(1)
    _work(sys.argv[1:])


def forked(spec: Mapping[str, Any]) -> None:
    """Run the script named by `spec["command"]`, in a child of the fork server, then end with its status."""
    _work(spec["command"])


def _work(command: Sequence[str]) -> None:
    sys.argv[:] = command
    script = command[0]
    # This interpreter runs with -P so that files in the current directory cannot shadow what it imports; from here on
    # the script finds its neighbours, as always.
    if not os.environ.get("PYTHONSAFEPATH"):
        sys.path.insert(0, str(Path(script).resolve().parent))
    faulthandler.enable()  # a crash in native code leaves a trace in the log
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, BLOCKED_SIGNALS)
        _run(script)
    except KeyboardInterrupt:
        run_exit_functions()
        # To die of the signal tells the launcher that this worker has saved nothing.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)


def _run(script: str) -> None:
    try:
        # Spawned loader workers import the main module again: run_path gives it the __file__ by which they find it.
        runpy.run_path(script, run_name="__main__")
        _say_over()
        _say_if_all_did_the_same(script)
    except KeyboardInterrupt:
        raise
    except SystemExit as stop:
        if not stop.code:
            _say_over(early=True)
            if _is_from_a_module(stop.__traceback__):
                _say_if_all_did_the_same(script)
        # A status speaks for itself: the script has said what it had to say, or it stopped as it was asked to.
        if isinstance(stop.code, int | None):
            raise
        _fail(stop)
    except BaseException as error:
        _fail(error)


def _say_over(*, early: bool = False) -> None:
    """The script has come to its end: dead workers need not be replaced any more."""
    link = sys.modules.get("unisono.elastic.link")
    if link is not None:  # else no Trainer was made
        link.say_over(early=early)


def _is_from_a_module(trace: TracebackType | None) -> bool:
    """Whether a script ended by `sys.exit(main())`; not, for instance, within an option such as --help."""
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_code.co_name == "<module>"


def _say_if_all_did_the_same(script: str) -> None:
    """Warn about a script without a Trainer: each worker has done all of the work, and only one is heard."""
    size = os.environ.get("WORLD_SIZE", "1")
    if os.environ.get("RANK") == "0" and size != "1" and not _knows_of_others(script):
        say(f"unisono: the script made no unisono.Trainer: each of the {size} workers ran all of it", error=True)


def _knows_of_others(script: str) -> bool:
    """Whether the script made a Trainer, used torch.distributed, or asked for its rank."""
    link, unisono = sys.modules.get("unisono.elastic.link"), sys.modules.get("unisono")
    if (link is not None and link._links) or "World" in vars(unisono):  # an attribute only once it was used
        return True
    # The name of the backend is all of init_process_group() that outlives destroy_process_group().
    groups = sys.modules.get("torch.distributed.distributed_c10d")
    if groups is not None and getattr(groups, "_backend", "unknown") is not None:
        return True
    text = Path(script).read_text(encoding="utf-8", errors="replace")
    return re.search(r"RANK|WORLD_SIZE|\bWorld\b", text) is not None


def _fail(error: BaseException) -> NoReturn:
    write_record(describe(error), Path(os.environ[ERROR_FILE]))
    run_exit_functions()
    os._exit(1)


if __name__ == "__main__":
    main()
