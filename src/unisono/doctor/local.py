"""Two workers for a doctor that is alone: started, waited for, and ended. The process that does so needs no torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from unisono.doctor.facts import Examination, loads
from unisono.system.process import ending

_SIZE = 2
_LIMIT_S = 150.0
_GRACE_S = 1.0
_POLL_S = 0.02
_RESULT = "examination.json"


def examine(*, run_dir: str, workers: int, threads: int) -> Examination | str:
    """What two workers of this host find out, or why they could not. *local*

    Args:
        run_dir: The run directory, a path or URL.
        workers: How many workers a run has.
        threads: Threads per worker.
    """
    settings = json.dumps({"run_dir": run_dir, "workers": workers, "threads": threads})
    # As `unisono run` sets it for its workers. Gloo would look up the host's own name, which not every machine can resolve.
    env = {"GLOO_SOCKET_IFNAME": "lo", **os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    with tempfile.TemporaryDirectory(prefix="unisono-doctor-", ignore_cleanup_errors=True) as name, ExitStack() as stack:
        processes: list[subprocess.Popen[bytes]] = []
        for rank in range(_SIZE):
            command = [sys.executable, "-P", "-m", "unisono.doctor.local", name, str(rank), settings]
            with _log(name, rank).open("wb") as log:
                process = subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
            stack.callback(process.wait)
            stack.callback(process.kill)
            processes.append(process)
        return _wait(processes, name) or loads(Examination, Path(name, _RESULT).read_bytes())


def _log(folder: str, rank: int) -> Path:
    return Path(folder, f"worker-{rank}.log")


def _wait(processes: Sequence[subprocess.Popen[bytes]], folder: str) -> str:
    """Until all have ended, or one has failed, and the others had a moment to say why. Returns what went wrong."""
    deadline_s = time.monotonic() + _LIMIT_S
    failing = False
    while any(process.poll() is None for process in processes):
        if not failing and any(process.returncode for process in processes):
            failing, deadline_s = True, time.monotonic() + _GRACE_S
        if time.monotonic() > deadline_s:
            if not failing:
                return f"two workers of this host had not found each other and finished after {_LIMIT_S:g} s"
            break
        time.sleep(_POLL_S)
    # A worker that died of a signal is the cause of the other's complaint.
    failures = [(process.returncode > 0, rank) for rank, process in enumerate(processes) if process.returncode]
    if not failures:
        return ""
    rank = min(failures)[1]
    lines = _log(folder, rank).read_text(errors="replace").strip().splitlines()
    how = ending(processes[rank].returncode, hint=not lines)
    return f"worker {rank} of {len(processes)} {how}" + (f": {lines[-1].strip()}" if lines else "")


def _main(folder: Path, rank: int, settings: str) -> None:
    """What each of the two workers does."""
    from unisono.doctor.examination import connected, examine
    from unisono.doctor.facts import dumps
    from unisono.world import World

    plan = json.loads(settings)
    world = World(rank=rank, size=_SIZE, local_rank=rank, local_size=_SIZE, threads=plan["threads"])
    with connected(world, (folder / "meeting").as_uri()) as (group, device):
        examination = examine(group, device, world, run_dir=plan["run_dir"], workers=plan["workers"])
        if world.is_main:
            (folder / _RESULT).write_bytes(dumps(examination))
        group.barrier()


if __name__ == "__main__":
    _main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
