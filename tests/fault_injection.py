"""A world of threads in which workers die, at any call that they make to the others, and the rest goes on."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from unisono.collective import Collective, InProcess, Meeting
from unisono.collective.regions import Memory
from unisono.elastic.link import Link
from unisono.elastic.membership import Generation, Member, Membership
from unisono.system.process import Process

T = TypeVar("T")

_TURN_S = 0.002  # a worker that is alone waits for nobody else, and would keep the turn to the end


class Died(BaseException):
    """The end of a worker, at the place where it is raised."""


@dataclasses.dataclass(frozen=True)
class Death:
    """When a worker dies."""

    call: int
    """At which of its calls to the others, from 1."""
    told: bool = False
    """Whether the others still hear what it says in that call."""
    told_to: int | None = None
    """The only rank that hears it, if ``told``; None: all. Processes send to one after the other, and may die in between."""


class _Store:
    """A key-value store for threads that take turns; who looks for newcomers lets them have theirs."""

    def __init__(self, baton: threading.Condition) -> None:
        self._values: dict[str, bytes] = {}
        self._baton = baton

    def set(self, key: str, value: str | bytes, /) -> None:
        self._values[key] = value.encode() if isinstance(value, str) else value

    def get(self, key: str, /) -> bytes:
        return self._values[key]

    def check(self, keys: list[str], /) -> bool:
        if keys[0].startswith("applicant/"):
            self._baton.wait(timeout=_TURN_S)
        return all(key in self._values for key in keys)

    def multi_get(self, keys: list[str], /) -> list[bytes]:
        return [self._values[key] for key in keys]

    def compare_set(self, key: str, expected: str, desired: str, /) -> bytes:
        if self._values.get(key, b"").decode() == expected:
            self.set(key, desired)
        return self._values.get(key, expected.encode())


class _Meeting(Meeting):
    """One in which a worker's last message may reach one other worker only, as if it had died while it was sending."""

    def __init__(self, size: int, *, timeout_s: float, baton: threading.Condition) -> None:
        super().__init__(size, timeout_s=timeout_s, baton=baton)
        self.last_words: dict[int, int] = {}  # call -> the rank that hears it

    def has_all(self, rank: int, call: int) -> bool:
        return super().has_all(rank, call) and self.last_words.get(call, rank) == rank


class _Mortal(InProcess):
    """A collective whose worker dies at a certain call, over all generations.

    Args:
        meeting: Of all workers.
        rank: This one's.
        life: Its end.
        groups: The ranks of each host.
        near: The meeting of those of this worker's host; None: there is one host only.
    """

    def __init__(
        self, meeting: _Meeting, rank: int, life: _Life, groups: Sequence[Sequence[int]], near: Meeting | None = None
    ) -> None:
        super().__init__(meeting, rank)
        self._last_words = meeting.last_words
        self._life = life
        self._groups = groups
        group = next(group for group in groups if rank in group)
        self._near = None if near is None else InProcess(near, group.index(rank))
        life.collective = self

    @property
    def hosts(self) -> Sequence[Sequence[int]]:
        return self._groups

    def common(self, numel: int, dtype: torch.dtype, mine: Tensor | None = None) -> Tensor:
        near = next(group for group in self._groups if self.rank in group)
        have = self._meet(mine)
        made = self._meet(torch.zeros(numel, dtype=dtype) if self.rank == near[0] else None)
        found: Tensor = next(one for one in [*(have[peer] for peer in near), made[near[0]]] if one is not None)
        return found

    def publish(self, flat: Tensor, bounds: Sequence[tuple[int, int]]) -> None:
        """Inside each host where each has everything among its workers, as ``Hierarchical`` does."""
        if self._near is None or not all(_is_all([bounds[rank] for rank in group], flat.numel()) for group in self._groups):
            super().publish(flat, bounds)
            return
        self._live(lambda: None)
        group = next(group for group in self._groups if self.rank in group)
        self._near.publish(flat, [bounds[rank] for rank in group])

    def share(self, flat: Tensor) -> bool:
        """Shares nothing, but all have to call it alike."""
        self._meet(None)
        return False

    def close(self) -> None:
        super().close()
        if self._near is not None:
            self._near.close()

    def _meet(self, brought: Any) -> list[Any]:
        def bring() -> None:
            self._call += 1
            death = self._life.death
            if death is not None and death.told_to is not None:
                self._last_words[self._call] = death.told_to
            self._meeting.bring(self.rank, self._call, brought)

        self._live(bring)
        return super()._meet(brought)

    def _live(self, last_word: Callable[[], None]) -> None:
        """Counts a call to the others, and dies if it is the last."""
        life = self._life
        life.calls += 1
        if life.death is not None and life.calls == life.death.call:
            if life.death.told:
                last_word()
            raise Died


