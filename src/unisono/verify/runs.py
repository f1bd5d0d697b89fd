"""Runs of the script, as the questions need them: each is made once, in a folder of its own, by children of the fork servers."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pickle
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from unisono.system.fork_server import Child, overlaid, wait_for_end
from unisono.system.reaper import end_groups, end_processes
from unisono.verify.job import Change, Job, RunSpec
from unisono.verify.record import Note, ScriptFailure, TrainerRecord, WorkerRecord
from unisono.verify.servers import ForkServers
from unisono.world import usable_cores

_FIRST_LIMIT_S = 600.0
_BRIEF = 500
_GRACE_S = 2.0
"""How long the other workers may take once one has failed."""
_LEFT_S = 0.2
"""How long what a worker has left behind may take to end."""
_LOOK_S = 0.5
"""How often a wait looks whether everything is to stop."""
_NEVER_PRELOADED = ("tensorflow", "jax", "jaxlib", "cupy", "ray", "__")
"""They start threads, or open a device, at import: nothing could be forked afterwards."""


@dataclasses.dataclass(frozen=True)
class RunOutcome:
    """What came out of a job."""

    job: Job
    folder: Path
    records: tuple[WorkerRecord | None, ...]
    """By rank; None: the worker died before it could write one."""
    statuses: tuple[int | None, ...]
    """Exit status by rank; None: it was ended because it took too long."""
    seconds: float

    @property
    def first(self) -> WorkerRecord:
        """Worker 0's record."""
        return self.records[0] or WorkerRecord()

    @property
    def trainers(self) -> list[TrainerRecord]:
        """Worker 0's trainers."""
        return self.first.trainers

    @property
    def failure(self) -> ScriptFailure | None:
        """Why the run did not come to its end: of all failures the one that caused the others."""
        known = [record.failure for record in self.records if record is not None and record.failure is not None]
        if known:
            return min(known, key=lambda one: (one.secondary, one.time_s))
        for rank, (record, status) in enumerate(zip(self.records, self.statuses, strict=True)):
            if record is None:
                how = "did not end in time" if status is None else f"died with status {status}"
                told = f"worker {rank} {how}{self._last_words(rank)}"
                return ScriptFailure(kind="death", message=told, traceback="", secondary=False, time_s=0.0, worker=rank)
        return None

    def tensors(self, trainer: int, step: int, rank: int = 0) -> dict[str, dict[str, Any]] | None:
        """What was kept of a step: "model" and "optimizer", by name."""
        import torch

        file = self.folder / f"tensors-{trainer}-{step}-{rank}.pt"
        loaded: dict[str, dict[str, Any]] | None = torch.load(file, weights_only=True) if file.exists() else None
        return loaded

    def notes(self, kind: str) -> list[Note]:
        """What workers noted about the script, each once."""
        return self._union(lambda record: record.notes.get(kind, []))

    def every(self, field: str) -> list[str]:
        """The union over workers of a list in their records."""
        return self._union(lambda record: getattr(record, field))

    def _union(self, pick: Callable[[WorkerRecord], list[Any]]) -> list[Any]:
        return list(dict.fromkeys(item for record in self.records if record is not None for item in pick(record)))

    def _last_words(self, rank: int) -> str:
        file = self.folder / f"output-{rank}.txt"
        lines = file.read_text(errors="replace").strip().splitlines()[-3:] if file.exists() else []
        return f"; its last words: {' | '.join(lines)}" if lines else ""


