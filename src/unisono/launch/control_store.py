"""The keys by which launchers and workers coordinate a run through its store: the launchers' side.

Each attempt has the prefix "unisono/ATTEMPT". Launchers write for the workers

- ``dead/UID``: this process has ended, and how;
- ``standing/UID``: "1" while SIGSTOP holds this process, "0" once it continues: other hosts cannot see that themselves;
- ``stop``: the number of the signal that is about to be passed on to all workers. A worker that receives SIGTERM without this
  key was asked to leave on its own;

workers write

- ``elastic``: they train with a Trainer, which can go on without one of them. Without this key a dead worker ends the run;
- ``whole`` = "0": they cannot go on without one of them after all (on GPUs): all have to restart from a checkpoint;
- ``over``: the run is finished, dead workers need not be replaced any more;
- ``members``: the uids of the present members, as a JSON list (at the start of a later attempt launchers write it, too);
- ``outside/UID``: the others have gone on without this worker, which did not answer: its launcher must kill it;

and launchers write for each other

- ``again``: all workers of all hosts restart, in the next attempt;
- ``failed``: the run has failed, and why.
"""

from __future__ import annotations

import functools
import json
import queue
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from unisono.errors import WorkerFailure

if TYPE_CHECKING:  # it takes a second to import, for which the command must not wait
    from torch.distributed import Store  # type: ignore[attr-defined]

FINE = "ended with status 0"
"""How a process has ended that need not be replaced: it came to the script's end, or left as it was told to."""
_LOST = "was lost with its host"
_LOOKS = 10
"""How often to see whether the store can be reached while it may be silent."""
_PATIENCE = 4


class RemoteStore:
    """A store on another host, which may be out of reach: PyTorch's client would then wait for it without end. All *local*.

    It has the methods of a `torch.distributed.Store`. Each raises WorkerFailure if the store is gone, or does not answer.

    Args:
        store: The client, for this object alone.
        limit_s: How long an operation may take, in seconds.
        where: HOST:PORT of the store, for the message.
        is_near: Whether the store can be reached at this moment. After the network was gone for a while, TCP takes about as long
            again until it tries once more: while the store can be reached over a new connection, an answer may take
            ``_PATIENCE`` times as long.
    """

    def __init__(self, store: Store, *, limit_s: float, where: str, is_near: Callable[[], bool] = bool) -> None:
        self._store = store
        self._is_near = is_near
        self._limit_s = limit_s
        self._where = where
        self._orders: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        threading.Thread(target=self._serve, daemon=True, name="unisono-store").start()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return functools.partial(self._ask, getattr(self._store, name))

    def _serve(self) -> None:
        while True:
            self._orders.get()()

    def _ask(self, operation: Callable[..., Any], *args: Any) -> Any:
        answers: queue.SimpleQueue[tuple[Any, Exception | None]] = queue.SimpleQueue()

        def order() -> None:
            try:
                answers.put((operation(*args), None))
            except Exception as error:
                answers.put((None, error))

        self._orders.put(order)
        answer, error = self._await(answers)
        if error is not None:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise WorkerFailure(
                f"contact with the store at {self._where} was lost ({reason}). If the run goes on there, "
                "start this command again and this host joins it; if not, start it on all hosts, and it resumes from its last "
                "checkpoint"
            ) from error
        return answer

    def _await(self, answers: queue.SimpleQueue[tuple[Any, Exception | None]]) -> tuple[Any, Exception | None]:
        began_s = near_s = time.monotonic()
        while True:
            try:
                return answers.get(timeout=self._limit_s / _LOOKS)
            except queue.Empty:
                now_s = time.monotonic()
                if self._is_near():
                    near_s = now_s
                for since_s, limit_s in ((near_s, self._limit_s), (began_s, _PATIENCE * self._limit_s)):
                    if now_s - since_s >= limit_s:
                        return None, TimeoutError(f"no answer for {limit_s:g} s")


