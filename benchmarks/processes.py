"""The processes of a peer: started, told to run steps, their memory read, ended."""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peers import Peer, Place, loss_of_share
from workloads import WORKLOADS

ANSWER_LIMIT_S = 180.0
LOG_LINES = 12


class PeerFailed(Exception):
    """A peer could not be started or broke off; the message holds its last lines."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Proportional set size, bytes: a page that k processes map counts 1/k for each of them."""

    pss: int
    anonymous: int
    """Of which private data: weights, gradients, activations, the interpreter's objects."""
    shared: int
    """Of which memory shared between processes."""
    files: int
    """Of which files: program code. Every other process of the machine that runs the same code lowers it."""

    def __add__(self, other: Memory) -> Memory:
        ours, theirs = dataclasses.asdict(self), dataclasses.asdict(other)
        return Memory(**{name: ours[name] + theirs[name] for name in ours})


class Group:
    """The processes of one peer. ``ready`` must be called before anything else; all groups of a run may start at once.

    Args:
        peer: Who.
        workload: Name of what is trained.
        folder: An empty folder of the group's own, for the meeting point and what the processes print.
        workers: Number of processes; None: as many as the peer has by itself.
        enter: Called in each process, with its rank, before anything else.
    """

    def __init__(
        self, peer: Peer, workload: str, folder: Path, workers: int | None = None, enter: Callable[[int], None] | None = None
    ) -> None:
        folder.mkdir()
        self.peer = peer
        self._folder = folder
        self._pipes: list[Connection] = []
        self._processes: list[multiprocessing.process.BaseProcess] = []
        context = multiprocessing.get_context("spawn")
        size = workers or peer.workers
        for rank in range(size):
            mine, theirs = context.Pipe()
            process = context.Process(
                target=serve, args=(peer, workload, Place(rank, size), str(folder), theirs, enter), daemon=True
            )
            process.start()
            theirs.close()
            self._pipes.append(mine)
            self._processes.append(process)

    def ready(self) -> None:
        """Waits until every process can train.

        Raises:
            PeerFailed: One cannot.
        """
        self._answers()

    def run(self, steps: int, what: str = "step") -> float:
        """Seconds a step, of the slowest worker.

        Raises:
            PeerFailed: A worker broke off.
        """
        return max(self._ask((what, steps))) / steps

    def loss(self) -> float:
        """Loss sum of the current weights over the global batch."""
        return sum(self._ask(("loss", 0)))

    def hold(self) -> None:
        """See ``Made.hold``."""
        self._ask(("hold", 0))

    def memory(self) -> Memory | None:
        """Proportional set size, summed over the workers; None where the system does not tell it."""
        found = [memory_of(process.pid) for process in self._processes]
        known = [memory for memory in found if memory is not None]
        return sum(known[1:], known[0]) if len(known) == len(found) else None

    def close(self) -> None:
        """Ends the processes."""
        for pipe in self._pipes:
            with contextlib.suppress(OSError):
                pipe.send(None)
        for process in self._processes:
            process.join(10)
            if process.is_alive():
                process.kill()
                process.join()

    def _ask(self, question: tuple[str, int]) -> list[float]:
        try:
            for pipe in self._pipes:
                pipe.send(question)
        except OSError as error:
            raise PeerFailed(self._explain("ended")) from error
        return self._answers()

    def _answers(self) -> list[float]:
        deadline = time.monotonic() + ANSWER_LIMIT_S
        return [self._answer(pipe, deadline) for pipe in self._pipes]

    def _answer(self, pipe: Connection, deadline: float) -> float:
        if not pipe.poll(max(0.0, deadline - time.monotonic())):
            raise PeerFailed(self._explain(f"gave no answer in {ANSWER_LIMIT_S:.0f} s"))
        try:
            answer = pipe.recv()
        except (EOFError, OSError) as error:
            raise PeerFailed(self._explain("ended")) from error
        if isinstance(answer, str):
            raise PeerFailed(answer)
        return float(answer)

    def _explain(self, what: str) -> str:
        printed = [line for log in sorted(self._folder.glob("*.log")) for line in log.read_text().splitlines()[-LOG_LINES:]]
        return "\n".join([f"a worker {what}; last lines:", *printed])


def serve(
    peer: Peer, workload: str, place: Place, folder: str, pipe: Connection, enter: Callable[[int], None] | None = None
) -> None:
    """One process of a peer: makes it, then answers until it is told None.

    It is asked ``(name of a step, how often)`` and answers with the seconds, ``("loss", 0)`` with the loss of its share, and
    ``("hold", 0)`` once it holds. What it prints goes to a file in ``folder``.
    """
    _print_to(Path(folder) / f"{place.rank}.log")
    if enter is not None:
        enter(place.rank)
    os.environ["OMP_NUM_THREADS"] = str(peer.threads)  # unisono asks it how many threads a worker has
    torch.set_num_threads(peer.threads)
    torch.manual_seed(0)
    try:
        if place.workers > 1:
            meeting = (Path(folder) / "meeting").as_uri()
            dist.init_process_group("gloo", init_method=meeting, rank=place.rank, world_size=place.workers)
        made = peer.make(WORKLOADS[workload], place)
        pipe.send(0.0)
        while order := pipe.recv():
            what, steps = order
            if what == "loss":
                pipe.send(loss_of_share(WORKLOADS[workload], place, made.model))
            elif what == "hold":
                made.hold()
                pipe.send(0.0)
            else:
                pipe.send(_time(made.steps[what], steps, place))
    except Exception as error:
        traceback.print_exc()
        pipe.send("".join(traceback.format_exception_only(error)).strip())
        os._exit(1)  # the other workers may wait for this one for ever: the group is done with
    if place.workers > 1:
        dist.destroy_process_group()


def _time(step: Any, steps: int, place: Place) -> float:
    """Seconds of ``steps`` steps; one more, untimed, before them brings this peer's data back into the caches."""
    step()
    if place.workers > 1:
        dist.barrier()
    began = time.perf_counter()
    for _ in range(steps):
        step()
    return time.perf_counter() - began


def _print_to(path: Path) -> None:
    with path.open("w") as log:
        os.dup2(log.fileno(), sys.stdout.fileno())
        os.dup2(log.fileno(), sys.stderr.fileno())


def memory_of(pid: int | None) -> Memory | None:
    """What a process holds; None where the system does not tell."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return None
    kib = {words[0]: int(words[1]) for words in map(str.split, text.splitlines()[1:])}
    return Memory(
        pss=1024 * kib["Pss:"],
        anonymous=1024 * kib["Pss_Anon:"],
        shared=1024 * kib["Pss_Shmem:"],
        files=1024 * kib["Pss_File:"],
    )