class Runs:
    """Makes runs. Used as a context. All methods are *local*.

    Args:
        servers: Where its processes come from.
        script: Path of the user's script.
        args: Its arguments.
        steps: Optimizer steps to look at.
        threads: Threads per worker.
    """

    def __init__(self, servers: ForkServers, script: str, args: Sequence[str], *, steps: int, threads: int) -> None:
        self.script, self.args, self.steps, self.threads = script, list(args), steps, threads
        self.made = 0
        """How often the script was run."""
        self.held: list[list[dict[str, Any]]] = []
        """For each trainer, the optimizer's settings on one worker."""
        self._known: dict[Job, Future[RunOutcome]] = {}
        self._servers = servers
        self._all_cores = max(1, usable_cores())
        self._cores = threading.BoundedSemaphore(self._all_cores)
        self._lock = threading.Lock()
        self._turn = threading.Lock()
        self._limit_s = _FIRST_LIMIT_S
        self._stops = threading.Event()
        self._closing = contextlib.ExitStack()

    def __enter__(self) -> Runs:
        self.folder = Path(tempfile.mkdtemp(prefix="unisono-verify-"))
        self._closing.callback(shutil.rmtree, self.folder, ignore_errors=True)
        self._pool = ThreadPoolExecutor(max_workers=16)
        self._closing.callback(self._pool.shutdown, wait=True, cancel_futures=True)
        self._closing.callback(self._stops.set)  # only after an error or Ctrl-C does anything still run
        for second in (False, True):
            self._servers.get(self._interpreter(Job(second=second, threads=self.threads), 0))
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.close()

    def __call__(self, job: Job) -> RunOutcome:
        """The run of a job, made now or before."""
        return self.start(job).result()

    def start(self, job: Job) -> Future[RunOutcome]:
        """The run of a job, to come."""
        if job.teacher is not None:
            self.start(job.teacher)  # it stands before this one in the queue, so nobody waits for ever
        with self._lock:
            if job not in self._known:
                self._known[job] = self._pool.submit(self._make, job, len(self._known))
            return self._known[job]

    def all(self, jobs: Sequence[Job]) -> list[RunOutcome]:
        """Several runs, side by side as far as there are cores."""
        return [future.result() for future in [self.start(job) for job in jobs]]

    def learn(self, run: RunOutcome) -> None:
        """What the first run tells about how to make the others: its libraries, its duration, its settings."""
        record = run.first
        self.held = [trainer.settings for trainer in record.trainers]
        self._limit_s = 60.0 + 20.0 * run.seconds
        self._servers.preload([name for name in record.modules if not name.startswith(_NEVER_PRELOADED)])

    # ------------------------------------------------------------------

    def _interpreter(self, job: Job, rank: int) -> Mapping[str, str]:
        """Variables that are read when an interpreter starts: neighbouring workers hash strings differently."""
        second = (rank % 2 == 1) != job.second and Change.SAME_HASH not in job.changes
        threads = str(job.threads)
        return {
            "PYTHONHASHSEED": os.environ.get("PYTHONHASHSEED") or ("2" if second else "1"),
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            "UNISONO_THREADS": threads,
            **dict(job.environment),
        }

    def _make(self, job: Job, number: int) -> RunOutcome:
        folder = self.folder / f"run-{number}"
        folder.mkdir()
        teacher = None if job.teacher is None else self(job.teacher).folder
        spec = RunSpec(
            job=job,
            script=self.script,
            args=self.args,
            steps=self.steps,
            scratch=self.folder,
            folder=folder,
            teacher=teacher,
            held=self.held,
        )
        (folder / "spec.pickle").write_bytes(pickle.dumps(spec))
        children: list[Child] = []
        with self._enough_cores(job):
            began_s = time.monotonic()
            port = _free_port()
            self.made += 1
            try:
                for rank in range(job.workers):
                    children.append(self._start(job, rank, folder, port))
                statuses = self._wait(children)
            finally:
                self._end(children)
            seconds = time.monotonic() - began_s
        records = tuple(WorkerRecord.read(folder / f"record-{rank}.pickle") for rank in range(job.workers))
        return RunOutcome(job, folder, records, tuple(statuses), seconds)

    def _start(self, job: Job, rank: int, folder: Path, port: int) -> Child:
        interpreter = self._interpreter(job, rank)
        order = {"spec": str(folder / "spec.pickle"), "rank": rank}
        beside = Path(self.script).resolve().parent
        path = "" if os.environ.get("PYTHONSAFEPATH") else f"import sys; sys.path.insert(0, {str(beside)!r}); "
        with (folder / f"output-{rank}.txt").open("wb") as output, Path(os.devnull).open("rb") as nothing:
            return self._servers.get(interpreter).start(
                "unisono.verify.child:run",
                order,
                environment=overlaid({**interpreter, **_launched(job, rank, port)}),
                streams={0: nothing.fileno(), 1: output.fileno(), 2: output.fileno()},
                folder=beside,
                fresh=["-c", f"{path}from unisono.verify.child import run; run({order!r})"],
            )

    def _wait(self, children: Sequence[Child]) -> list[int | None]:
        deadline_s = time.monotonic() + self._limit_s
        while running := [child for child in children if child.poll() is None]:
            now_s = time.monotonic()
            if any(child.returncode for child in children):
                deadline_s = min(deadline_s, now_s + _GRACE_S)
            if now_s >= deadline_s or self._stops.is_set():
                break
            wait_for_end(running, min(_LOOK_S, deadline_s - now_s))
        return [child.returncode for child in children]

    def _end(self, children: Sequence[Child]) -> None:
        end_processes(child.pid for child in children if child.poll() is None)
        end_groups((child.pid for child in children), grace_s=_LEFT_S)  # loader processes that they left behind
        for child in children:
            child.poll()
            self._servers.reaper.remove(child.pid)

    @contextlib.contextmanager
    def _enough_cores(self, job: Job) -> Iterator[None]:
        """One for each worker, or all there are. Taken one at a time, but only by one taker at a time: nobody starves."""
        wanted = min(job.workers * job.threads, self._all_cores)
        with self._turn:
            for _ in range(wanted):
                self._cores.acquire()
        try:
            yield
        finally:
            self._cores.release(wanted)


def _free_port() -> int:
    """For scripts that make a process group themselves; the trainer's workers meet at a file."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _launched(job: Job, rank: int, port: int) -> Mapping[str, str]:
    """What a launcher would set."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "WORLD_SIZE": str(job.workers),
        "LOCAL_WORLD_SIZE": str(job.workers),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "UNISONO_LAUNCHED": "1",
        "UNISONO_WORKERS_DEFAULTED": "0",
        "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo"),
    }


def brief(message: str) -> str:
    """The beginning of an error's text: some of PyTorch's fill pages."""
    text = message.strip().split("\n\n")[0]
    return text if len(text) <= _BRIEF else f"{text[:_BRIEF]}..."
