"""Runs of the script, as the questions need them: each is made once, in a folder of its own, by processes from the nurseries."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from unisono.verify.job import Change, Job
from unisono.verify.nursery import Nurseries, Nursery
from unisono.verify.record import TrainerRecord, WorkerRecord
from unisono.world import usable_cores

_FIRST_LIMIT_S = 600.0
_BRIEF = 500
_GRACE_S = 2.0
"""How long the others may take once a worker has failed."""
_WORTH_PRELOADING_S = 0.3
_NEVER_PRELOADED = ("tensorflow", "jax", "jaxlib", "cupy", "ray", "__")
"""They start threads, or a device, at import: nothing could be forked afterwards."""


@dataclasses.dataclass(frozen=True)
class Run:
    """What came out of a job."""

    job: Job
    folder: Path
    records: tuple[WorkerRecord | None, ...]
    """By rank; None: the worker died without a word."""
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
    def failure(self) -> dict[str, Any] | None:
        """Why the run did not come to its end: of all failures the one that caused the others."""
        told = [
            {**record.failure, "rank": rank}
            for rank, record in enumerate(self.records)
            if record is not None and record.failure is not None
        ]
        if told:
            return min(told, key=lambda one: (one["secondary"], one["time_s"]))
        for rank, (record, status) in enumerate(zip(self.records, self.statuses, strict=True)):
            if record is None:
                how = "did not end in time" if status is None else f"died with status {status}"
                return {"kind": "death", "message": f"worker {rank} {how}{self._last_words(rank)}", "rank": rank, "traceback": ""}
        return None

    def output(self, rank: int) -> str:
        """What a worker has printed."""
        file = self.folder / f"output-{rank}.txt"
        return file.read_text(errors="replace") if file.exists() else ""

    def tensors(self, trainer: int, step: int, rank: int = 0) -> dict[str, dict[str, Any]] | None:
        """What was kept of a step: "model" and "optimizer", by name."""
        import torch

        file = self.folder / f"tensors-{trainer}-{step}-{rank}.pt"
        loaded: dict[str, dict[str, Any]] | None = torch.load(file, weights_only=True) if file.exists() else None
        return loaded

    def notes(self, kind: str) -> list[dict[str, Any]]:
        """What workers noted about the script, each once."""
        found: list[dict[str, Any]] = []
        for record in self.records:
            for note in record.notes.get(kind, []) if record is not None else []:
                if note not in found:
                    found.append(note)
        return found

    def every(self, field: str) -> list[str]:
        """The union over workers of a list in their records."""
        found: list[str] = []
        for record in self.records:
            found += [name for name in getattr(record, field) if name not in found] if record is not None else []
        return found

    def _last_words(self, rank: int) -> str:
        lines = self.output(rank).strip().splitlines()[-3:]
        return f"; its last words: {' | '.join(lines)}" if lines else ""


class Runs:
    """Makes runs. Used as a context. All methods are *local*.

    Args:
        nurseries: Where its processes come from.
        script: Path of the user's script.
        args: Its arguments.
        steps: Optimizer steps to look at.
        threads: Threads per worker.
    """

    def __init__(self, nurseries: Nurseries, script: str, args: Sequence[str], *, steps: int, threads: int) -> None:
        self.script, self.args, self.steps, self.threads = script, list(args), steps, threads
        self.made = 0
        """How often the script was run."""
        self.held: list[list[dict[str, Any]]] = []
        """For each trainer, the optimizer's settings on one worker."""
        self._known: dict[Job, Future[Run]] = {}
        self._nurseries = nurseries
        self._cores = threading.BoundedSemaphore(max(1, usable_cores()))
        self._all_cores = max(1, usable_cores())
        self._children: list[tuple[Nursery, int, Future[int]]] = []
        self._lock = threading.Lock()
        self._turn = threading.Lock()
        self._limit_s = _FIRST_LIMIT_S
        self._closing = contextlib.ExitStack()

    def __enter__(self) -> Runs:
        self.folder = Path(tempfile.mkdtemp(prefix="unisono-verify-"))
        self._closing.callback(shutil.rmtree, self.folder, ignore_errors=True)
        self._pool = ThreadPoolExecutor(max_workers=16)
        self._closing.callback(self._pool.shutdown, wait=True, cancel_futures=True)
        self._closing.callback(self._kill_all)
        for second in (False, True):
            self.nursery(Job(second=second, threads=self.threads), 0)
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.close()

    def __call__(self, job: Job) -> Run:
        """The run of a job, made now or before."""
        return self.start(job).result()

    def start(self, job: Job) -> Future[Run]:
        """The run of a job, to come."""
        if job.teacher is not None:
            self.start(job.teacher)  # it stands before this one in the queue, so nobody waits for ever
        with self._lock:
            if job not in self._known:
                self._known[job] = self._pool.submit(self._make, job, len(self._known))
            return self._known[job]

    def all(self, jobs: Sequence[Job]) -> list[Run]:
        """Several runs, side by side as far as there are cores."""
        return [future.result() for future in [self.start(job) for job in jobs]]

    def learn(self, run: Run) -> None:
        """What the first run tells about how to make the others: its libraries, its duration, its settings."""
        record = run.first
        self.held = [trainer.settings for trainer in record.trainers]
        self._limit_s = 60.0 + 20.0 * run.seconds
        if record.startup_s > _WORTH_PRELOADING_S:
            self._nurseries.preload([name for name in record.modules if not name.startswith(_NEVER_PRELOADED)])

    def nursery(self, job: Job, rank: int) -> Nursery:
        """Where a worker of a job comes from: neighbours from two interpreters, which hash strings differently."""
        second = (rank % 2 == 1) != job.second
        if Change.SAME_MEMORY in job.changes:
            number, seed = 0, "1"
        elif Change.SAME_HASH in job.changes:
            number, seed = (2 if second else 0), "1"
        else:
            number, seed = int(second), "2" if second else "1"
        threads = str(job.threads)
        environment = {
            "PYTHONHASHSEED": os.environ.get("PYTHONHASHSEED") or seed,
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            "UNISONO_THREADS": threads,
            **dict(job.environment),
        }
        return self._nurseries.get(number, environment)

    # ------------------------------------------------------------------

    def _make(self, job: Job, number: int) -> Run:
        folder = self.folder / f"run-{number}"
        folder.mkdir()
        teacher = None if job.teacher is None else self(job.teacher).folder
        with self._enough_cores(job):
            began_s = time.monotonic()
            port = _free_port()
            children = [self._fork(job, rank, folder, teacher, port) for rank in range(job.workers)]
            self.made += 1
            self._children += children
            statuses = self._wait(children)
            seconds = time.monotonic() - began_s
        records = tuple(WorkerRecord.read(folder / f"record-{rank}.json") for rank in range(job.workers))
        return Run(job, folder, records, tuple(statuses), seconds)

    def _fork(self, job: Job, rank: int, folder: Path, teacher: Path | None, port: int) -> tuple[Nursery, int, Future[int]]:
        nursery = self.nursery(job, rank)
        spec = {
            "script": self.script,
            "args": self.args,
            "folder": str(folder),
            "scratch": str(self.folder),
            "rank": rank,
            "size": job.workers,
            "meeting": (folder / "meeting").as_uri(),
            "steps": self.steps,
            "events": job.events,
            "threads": job.threads,
            "reference": job.reference,
            "changes": sorted(job.changes),
            "shift": int(job.second) + rank,
            "dump": job.dump,
            "keep": job.keep,
            "teacher": None if teacher is None else str(teacher),
            "held": self.held,
            "inspect": job.inspect,
            "environment": _environment(job, rank, port),
        }
        return nursery, *nursery.fork(spec)

    def _wait(self, children: Sequence[tuple[Nursery, int, Future[int]]]) -> list[int | None]:
        waiting = {ended for _, _, ended in children}
        deadline_s = time.monotonic() + self._limit_s
        while waiting:
            done, waiting = wait(waiting, timeout=max(0.0, deadline_s - time.monotonic()), return_when=FIRST_COMPLETED)
            if any(_status(ended) != 0 for ended in done):
                deadline_s = min(deadline_s, time.monotonic() + _GRACE_S)
            if not done:
                break
        for nursery, number, ended in children:
            if ended in waiting:
                nursery.kill(number)
        wait(waiting, timeout=_GRACE_S)
        return [None if ended in waiting else _status(ended) for _, _, ended in children]

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
            for _ in range(wanted):
                self._cores.release()

    def _kill_all(self) -> None:
        """Only after an error or Ctrl-C is there anything left to end."""
        for nursery, number, ended in list(self._children):
            if not ended.done():
                nursery.kill(number)


def _status(ended: Future[int]) -> int:
    try:
        return ended.result(0)
    except CancelledError:
        return 1


def _free_port() -> int:
    """For scripts that make a process group themselves; the trainer's workers meet at a file."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _environment(job: Job, rank: int, port: int) -> Mapping[str, str]:
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
