"""Workers in processes of their own, with a hard time limit."""

from __future__ import annotations

import contextlib
import multiprocessing.spawn
import os
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

from unisono.collective.base import Collective
from unisono.errors import WorkerFailure
from unisono.system.fork_server import BLOCKED_SIGNALS, Child, ForkServer, standard_streams, wait_for_end
from unisono.system.process import run_exit_functions
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
    """Worker processes, forked from one that has imported PyTorch already: after the first they start at once.

    Used as a context manager; all processes end with it, and with this process, however that ends. A worker has this process's
    module path, working directory, streams and environment as they are when it starts; variables that PyTorch reads while it
    loads (see `unisono.system.fork_server`) as they are when the context is entered. Where processes cannot be forked like that,
    as on macOS, each worker is a new interpreter. *Local*, for one thread at a time.

    Args:
        preload: More modules to import before forking.
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
            transport: "gloo" (torch.distributed) or "shared memory".
            timeout_s: Workers that have not ended after so many seconds are killed.

        Returns:
            What each worker returned, by rank.

        Raises:
            WorkerFailure: A worker failed or did not end in time; with every failed worker's traceback.
        """
        deadline_s = time.monotonic() + timeout_s
        with tempfile.TemporaryDirectory(prefix="unisono-test-") as name:
            folder = Path(name)
            (folder / "task.pickle").write_bytes(pickle.dumps((_surroundings(), pickle.dumps((work, args)))))
            processes: list[Child] = []
            try:
                for rank in range(size):
                    spec = {"folder": name, "rank": rank, "size": size, "transport": transport}
                    function, streams = "unisono.testing.processes:enter", standard_streams()
                    processes.append(self._fork_server.start(function, spec, environment=os.environ, streams=streams))
                late = self._wait(processes, deadline_s)
            finally:
                end_processes(process.pid for process in processes if process.returncode is None)
                self._wait(processes, float("inf"))
            outcomes = [_outcome(folder, rank, rank in late) for rank in range(size)]
        failures = [f"worker {rank}: {text}" for rank, (text, _) in enumerate(outcomes) if text]
        if failures:
            raise WorkerFailure("\n".join(failures))
        return [result for _, result in outcomes]

    def _wait(self, processes: Sequence[Child], deadline_s: float) -> list[int]:
        """Waits until all have ended, and ends what these have started; the ranks of those that have not."""
        while True:
            for process in processes:
                if process.returncode is None and process.poll() is not None:
                    end_groups([process.pid], grace_s=_LEFTOVERS_S)
                    self._reaper.remove(process.pid)
            left = {rank: process for rank, process in enumerate(processes) if process.returncode is None}
            if not left or time.monotonic() >= deadline_s:
                return list(left)
            wait_for_end(list(left.values()), min(deadline_s - time.monotonic(), _LOOK_S))


def enter(spec: Mapping[str, Any]) -> NoReturn:
    """*collective*. Runs the task in a worker process."""
    import torch

    signal.pthread_sigmask(signal.SIG_UNBLOCK, BLOCKED_SIGNALS)
    torch.set_num_threads(1)
    folder, rank = Path(spec["folder"]), spec["rank"]
    try:
        surroundings, task = pickle.loads((folder / "task.pickle").read_bytes())
        multiprocessing.spawn.prepare(surroundings)
        work, args = pickle.loads(task)
        collective = _connect(rank, spec["size"], spec["transport"], folder)
        result = work(collective, *args)
        collective.barrier()
        collective.close()
        _answer(folder, rank, "", result)
        run_exit_functions()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        _answer(folder, rank, traceback.format_exc(), None)
        run_exit_functions()
        os._exit(1)


def _surroundings() -> dict[str, Any]:
    """The module path, the working directory and the main module of this process, as a spawned child gets them."""
    found: dict[str, Any] = multiprocessing.spawn.get_preparation_data("worker")
    del found["authkey"]  # it cannot be pickled, and each process has its own
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


def _answer(folder: Path, rank: int, text: str, result: Any) -> None:
    # By value: torch would send a tensor as a file descriptor, which is gone if this process ends first.
    data = pickle.dumps((text, result))
    unfinished = folder / f"result-{rank}.unfinished"
    unfinished.write_bytes(data)
    unfinished.rename(unfinished.with_suffix(".pickle"))


def _outcome(folder: Path, rank: int, late: bool) -> tuple[str, Any]:
    file = folder / f"result-{rank}.pickle"
    if file.exists():
        text, result = pickle.loads(file.read_bytes())
        return text, result
    return ("did not end in time" if late else "died without a word"), None
