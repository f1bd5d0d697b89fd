"""Two workers for a doctor that is alone: started, waited for, and ended. The process that does so needs no torch."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from unisono.doctor.records import Examination, loads_examination

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
    with tempfile.TemporaryDirectory(prefix="unisono-doctor-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        settings = json.dumps({"run_dir": run_dir, "workers": workers, "threads": threads})
        processes: list[subprocess.Popen[bytes]] = []
        try:
            for rank in range(_SIZE):
                with (folder / f"worker-{rank}.log").open("wb") as log:
                    command = [sys.executable, "-P", "-m", "unisono.doctor.local", name, str(rank), settings]
                    processes.append(
                        subprocess.Popen(
                            command, env=_environment(threads), stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
                        )
                    )
            failure = _wait(processes, folder)
        finally:
            for process in processes:
                if process.poll() is None:
                    process.kill()
                process.wait()
        return failure or loads_examination((folder / _RESULT).read_text())


def _environment(threads: int) -> dict[str, str]:
    """As `unisono run` sets it for its workers."""
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    if sys.platform == "linux":
        # Gloo would look up the host's own name, which not every machine can resolve.
        env.setdefault("GLOO_SOCKET_IFNAME", "lo")
    return env


def _wait(processes: Sequence[subprocess.Popen[bytes]], folder: Path) -> str:
    """Until all have ended, or one has failed, and the others had a moment to say why. Returns what went wrong."""
    deadline_s = time.monotonic() + _LIMIT_S
    failed_s: float | None = None
    while any(process.poll() is None for process in processes):
        now_s = time.monotonic()
        if failed_s is None and any(process.poll() for process in processes):
            failed_s = now_s
        if now_s > deadline_s:
            return f"two workers of this host had not found each other and finished after {_LIMIT_S:g} s"
        if failed_s is not None and now_s - failed_s > _GRACE_S:
            break
        time.sleep(_POLL_S)
    # A worker that died of a signal is the cause of the other's complaint.
    failures = [(process.returncode > 0, rank) for rank, process in enumerate(processes) if process.returncode]
    return _describe(min(failures)[1], processes, folder) if failures else ""


def _describe(rank: int, processes: Sequence[subprocess.Popen[bytes]], folder: Path) -> str:
    status = processes[rank].returncode
    how = f"was killed by {_signal_name(-status)}" if status < 0 else f"ended with status {status}"
    lines = (folder / f"worker-{rank}.log").read_text(errors="replace").strip().splitlines()
    return f"worker {rank} of {len(processes)} {how}" + (f": {lines[-1].strip()}" if lines else "")


def _signal_name(number: int) -> str:
    with contextlib.suppress(ValueError):
        return signal.Signals(number).name
    return f"signal {number}"


def _main(folder: Path, rank: int, settings: str) -> None:
    """What each of the two workers does."""
    from unisono.doctor.examination import Plan, connected, examine
    from unisono.doctor.records import dumps
    from unisono.world import World

    plan = json.loads(settings)
    world = World(rank=rank, size=_SIZE, local_rank=rank, local_size=_SIZE, threads=plan["threads"])
    with connected(world, (folder / "meeting").as_uri()) as (group, device):
        examination = examine(group, device, world, Plan(run_dir=plan["run_dir"], workers=plan["workers"]))
        if world.is_main:
            (folder / _RESULT).write_text(dumps(examination))
        group.barrier()


if __name__ == "__main__":
    _main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
