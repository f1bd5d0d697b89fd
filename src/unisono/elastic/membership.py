"""How workers agree who is in the next generation.

They meet through a key-value store that the launcher serves. Whoever is in the generation that ended writes that it is here;
the first of those who are left waits until all others are here or known to be dead, and writes the plan, which all follow.
Nobody is special: if the first one dies meanwhile, the next takes its place, and whichever plan is written first counts.

A worker that is silent is given up after the time limit. The others of its host kill it, so that it cannot write to common
memory any more; its launcher does if there are none. If it wakes up before that, it finds a plan without itself, and ends.
Workers that cannot reach the store end, too: of two groups of hosts that lose sight of each other, only the one with the store
goes on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from torch.distributed import DistError

from unisono.collective import LostWorker
from unisono.errors import WorkerFailure
from unisono.system.output import say
from unisono.system.process import Process
from unisono.system.signals import RESTART

_POLL_S = 0.0005
_SLOW_POLL_S = 0.01
_JOINER_S = 2.0
"""How long members wait at most for one that they have let in: it can ask again."""
_LAST_CHANCE_S = 0.5
"""How long those who meet wait for one that has not answered in time before."""


class KeyValueStore(Protocol):
    """The part of torch.distributed's stores that is used here."""

    def set(self, key: str, value: str | bytes, /) -> None: ...
    def get(self, key: str, /) -> bytes: ...
    def check(self, keys: list[str], /) -> bool: ...
    def multi_get(self, keys: list[str], /) -> list[bytes]: ...
    def compare_set(self, key: str, expected: str, desired: str, /) -> bytes: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Member:
    """A worker, from its first generation to its last."""

    uid: str
    """Never used twice."""
    host: str
    """Name of its host, for a person."""
    process: Process
    machine: str = ""
    """What it has in common with those that it can share memory with."""

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> Member:
        fields = json.loads(text)
        return cls(**{**fields, "process": Process(**fields["process"])})


class Outside(WorkerFailure):
    """The others have gone on without this worker."""


class StateLost(WorkerFailure):
    """What a lost worker held is nowhere any more: all workers end, and the launcher starts them anew, from the last
    checkpoint."""


class RestartFromCheckpoint(SystemExit):
    """Asks the launcher to start all workers anew."""


@contextlib.contextmanager
def restarting() -> Iterator[None]:
    """*local*. Around everything in which state may turn out to be lost: then this worker asks the launcher to start all anew.

    Raises:
        RestartFromCheckpoint: Some is. A script's own ``except Exception`` must not take that for an error.
    """
    try:
        yield
    except StateLost as lost:
        say(f"unisono: {lost}: the run starts again from the last checkpoint", error=True)
        raise RestartFromCheckpoint(RESTART) from lost


class TooFewWorkers(WorkerFailure):
    """There are fewer workers than the minimum, and no others have come in time."""

    gives_up = True


class Generation:
    """A period with fixed membership, as one of its workers sees it.

    Args:
        number: From 1.
        members: In order of rank.
        rank: This worker's.
        membership: What it belongs to.
    """

    def __init__(self, number: int, members: Sequence[Member], rank: int, membership: Membership) -> None:
        self.number = number
        self.members = tuple(members)
        self.rank = rank
        self._membership = membership
        self._told = 0

    @property
    def size(self) -> int:
        return len(self.members)

    def introduce(self, data: bytes) -> list[bytes]:
        """*collective*. The byte strings of all workers, in order of rank, through the store: what a transport needs until it
        stands.

        Raises:
            LostWorker: One of them has died, or this generation is over for another reason.
        """
        self._told += 1
        store = self._membership.store
        keys = [f"{self.number}/told/{self._told}/{rank}" for rank in range(self.size)]
        store.set(keys[self.rank], data or b"-")
        began_s = time.monotonic()
        while not store.check(keys):
            self.check()
            if time.monotonic() - began_s > self._membership.timeout_s:
                silent = next(rank for rank, key in enumerate(keys) if not store.check([key]))
                raise self._silence(silent)
            self._membership.pause(_POLL_S)
        return [b"" if data == b"-" else data for data in store.multi_get(keys)]

    def _silence(self, rank: int) -> LostWorker:
        failure = LostWorker(
            f"worker {rank} did not answer within {self._membership.timeout_s:g} s when generation {self.number} began", rank=rank
        )
        failure.silent = True
        return failure

    def check(self) -> None:
        """*local*. Raises LostWorker if this generation is over already."""
        dead = [member for member in self.members if self._membership.is_dead(member)]
        if dead or self._membership.store.check([f"{self.number}/over"]):
            who = f"worker {self.members.index(dead[0])}" if dead else "a worker"
            raise LostWorker(f"{who} was lost while generation {self.number} began")


