"""Workers in processes of their own, with a hard time limit."""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing.spawn
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

from unisono.collective.base import Collective
from unisono.errors import WorkerFailure
from unisono.system.fork_server import BLOCKED_SIGNALS, Child, ForkServer, standard_streams, wait_for_end
from unisono.system.reaper import Reaper, end_groups, end_processes

T = TypeVar("T")
Transport = Literal["gloo", "shared memory"]

_PRELOADED = ("numpy", "torch", "torch._dynamo", "torch.distributed", "unisono.training.trainer", "unisono.testing.processes")
_LOOK_S = 1.0
_LEFTOVERS_S = 0.5


def run_workers(size: int, work: Callable[..., T], *args: Any, transport: Transport = "gloo", timeout_s: float = 60.0) -> list[T]:
    """*local*. Runs ``work(collective, *args)`` once on ``size`` workers: see `Workers.run`."""
    with Workers() as workers:
        return workers.run(size, work, *args, transport=transport, timeout_s=timeout_s)


class Workers:
    """Processes for workers, forked from one that has imported PyTorch already: after the first they start at once.

    Used as a context; whatever was started ends with it, and with this process, whatever kills that. A worker has this process's
    module path, folder, streams and variables as they are when it starts; variables that are read while PyTorch loads (see
    `unisono.system.fork_server`) as they are when the context is entered. Where a process cannot be forked like that, as on
    macOS, each worker is a new interpreter. *Local*, for one thread at a time.

    Args:
        preload: Modules that most tasks need; they are imported once, too.
    """

    def __init__(self, preload: Sequence[str] = ()) -> None:
        self._preload = (*_PRELOADED, *preload)

    def __enter__(self) -> Workers:
        with contextlib.ExitStack() as opened:
            self._reaper = opened.enter_context(Reaper())
            self._fork_server = opened.enter_context(ForkServer(environment={}, preload=self._preload, reaper=self._reaper))
            self._closing = opened.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.close()

    def run(
        self, size: int, work: Callable[..., T], *args: Any, transport: Transport = "gloo", timeout_s: float = 60.0
    ) -> list[T]:
        """Runs ``work(collective, *args)`` on ``size`` processes of this host.

        Args:
            size: Number of workers.
            work: A function of a module (it is pickled by name), as are ``args`` and its result.
            transport: How they talk: "gloo" (torch.distributed) or "shared memory".
            timeout_s: When workers that have not ended by then are killed.

        Returns:
            What each worker returned, by rank.

        Raises:
            WorkerFailure: with every failed worker's traceback, or naming those that did not end in time.
        """
        deadline_s = time.monotonic() + timeout_s
        with tempfile.TemporaryDirectory(prefix="unisono-test-") as name:
            folder = Path(name)
            _task_file(folder).write_bytes(pickle.dumps((_surroundings(), pickle.dumps((work, args)))))
            processes: list[Child] = []
            try:
                for rank in range(size):
                    processes.append(self._start({"folder": name, "rank": rank, "size": size, "transport": transport}))
                late = self._wait(processes, deadline_s)
            finally:
                end_processes(process.pid for process in processes if process.returncode is None)
                self._wait(processes, float("inf"))
            outcomes = [_outcome(folder, rank, rank in late) for rank in range(size)]
        failures = [f"worker {rank}: {text}" for rank, (text, _) in enumerate(outcomes) if text]
        if failures:
            raise WorkerFailure("\n".join(failures))
        return [result for _, result in outcomes]

    def _start(self, spec: Mapping[str, Any]) -> Child:
        streams = standard_streams()
        return self._fork_server.start("unisono.testing.processes:enter", spec, environment=os.environ, streams=streams)

    def _wait(self, processes: Sequence[Child], deadline_s: float) -> list[int]:
        """Until all have ended, with what they have started; the numbers of those that have not."""
        while True:
            left = [number for number, process in enumerate(processes) if process.returncode is None]
            for number in left:
                process = processes[number]
                if process.poll() is not None:
                    end_groups([process.pid], grace_s=_LEFTOVERS_S)
                    self._reaper.remove(process.pid)
            left = [number for number in left if processes[number].returncode is None]
            if not left or time.monotonic() >= deadline_s:
                return left
            wait_for_end([processes[number] for number in left], min(deadline_s - time.monotonic(), _LOOK_S))


def enter(spec: Mapping[str, Any]) -> NoReturn:
    """What a worker does, in a process that was started for it. *collective*"""
    import torch

    signal.pthread_sigmask(signal.SIG_UNBLOCK, BLOCKED_SIGNALS)
    torch.set_num_threads(1)
    folder, rank = Path(spec["folder"]), spec["rank"]
    try:
        surroundings, task = pickle.loads(_task_file(folder).read_bytes())
        multiprocessing.spawn.prepare(surroundings)
        work, args = pickle.loads(task)
        collective = _connect(rank, spec["size"], spec["transport"], folder)
        result = work(collective, *args)
        collective.barrier()
        collective.close()
        _answer(folder, rank, "", result)
        _leave(0)
    except BaseException:
        traceback.print_exc()
        _answer(folder, rank, traceback.format_exc(), None)
        _leave(1)


def _surroundings() -> dict[str, Any]:
    """The module path, the folder and the main module of this process, as a spawned child gets them."""
    found: dict[str, Any] = multiprocessing.spawn.get_preparation_data("worker")
    del found["authkey"]  # it refuses to be written down; each process has its own
    return found


def _connect(rank: int, size: int, transport: Transport, folder: Path) -> Collective:
    import torch

    from unisono.collective.torch_distributed import TorchDistributed

    collective: Collective = TorchDistributed.connect(
        rank=rank, size=size, device=torch.device("cpu"), init_method=(folder / "meeting").as_uri()
    )
    if transport == "shared memory":
        from unisono.collective.shared_memory import SharedMemory

        shared = SharedMemory.meet(rank, size, collective.all_gather_bytes)
        if isinstance(shared, str):
            raise WorkerFailure(f"no shared memory: {shared}")
        collective = shared
    if (collective.rank, collective.size) != (rank, size):
        raise WorkerFailure(f"asked for worker {rank} of {size}, got {collective.rank} of {collective.size}")
    return collective


def _leave(status: int) -> NoReturn:
    # All that the interpreter does at its end but for taking itself apart, which takes a second with PyTorch in it.
    with contextlib.suppress(Exception):
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(status)


def _task_file(folder: Path) -> Path:
    return folder / "task.pickle"


def _result_file(folder: Path, rank: int) -> Path:
    return folder / f"result-{rank}.pickle"


def _answer(folder: Path, rank: int, text: str, result: Any) -> None:
    # By value: torch would send a tensor as a file descriptor, which is gone if this process ends first.
    data = pickle.dumps((text, result))
    unfinished = folder / f"result-{rank}.unfinished"
    unfinished.write_bytes(data)
    unfinished.rename(_result_file(folder, rank))


def _outcome(folder: Path, rank: int, late: bool) -> tuple[str, Any]:
    file = _result_file(folder, rank)
    if file.exists():
        text, result = pickle.loads(file.read_bytes())
        return text, result
    return ("did not end in time" if late else "died without a word"), None
