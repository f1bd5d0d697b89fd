"""Workers in processes of their own, with a hard time limit."""

from __future__ import annotations

import multiprocessing
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

from unisono.collective.base import Collective
from unisono.errors import WorkerFailure

T = TypeVar("T")
Transport = Literal["gloo", "shared memory"]


def run_workers(size: int, work: Callable[..., T], *args: Any, transport: Transport = "gloo", timeout_s: float = 60.0) -> list[T]:
    """*local*. Runs ``work(collective, *args)`` on ``size`` spawned processes of this host.

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
    context = multiprocessing.get_context("spawn")
    deadline = time.monotonic() + timeout_s
    with tempfile.TemporaryDirectory(prefix="unisono-test-") as folder:
        meeting_point = (Path(folder) / "meeting").as_uri()
        pipes = [context.Pipe(duplex=False) for _ in range(size)]
        processes = [
            context.Process(target=_enter, args=(sender, rank, size, meeting_point, transport, work, args), daemon=False)
            for rank, (_, sender) in enumerate(pipes)
        ]
        for process in processes:
            process.start()
        for _, sender in pipes:
            sender.close()
        try:
            outcomes = [_outcome(receiver, deadline) for receiver, _ in pipes]
        finally:
            for process in processes:
                process.join(max(0.0, deadline - time.monotonic()))
                if process.is_alive():
                    process.kill()
                    process.join()
    failures = [f"worker {rank}: {text}" for rank, (text, _) in enumerate(outcomes) if text]
    if failures:
        raise WorkerFailure("\n".join(failures))
    return [result for _, result in outcomes]


def _outcome(receiver: Any, deadline: float) -> tuple[str, Any]:
    if not receiver.poll(max(0.0, deadline - time.monotonic())):
        return "did not end in time", None
    try:
        text, result = pickle.loads(receiver.recv_bytes())
    except EOFError:
        return "died without a word", None
    return text, result


def _enter(
    sender: Any,
    rank: int,
    size: int,
    meeting_point: str,
    transport: Transport,
    work: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    import torch

    from unisono.collective.torch_distributed import TorchDistributed

    torch.set_num_threads(1)
    try:
        collective: Collective = TorchDistributed.connect(
            rank=rank, size=size, device=torch.device("cpu"), init_method=meeting_point
        )
        if transport == "shared memory":
            from unisono.collective.shared_memory import SharedMemory

            shared = SharedMemory.meet(rank, size, collective.all_gather_bytes)
            if isinstance(shared, str):
                raise WorkerFailure(f"no shared memory: {shared}")
            collective = shared
        if (collective.rank, collective.size) != (rank, size):
            raise WorkerFailure(f"asked for worker {rank} of {size}, got {collective.rank} of {collective.size}")
        result = work(collective, *args)
        collective.barrier()
        collective.close()
        _answer(sender, "", result)
    except BaseException:
        _answer(sender, traceback.format_exc(), None)
        raise


def _answer(sender: Any, text: str, result: Any) -> None:
    # By value: torch would send a tensor as a file descriptor, which is gone if this process ends first.
    sender.send_bytes(pickle.dumps((text, result)))