@dataclasses.dataclass
class _Life:
    death: Death | None
    calls: int = 0
    collective: Collective | None = None

    def close(self) -> None:
        if self.collective is not None:
            self.collective.close()


@dataclasses.dataclass(frozen=True)
class Lives:
    """What became of the workers."""

    results: Mapping[int, Any]
    """What those who lived returned, by their first rank."""
    calls: Mapping[int, int]
    """How many calls each made to the others."""


def run_lives(
    size: int,
    work: Callable[[Link], Any],
    deaths: Mapping[int, Death],
    *,
    joiners: int = 0,
    machines: Mapping[int, str] | None = None,
    timeout_s: float = 30.0,
) -> Lives:
    """*local*. Runs ``work(link)`` on ``size`` workers, threads of this process that take turns; some of them die.

    Args:
        size: Workers at the beginning.
        work: Called once a worker, with the link to give to its ``Trainer(collective=...)``.
        deaths: When workers die, by rank; for joiners, ``size`` and up.
        joiners: Workers that come later.
        machines: Which machine each worker believes to be on, by rank.
        timeout_s: How long a worker waits for the others.

    Raises:
        Exception: The first error of a worker.
    """
    machines = machines or {}
    baton = threading.Condition()
    store = _Store(baton)
    meetings: dict[tuple[int, int], _Meeting] = {}
    lives = {rank: _Life(deaths.get(rank)) for rank in range(size + joiners)}
    results: dict[int, Any] = {}
    errors: list[BaseException] = []

    def link_of(rank: int) -> Link:
        me = Member(
            uid=f"thread {rank}", host="here", process=Process(place="", pid=rank, started=0), machine=machines.get(rank, "")
        )
        founders = [f"thread {founder}" for founder in range(size)] if rank < size else []

        def connect(generation: Generation, memory: Memory, device: torch.device) -> Collective:
            meeting = meetings.setdefault((generation.number, -1), _Meeting(generation.size, timeout_s=timeout_s, baton=baton))
            groups = _groups(generation)
            mine = next(group for group in groups if generation.rank in group)
            if len(groups) > 1:
                near = meetings.setdefault((generation.number, mine[0]), _Meeting(len(mine), timeout_s=timeout_s, baton=baton))
                return _Mortal(meeting, generation.rank, lives[rank], groups, near)
            return _Mortal(meeting, generation.rank, lives[rank], groups)

        membership = Membership(
            store, me, founders, timeout_s=timeout_s, pause=lambda seconds: _hand_over(baton, seconds), look_every_s=0.0
        )
        return Link(membership, store, connect)

    def run(rank: int) -> None:
        with baton:
            try:
                results[rank] = work(link_of(rank))
            except Died:
                pass
            except BaseException as error:
                errors.append(error)
            finally:
                store.set(f"dead/thread {rank}", "died")
                lives[rank].close()

    _run_threads(run, lives, limit_s=10 * timeout_s)
    if errors:
        raise errors[0]
    return Lives(results, {rank: life.calls for rank, life in lives.items()})


def _run_threads(work: Callable[[int], None], ranks: Iterable[int], *, limit_s: float) -> None:
    started = threading.Event()

    def run(rank: int) -> None:
        started.wait()
        work(rank)

    threads = [threading.Thread(target=run, args=(rank,), name=f"worker {rank}", daemon=True) for rank in ranks]
    for thread in threads:
        thread.start()
    started.set()
    for thread in threads:
        thread.join(timeout=limit_s)


def _groups(generation: Generation) -> list[tuple[int, ...]]:
    found: dict[str, list[int]] = {}
    for rank, member in enumerate(generation.members):
        found.setdefault(member.machine, []).append(rank)
    return [tuple(ranks) for ranks in found.values()]


def _is_all(parts: Sequence[tuple[int, int]], numel: int) -> bool:
    return sum(hi - lo for lo, hi in parts) == numel


def _hand_over(baton: threading.Condition, seconds: float) -> None:
    baton.wait(timeout=seconds)
