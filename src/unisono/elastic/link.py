"""This process's tie to the run: its membership, and the transport of each generation."""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed import DistError, PrefixStore, TCPStore  # type: ignore[attr-defined]

from unisono.collective import Collective, InProcess, LostWorker
from unisono.collective.regions import Memory
from unisono.collective.shared_memory import SharedMemory, host_identity
from unisono.elastic.membership import Generation, KeyValueStore, Member, Membership, store_is_gone
from unisono.errors import WorkerFailure
from unisono.system.output import say
from unisono.system.process import Process
from unisono.world import World

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger("unisono")

_MOST_TRIES = 100
"""How often workers may fail to meet, one time after the other, before that counts as the machine's fault."""
_PASSING = ("refused", "reset", "gone", "timed out", "broken pipe")
"""Words of problems that a worker has left behind which died while all connected."""
_PATIENCE_S, _MOST_PATIENCE_S = 5.0, 60.0
"""How long Gloo may take to connect workers that are all there, at first and at most: twice as long after each failure. It does
not notice that one of them is lost meanwhile."""
_STORE_LIMIT = datetime.timedelta(seconds=30)
"""How long the store may take to answer."""

Connect = Callable[[Generation, Memory, torch.device], Collective]
"""*collective*. Makes the transport of a generation whose workers compute on such a device."""


class Link:
    """How this worker meets the others again after one has died, joined or left.

    Args:
        membership: Who takes part.
        store: Where workers and launcher tell each other what has happened.
        connect: Makes a generation's transport.

    Attributes:
        generation: The present one; None until this worker is in one.
        store: As given.
        minimum: Fewest workers that go on.
        wait_s: How long fewer than that wait for more, in seconds.
        device: Where this worker computes.
        trainers: How many trainers of this process have used it.
        finish_trainer: *collective*. Returns once all workers have done everything with the trainer that uses it now.
        is_leaving: Whether this worker leaves before the script's end.
        trains: Whether a loop over batches has begun that has not come to its last one.
    """

    session = "unisono.elastic.session:ElasticSession"
    """For a trainer that is given a link in place of a collective."""

    def __init__(
        self, membership: Membership, store: KeyValueStore, connect: Connect, *, minimum: int = 1, wait_s: float = 300.0
    ) -> None:
        self.store = store
        self.generation: Generation | None = None
        self.minimum = minimum
        self.wait_s = wait_s
        self.membership = membership
        self._connect = connect
        self.device = torch.device("cpu")
        self.trainers = 0
        self.finish_trainer: Callable[[], None] | None = None
        self.is_leaving = self.trains = False
        self._memory = Memory()
        self._terminal: tuple[int, int] | None = None

    @classmethod
    def of(cls, world: World, *, device: torch.device, timeout_s: float) -> Link:
        """*local*. The link of a process that ``unisono run`` has started: one, for all trainers that follow each other in it.

        Raises:
            WorkerFailure: The launcher's store does not answer.
        """
        mine = (world.store, world.attempt, world.uid, os.getpid())
        if mine not in _links:
            _links[mine] = cls._open(world, timeout_s=timeout_s)
        link = _links[mine]
        link.device, link.membership.timeout_s = device, timeout_s
        return link

    @classmethod
    def _open(cls, world: World, *, timeout_s: float) -> Link:
        host, _, port = (world.store or "").rpartition(":")
        try:
            client = TCPStore(host, int(port), is_master=False, timeout=_STORE_LIMIT)
        except DistError as error:
            raise store_is_gone(error) from error
        store: Any = PrefixStore(f"unisono/{world.attempt}", client)
        if world.founders:
            store.compare_set("members", "", json.dumps(world.founders))
        store.set("elastic", "1")  # last: from now on a worker that dies is replaced by one that waits for the members
        try:
            machine = host_identity()
        except OSError:
            machine = world.uid  # nobody can share memory with it
        me = Member(uid=world.uid, host=world.host, process=Process.this(), machine=machine)
        link = cls(
            Membership(store, me, world.founders, timeout_s=timeout_s),
            store,
            _Transports(store),
            minimum=world.minimum,
            wait_s=world.wait_s,
        )
        link._terminal = world.terminal
        return link

    # ------------------------------------------------------------------ generations

    def first(self, *, keep: Sequence[Tensor] = ()) -> Collective:
        """*collective*. The transport with which a trainer begins; for a worker that is to join others, its own alone.

        Raises:
            SystemExit: With status 0, on a worker that came for the trainer before this one.
        """
        if not keep:
            if self.finish_trainer is not None and self.generation is not None:
                self.finish_trainer()
            self.finish_trainer = None
            self.trainers += 1
            self._memory = Memory()  # that of an earlier trainer stays with its model
        if not self.membership.is_founder and self.generation is None:
            if self.trainers > 1:
                say("unisono: the run went on to its next Trainer before this worker could join it")
                raise SystemExit(0)
            return SharedMemory(0, [None], memory=self._memory) if self.device.type == "cpu" else InProcess()
        while True:
            try:
                return self.meet(keep=keep)
            except LostWorker:
                continue

    def meet(
        self,
        *,
        leavers: Sequence[str] = (),
        joiners: Sequence[str] = (),
        silent: int | None = None,
        keep: Sequence[Tensor] = (),
    ) -> Collective:
        """*collective*. The next generation's transport; ``generation`` is that generation.

        Args:
            leavers: uids of members that will not come.
            joiners: uids of workers that have been let in.
            silent: The rank of a member that has not answered in time.
            keep: Memory of this worker that must stay as it is; the rest may be given out again.

        Raises:
            LostWorker: Another one was lost meanwhile: meet again.
            WorkerFailure: This worker is outside, or the store cannot be reached.
        """
        suspect = None if silent is None or silent >= len(self.uids) else self.uids[silent]
        self.generation = self.membership.meet(leavers=leavers, joiners=joiners, suspect=suspect)
        return self._connected(keep)

    def join(self, over: Callable[[], bool], *, keep: Sequence[Tensor]) -> Collective | None:
        """*local* until the others meet this worker. As ``meet`` for one that was not there before; None if ``over`` says that
        there is nothing to wait for.

        Raises:
            LostWorker: Another one was lost meanwhile: meet again.
        """
        self.generation = self.membership.apply(over)
        return None if self.generation is None else self._connected(keep)

    def _connected(self, keep: Sequence[Tensor]) -> Collective:
        assert self.generation is not None
        logger.info("generation %d: worker %d of %d", self.generation.number, self.generation.rank, self.generation.size)
        self._memory.recycle(keep)
        with _store_errors():
            return self._connect(self.generation, self._memory, self.device)

    def is_past(self) -> bool:
        """*local*. Whether this worker's generation has ended: others meet again or have done so, perhaps without this worker."""
        return self.generation is not None and self.ask(f"{self.generation.number}/over") is not None

    @property
    def uids(self) -> list[str]:
        """*local*. The members of the present generation, in order of rank."""
        return [] if self.generation is None else [member.uid for member in self.generation.members]

    def pause(self, seconds: float) -> None:
        """*local*. Waits that long, at most."""
        self.membership.pause(seconds)

    def others_train(self) -> bool:
        """*local*. Whether there are members who have not called this: this one's script ends in the middle of training."""
        self.tell(f"ends/{self.membership.me.uid}", "1")
        return any(self.ask(f"ends/{uid}") is None for uid in self.uids)

    # ------------------------------------------------------------------ what is told through the store

    def tell(self, key: str, value: str) -> None:
        """*local*. Writes to the store."""
        with _store_errors():
            self.store.set(key, value)

    def ask(self, key: str) -> str | None:
        """*local*. Reads from the store; None if nobody has written that."""
        with _store_errors():
            return self.store.get(key).decode() if self.store.check([key]) else None

    def speak(self) -> None:
        """*local*. From now on this process speaks to the person: its output goes to the launcher's terminal."""
        if self._terminal is None:
            return
        for stream, descriptor, number in zip((sys.stdout, sys.stderr), self._terminal, (1, 2), strict=True):
            with contextlib.suppress(OSError, ValueError):  # the terminal may be gone, and streams closed
                stream.flush()
                os.dup2(descriptor, number)
        self._terminal = None