@dataclass(frozen=True, kw_only=True)
class Decisions:
    """What the launchers of other hosts have decided."""

    failed: str | None
    """Why the run has failed; None if it has not."""
    again: bool
    """Whether all workers restart."""
    stop: signal.Signals | None
    """The signal that asked the run to stop."""


class ControlStore:
    """One attempt's part of the store. All methods are *local*.

    Args:
        store: The run's store.
        attempt: Number of the attempt.
    """

    def __init__(self, store: Store, attempt: int) -> None:
        self._store = store
        self._attempt = f"unisono/{attempt}"
        self._standing: frozenset[str] = frozenset()

    def tell_founders(self, uids: Sequence[str]) -> None:
        """Tell later workers which members to wait for: the founders may all die before one of them could write it."""
        self._store.compare_set(f"{self._attempt}/members", "", json.dumps(uids))

    def tell_dead(self, uid: str, how: str) -> None:
        """Tell the workers that one of them has ended."""
        self._store.set(f"{self._attempt}/dead/{uid}", how)

    def tell_lost(self, hosts: Collection[int]) -> None:
        """Tell the workers that the members on hosts other than these have ended: the lost hosts cannot do so themselves."""
        for uid in self._members():
            if int(uid.partition(".")[0]) not in hosts and not self._has(f"dead/{uid}"):
                self.tell_dead(uid, _LOST)

    def tell_standing(self, uids: Iterable[str]) -> None:
        """Tell the workers which of this host's processes SIGSTOP holds; all others run."""
        before, self._standing = self._standing, frozenset(uids)
        for uid in before ^ self._standing:
            self._store.set(f"{self._attempt}/standing/{uid}", "1" if uid in self._standing else "0")

    def is_outside(self, uid: str) -> bool:
        """Whether the others have gone on without this worker."""
        return self._has(f"outside/{uid}")

    def tell_stop(self, signum: signal.Signals) -> None:
        """Tell the workers that the next signal is for all of them."""
        self._store.set(f"{self._attempt}/stop", str(int(signum)))

    def tell_failed(self, why: str) -> None:
        """Tell the other launchers that the run has failed."""
        self._store.set(f"{self._attempt}/failed", why)

    def call_again(self) -> bool:
        """Tell all launchers to start their workers again; whether we are the first to say so."""
        return self._store.add(f"{self._attempt}/again", 1) == 1

    def decisions(self) -> Decisions:
        """What other launchers have said."""
        stop, failed = (self._read(key) for key in ("stop", "failed"))
        signum = None if stop is None else signal.Signals(int(stop))
        return Decisions(failed=failed, again=self._has("again"), stop=signum)

    @property
    def is_elastic(self) -> bool:
        """Whether the workers have said that they can go on without one of them."""
        return self._has("elastic")

    @property
    def loose_end(self) -> str | None:
        """Why a run that no host continues is not finished: the last members that did not end well, and how they ended.
        None if it is finished."""
        if self.is_over:
            return None
        ends = {uid: self._read(f"dead/{uid}") or _LOST for uid in self._members()}
        return ", ".join(f"worker {uid} {how}" for uid, how in ends.items() if how != FINE) or None

    @property
    def is_over(self) -> bool:
        """Whether a worker has said that the run is finished."""
        return self._has("over")

    @property
    def needs_all(self) -> bool:
        """Whether a worker has said that they cannot go on without one of them."""
        return self._read("whole") == "0"

    def take_restart(self) -> int:
        """Count a restart, of one worker or of all; how many that makes in the whole run."""
        return self._store.add("unisono/restarts", 1)

    def _members(self) -> list[str]:
        uids: list[str] = json.loads(self._read("members") or "[]")
        return uids

    def _has(self, key: str) -> bool:
        return self._store.check([f"{self._attempt}/{key}"])

    def _read(self, key: str) -> str | None:
        return self._store.get(f"{self._attempt}/{key}").decode() if self._has(key) else None
