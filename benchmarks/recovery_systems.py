"""The systems whose recovery is compared: how each is started, and kept alive, on this machine."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path

from recovery_peers.journal import Job

HERE = Path(__file__).parent
SCRIPTS = HERE / "recovery_peers"
MAX_RESTARTS = "100"
START_S, LEAVE_S = 60.0, 10.0
"""How long a lighthouse may take to start, and a launcher to end its workers when the harness has seen enough."""


class Running(ABC):
    """A system that trains a job."""

    @abstractmethod
    def tend(self) -> int | None:
        """Starts again what this system leaves to others; the exit status once it has ended, until then None."""

    @abstractmethod
    def close(self) -> None:
        """Ends every process that it started."""


def _open(command: list[str], folder: Path, name: str, **environment: str) -> subprocess.Popen[bytes]:
    with (folder / f"{name}.log").open("ab") as log:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            start_new_session=True,
        )


class Launched(Running):
    """One command that starts the workers, and new ones for dead ones, by itself."""

    def __init__(self, command: list[str], job: Job, **environment: str) -> None:
        self._process = _open([*command, str(job.write())], Path(job.folder), "output", **environment)

    def tend(self) -> int | None:
        return self._process.poll()

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(LEAVE_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
        self._process.wait()


class Replicas(Running):
    """torchft: a lighthouse, and replica groups of one worker, each started again at once when it dies."""

    def __init__(self, job: Job, *, mended: bool = True, **timeouts_ms: int) -> None:
        self._job, self._path, self._mended = job, job.write(), mended
        port = Path(job.folder) / "lighthouse"
        command = [sys.executable, str(SCRIPTS / "lighthouse.py"), str(port), json.dumps(timeouts_ms)]
        self._lighthouse = _open(command, Path(job.folder), "lighthouse")
        deadline = time.monotonic() + START_S
        while not port.exists():
            if self._lighthouse.poll() is not None or time.monotonic() > deadline:
                _kill(self._lighthouse)
                raise OSError(f"the lighthouse of torchft does not start: {(Path(job.folder) / 'lighthouse.log').read_text()}")
            time.sleep(0.05)
        self._address = f"http://localhost:{port.read_text()}"
        self._replicas = [self._start(replica) for replica in range(job.workers)]

    def _start(self, replica: int) -> subprocess.Popen[bytes]:
        script, how = str(SCRIPTS / "torchft_script.py"), "mended" if self._mended else "as it is"
        command = [sys.executable, script, str(self._path), str(replica), self._address, how]
        return _open(command, Path(self._job.folder), f"output-{replica}")

    def tend(self) -> int | None:
        statuses = [process.poll() for process in self._replicas]
        if 0 in statuses:
            return self._last(statuses)
        for replica, status in enumerate(statuses):
            if status is not None:
                self._replicas[replica] = self._start(replica)
        return None

    def _last(self, statuses: list[int | None]) -> int | None:
        """One has done the last step: so have all that took part in it. Who is not there by then would begin from nothing."""
        finals = list(self._job.final.parent.glob("final-*.safetensors"))
        deadline = max(path.stat().st_mtime for path in finals) + LEAVE_S
        return 0 if all(status is not None for status in statuses) or time.time() > deadline else None

    def close(self) -> None:
        for process in (*self._replicas, self._lighthouse):
            _kill(process)


def _kill(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


@dataclasses.dataclass(frozen=True, kw_only=True)
class System:
    """A way to survive the death of a worker."""

    name: str
    start: Callable[[Job], Running]
    steps_a_kill: int
    """Enough for a worker to die and be replaced while the others go on, and for some undisturbed steps."""
    module: str = "torch"
    note: str = ""
    """How it is set up."""

    @property
    def missing(self) -> str | None:
        """Why it cannot run here, if so."""
        if importlib.util.find_spec(self.module) is not None:
            return None
        return f"{self.module} is not installed: pip install -c constraints.txt -e '.[bench-recovery]'"


def _unisono(job: Job) -> Running:
    options = ["--workers", str(job.workers), "--max-restarts", MAX_RESTARTS]
    return Launched([sys.executable, "-m", "unisono.launch", "run", *options, str(SCRIPTS / "unisono_script.py")], job)


def _torchrun(job: Job) -> Running:
    options = ["--standalone", "--nproc-per-node", str(job.workers), "--max-restarts", MAX_RESTARTS]
    command = [sys.executable, "-m", "torch.distributed.run", *options, str(SCRIPTS / "torchrun_script.py")]
    # Else workers that start again find the addresses of the dead ones in the store that they share with the agent, and none
    # of the 100 restarts succeeds (PyTorch issue 135712; seen with 2.13).
    return Launched(command, job, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")


SYSTEMS = {
    system.name: system
    for system in (
        System(name="unisono", start=_unisono, steps_a_kill=80, note="`unisono run --max-restarts 100`"),
        System(
            name="torchrun",
            start=_torchrun,
            steps_a_kill=50,
            note="`torchrun --max-restarts 100`, DistributedDataParallel, a checkpoint after each step (`torch.save`, rename)",
        ),
        System(
            name="torchft",
            start=lambda job: Replicas(job, quorum_tick_ms=100, join_timeout_ms=10_000),
            steps_a_kill=150,
            module="torchft",
            note="as its README and train_ddp.py: dead after 5 s without heartbeat; its hook fixed as in `torchft_script.py`",
        ),
        System(
            name="torchft, 1 s",
            start=lambda job: Replicas(job, quorum_tick_ms=100, join_timeout_ms=10_000, heartbeat_timeout_ms=1000),
            steps_a_kill=150,
            module="torchft",
            note="the same, but dead after 1 s without heartbeat",
        ),
        System(
            name="torchft as it is",
            start=lambda job: Replicas(job, mended=False, quorum_tick_ms=100, join_timeout_ms=10_000),
            steps_a_kill=150,
            module="torchft",
            note="without that: all survivors end with an AssertionError, and what nobody holds is begun again",
        ),
    )
}