_links: dict[tuple[object, ...], Link] = {}
"""A process belongs to one run, as it has one process group: trainers that follow each other go on with its workers."""


def say_over(*, early: bool = False) -> None:
    """*local*. This process has come to the end of its script, and so have the others, or they will soon.

    Args:
        early: Whether the script ended itself: if that was in the middle of training, it is the end of the run only once all
            workers have done so.
    """
    for link in _links.values():
        with contextlib.suppress(WorkerFailure):  # the launcher knows by other means that it is over
            if not link.is_leaving and not (early and link.trains and link.others_train()):
                link.tell("over", "1")


class _Transports:
    """Makes the transport of one generation after the other: shared memory where all workers are on one machine; else Gloo
    between machines, and shared memory on each. NCCL between GPUs.

    Args:
        store: Where the workers meet.
    """

    def __init__(self, store: Any) -> None:
        self._store = store
        self._patience_s = _PATIENCE_S
        self._tries = 0

    def __call__(self, generation: Generation, memory: Memory, device: torch.device) -> Collective:
        number, rank, size = generation.number, generation.rank, generation.size
        if device.type != "cpu":
            from unisono.collective.torch_distributed import TorchDistributed

            own = PrefixStore(f"{number}/nccl", self._store)
            return TorchDistributed.meet(rank, size, own, device=device, check=generation.check)
        if len({member.machine for member in generation.members}) == 1:
            found = SharedMemory.meet(rank, size, generation.introduce, memory=memory, check=generation.check)
            self._tries = self._tries + 1 if isinstance(found, str) else 0
            if not isinstance(found, str):
                return found
            if any(sign in found.lower() for sign in _PASSING) and self._tries < _MOST_TRIES:
                raise LostWorker(f"generation {number} could not be formed: {found}")
        generation.introduce(b"")  # all are there: from now on it takes a moment, or one of them is lost
        try:
            made = self._connect(generation, memory)
        except LostWorker:
            self._patience_s = min(2 * self._patience_s, _MOST_PATIENCE_S)
            raise
        self._patience_s = _PATIENCE_S
        return made

    def _connect(self, generation: Generation, memory: Memory) -> Collective:
        from unisono.collective.hierarchical import come_near
        from unisono.collective.torch_distributed import TorchDistributed

        store = PrefixStore(f"{generation.number}/gloo", self._store)
        wide = TorchDistributed.meet(generation.rank, generation.size, store, limit_s=self._patience_s)
        found = come_near(wide, memory=memory, check=generation.check)
        if not isinstance(found, str):
            return found
        if generation.rank == 0 and generation.number == 1:
            warnings.warn(f"workers talk over Gloo, since they cannot share memory: {found}", stacklevel=7)
        return wide


@contextlib.contextmanager
def _store_errors() -> Any:
    try:
        yield
    except DistError as error:
        raise store_is_gone(error) from error


__all__ = ["Connect", "Link", "LostWorker"]