class Membership:
    """This worker's part in forming generations.

    Args:
        store: Where all workers meet.
        me: This worker.
        founders: uids of those who begin the run, in order of rank; empty for a worker that joins.
        timeout_s: How long a member may be silent before the others go on without it.
        pause: Waits that many seconds, at most.
        look_every_s: How often the first worker looks whether others want to join.
    """

    def __init__(
        self,
        store: KeyValueStore,
        me: Member,
        founders: Sequence[str],
        *,
        timeout_s: float,
        pause: Callable[[float], None] = time.sleep,
        look_every_s: float = 0.2,
    ) -> None:
        self.store = store
        self.me = me
        self.pause = pause
        self.timeout_s = timeout_s
        self._number = 0
        self._founders = self._expected = tuple(founders)
        self._known: dict[str, Member] = {me.uid: me}
        self._look_every_s = look_every_s
        self._looked_s = 0.0
        self._seen = 0  # how many have asked whose wish is settled
        self._asked: list[str] = []  # those after them; "" where someone was let in
        self._still_since_s: float | None = None

    @property
    def is_founder(self) -> bool:
        """*local*. Whether this worker was there from the beginning."""
        return self.me.uid in self._founders

    # ------------------------------------------------------------------ meeting

    def meet(self, *, leavers: Sequence[str] = (), joiners: Sequence[str] = (), suspect: str | None = None) -> Generation:
        """*collective*. The next generation: the members of the one that has ended, without the dead, the silent and those who
        leave, and with those who join.

        Args:
            suspect: One who has been given its time to answer already, elsewhere.

        Raises:
            Outside: The others have gone on without this worker.
            WorkerFailure: The store cannot be reached.
        """
        number = self._number + 1
        try:
            if self._number:
                self.store.set(f"{self._number}/over", "1")
            if suspect is not None:
                self.store.set(f"{number}/silent/{suspect}", "1")
            self.store.set(f"{number}/here/{self.me.uid}", self.me.to_json())
            expected = [uid for uid in self._expected if uid not in leavers]
            plan = self._plan(number, expected, joiners)
            if self.me.uid in plan:
                # Who wrote the plan may be on another host than they are, and could not end them.
                self._end([uid for uid in expected if uid not in plan])
        except DistError as error:
            raise store_is_gone(error) from error
        return self._begin(number, plan)

    def _begin(self, number: int, plan: Sequence[str]) -> Generation:
        self._number = number
        if self.me.uid not in plan:
            raise Outside(
                f"the others have gone on without this worker (process {self.me.process.pid} on {self.me.host}), which did not "
                f"answer within {self.timeout_s:g} s. They hold all that it had done"
            )
        members = [Member.from_json(text) for text in self.store.multi_get([f"{number}/here/{uid}" for uid in plan])]
        self._known = {member.uid: member for member in members}
        self._expected = tuple(plan)
        self.store.set("members", json.dumps(list(plan)))
        return Generation(number, members, plan.index(self.me.uid), self)

    def _plan(self, number: int, expected: Sequence[str], joiners: Sequence[str]) -> list[str]:
        began = time.monotonic()
        joiner_s = min(_JOINER_S, self.timeout_s)
        here: set[str] = {self.me.uid}
        while not self.store.check([f"{number}/plan"]):
            waited_s = time.monotonic() - began
            here.update(uid for uid in (*expected, *joiners) if uid not in here and self.store.check([f"{number}/here/{uid}"]))
            coming = [uid for uid in joiners if uid in here or not self.store.check([f"{number}/declined/{uid}"])]
            alive = [uid for uid in (*expected, *coming) if not self._is_dead(uid)]
            present = [uid for uid in alive if uid in here]
            if present and present[0] == self.me.uid:
                missing = [uid for uid in alive if uid not in here and (uid in expected or waited_s < joiner_s)]
                silent = [
                    uid
                    for uid in missing
                    if waited_s > self.timeout_s or (waited_s > _LAST_CHANCE_S and self.store.check([f"{number}/silent/{uid}"]))
                ]
                self._give_up(silent)
                missing = [uid for uid in missing if uid not in silent]
                if not missing:
                    self.store.compare_set(f"{number}/plan", "", json.dumps(self._by_machine(number, present)))
                    continue
            self.pause(_POLL_S if waited_s < 1 else _SLOW_POLL_S)
        plan: list[str] = json.loads(self.store.get(f"{number}/plan"))
        return plan

    def _by_machine(self, number: int, uids: Sequence[str]) -> list[str]:
        """In order, but those of one machine next to each other."""
        texts = self.store.multi_get([f"{number}/here/{uid}" for uid in uids])
        machines = {uid: Member.from_json(text).machine for uid, text in zip(uids, texts, strict=True)}
        places = {machine: place for place, machine in reversed(list(enumerate(machines.values())))}
        return sorted(uids, key=lambda uid: places[machines[uid]])

    def _give_up(self, silent: Sequence[str]) -> None:
        """Those who do not come are ended: here if they are on this machine, else by their launcher."""
        self._end(silent)
        for uid in silent:
            self.store.set(f"outside/{uid}", "1")

    def _end(self, uids: Sequence[str]) -> None:
        """Ends those that are on this machine: they must not wake up and write to common memory."""
        for uid in uids:
            if uid in self._known:
                self._known[uid].process.kill()

    def is_dead(self, member: Member) -> bool:
        """*local*. Whether a member has died, by the launcher's account or the system's."""
        return member.process.is_dead or self.store.check([f"dead/{member.uid}"])

    def _is_dead(self, uid: str) -> bool:
        if uid == self.me.uid:
            return False
        member = self._known.get(uid)
        return (member is not None and member.process.is_dead) or self.store.check([f"dead/{uid}"])

    def why(self, uid: str) -> str:
        """*local*. How a member ended, for a person; "" if nobody has said so."""
        return self.store.get(f"dead/{uid}").decode() if self.store.check([f"dead/{uid}"]) else ""

    # ------------------------------------------------------------------ joining

    def applicants(self, *, at_once: bool = False) -> list[str]:
        """*local*. Those who wait to join; unless ``at_once``, looks only now and then."""
        now = time.monotonic()
        if not at_once and now - self._looked_s < self._look_every_s:
            return []
        self._looked_s = now
        try:
            while self.store.check([f"applicant/{self._seen + len(self._asked)}"]):
                self._asked.append(self.store.get(f"applicant/{self._seen + len(self._asked)}").decode())
            while self._asked and self._is_settled(self._asked[0]):
                self._seen += 1
                self._asked.pop(0)
            return list(dict.fromkeys(uid for uid in self._asked if not self._is_settled(uid)))
        except DistError as error:
            raise store_is_gone(error) from error

    def _is_settled(self, uid: str) -> bool:
        return not uid or uid in self._expected or self._is_dead(uid)

    def admit(self, applicants: Sequence[str], leavers: Sequence[str]) -> None:
        """*local*. Tells those who wait (one worker does so) that they are in the next generation."""
        expected = [uid for uid in self._expected if uid not in leavers]
        for uid in applicants:
            told = {"number": self._number + 1, "expected": expected, "joiners": list(applicants)}
            self.store.set(f"admitted/{uid}", json.dumps(told))
        # Whoever does not come must ask again: all wait for those who are let in, and would do so time after time.
        self._asked = ["" if uid in applicants else uid for uid in self._asked]

    def check_members(self) -> None:
        """*local*, on a worker that waits to join: whether there is anyone to join.

        Raises:
            StateLost: All that were there have died.
        """
        if not self.store.check(["members"]):
            return
        told = self.store.get("members")
        living = [uid for uid in json.loads(told) if not self.store.check([f"dead/{uid}"])]
        if not living and self.store.get("members") == told:
            raise StateLost("all workers that held the run's state were lost before others could join them")
        if not living or not all(self._stands_still(uid) for uid in living):
            self._still_since_s = None
            return
        now_s = time.monotonic()
        self._still_since_s = self._still_since_s or now_s
        if now_s - self._still_since_s > self.timeout_s:
            # Nobody but those who wait for them notices that they do not answer. They may be on other hosts.
            self._give_up(living)
            self._still_since_s = None

    def _stands_still(self, uid: str) -> bool:
        """Whether a member is stopped (SIGSTOP), by its launcher's account."""
        key = f"standing/{uid}"
        return self.store.check([key]) and self.store.get(key) == b"1"

    def apply(self, over: Callable[[], bool]) -> Generation | None:
        """*local* until others meet this worker. Waits to be let in; None once there is nothing to wait for, as ``over`` says.

        Raises:
            StateLost: There is nobody to join any more.
        """
        key = f"admitted/{self.me.uid}"
        last = 0
        try:
            while True:
                self._queue_up()
                while not self.store.check([key]) or (told := json.loads(self.store.get(key)))["number"] <= last:
                    if over():
                        return None
                    self.check_members()
                    self.pause(_SLOW_POLL_S)
                last = told["number"]
                if over():  # the others have come to another call meanwhile
                    self.store.set(f"{last}/declined/{self.me.uid}", "1")
                    return None
                self.store.set(f"{last}/here/{self.me.uid}", self.me.to_json())
                plan = self._plan(last, told["expected"], told["joiners"])
                if self.me.uid in plan:
                    return self._begin(last, plan)
                # They lost one of theirs at this moment, and met without this worker.
        except DistError as error:
            raise store_is_gone(error) from error

    def _queue_up(self) -> None:
        number = 0
        while self.store.check([f"applicant/{number}"]):
            number += 1
        while self.store.compare_set(f"applicant/{number}", "", self.me.uid).decode() != self.me.uid:
            number += 1


def store_is_gone(error: Exception) -> WorkerFailure:
    """The error of a worker that cannot reach the store."""
    return WorkerFailure(
        f"the launcher's store does not answer ({str(error).splitlines()[0]}), so this worker cannot know whether others go "
        "on without it, and ends. If no worker goes on, start the same command again: it continues from the last checkpoint"
    )
