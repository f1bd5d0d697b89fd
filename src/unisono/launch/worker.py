"""What runs inside each worker: `python -m unisono.launch.worker SCRIPT ARGS…` runs SCRIPT as `python SCRIPT` would.

Differences from plain Python: an exception is not printed but recorded for the launcher, which prints the one that
caused the others; and nothing starts if the launcher is gone already.
"""

from __future__ import annotations

import faulthandler
import os
import runpy
import signal
import sys
from pathlib import Path

from unisono.launch.report import ERROR_FILE, describe, write_record

LAUNCHER_PID = "UNISONO_LAUNCHER_PID"
"""Environment variable: the process that must be this one's parent."""

BLOCKED_SIGNALS = (signal.SIGINT, signal.SIGTERM)
"""The launcher starts workers with these blocked, so that a stop during the start does not hit a bare interpreter."""


def main() -> None:
    """Run the script named by the arguments, then end with its status."""
    # If the launcher was killed before its guard heard of this process, nobody would ever end it.
    if os.getppid() != int(os.environ[LAUNCHER_PID]):
        sys.exit(1)
    script = sys.argv[1]
    del sys.argv[0]
    # This interpreter runs with -P so that files in the current directory cannot shadow what it imports; from here on
    # the script finds its neighbours, as always.
    if not os.environ.get("PYTHONSAFEPATH"):
        sys.path.insert(0, str(Path(script).resolve().parent))
    faulthandler.enable()  # a crash in native code leaves a trace in the log
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, BLOCKED_SIGNALS)
        status = _run(script)
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    sys.exit(status)


def _run(script: str) -> int:
    try:
        # Spawned loader workers import the main module again: run_path gives it the __file__ by which they find it.
        runpy.run_path(script, run_name="__main__")
    except KeyboardInterrupt:
        raise
    except SystemExit as stop:
        # A status speaks for itself: the script has said what it had to say, or it stopped as it was asked to.
        return stop.code or 0 if isinstance(stop.code, int | None) else _record(stop)
    except BaseException as error:
        return _record(error)
    return 0


def _record(error: BaseException) -> int:
    write_record(describe(error), Path(os.environ[ERROR_FILE]))
    return 1


if __name__ == "__main__":
    main()
