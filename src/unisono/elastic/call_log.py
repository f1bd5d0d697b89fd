"""What the workers have done together so far in their script, for those who come later.

A worker that joins runs the script from its beginning. Whatever the others have finished by then (an evaluation, a ``fit``) it
does not do again: it is given the result that they had, so that its script takes the same turns, until it comes to the loop in
which they are.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from unisono.elastic.link import Link
from unisono.errors import FingerprintMismatch
from unisono.system.output import say

_POLL_S = 0.02


class CallLog:
    """The results of calls to the trainer that all workers make alike, in order. *Local.*

    Args:
        link: How workers tell each other; None: nobody comes later.
        joins: Whether this worker does.

    Attributes:
        outside: Whether this worker has yet to catch up with the others.
        just_joined: Whether it has entered a call of theirs in the middle.
    """

    def __init__(self, link: Link | None, *, joins: bool) -> None:
        self._link = link
        self._results: list[str] = []
        self._depth = 0
        self._data = ""
        self.outside = joins
        self.just_joined = False

    @contextmanager
    def call(self) -> Iterator[None]:
        """Around a call to the trainer: those inside it, by callbacks, are part of it."""
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1

    def done(self, result: Any, *, main: bool) -> None:
        """A call has ended with this result (what JSON can say).

        Args:
            main: Whether this worker speaks for all.
        """
        if self._link is None or self._depth:
            return
        self._data = ""
        self._results.append(json.dumps(result))
        if main:
            self._link.tell(self._key("history", len(self._results) - 1), self._results[-1])

    def recalled(self) -> list[Any]:
        """The result of the call that this worker, outside, is about to make: at most one; none if the others are in it, or not
        that far.

        Raises:
            SystemExit: With status 0: the others have finished.
        """
        assert self._link is not None
        result = self._link.ask(self._key("history"))
        if result is None:
            if self._link.ask("over") is not None:
                say("unisono: the run was finished before this worker could join it")
                raise SystemExit(0)
            self._link.membership.check_members()
            return []
        self._results.append(result)
        return [json.loads(result)]

    def wait(self) -> Any:
        """The result of a call that this worker cannot join, once the others have it."""
        assert self._link is not None
        while not (found := self.recalled()):
            self._link.pause(_POLL_S)
        return found[0]

    def enter(self, join: Callable[[Callable[[], bool]], bool], data: Sequence[str]) -> list[Any]:
        """Catches up with the others in a call that can be joined: its result, if they have finished it; else this worker takes
        part in it from now on.

        Args:
            join: Waits to be let in, or until it is told that there is nothing to wait for.
            data: What the call is given here (see ``Loop.call``).

        Raises:
            FingerprintMismatch: The others have other data or arguments.
        """
        assert self._link is not None
        link, result, loop = self._link, self._key("history"), self._key("data")
        while not (found := self.recalled()):
            theirs = link.ask(loop)
            if theirs is None:
                link.pause(_POLL_S)
                continue
            pairs = zip(json.loads(theirs), data, strict=True)
            if any(there != here and there and here for there, here in pairs):
                raise FingerprintMismatch(
                    f"this worker (process {os.getpid()}) cannot join: its data are not those of the run (number of samples, "
                    f"digests of some, arguments of fit or batches: {data} here, {theirs} there). Start it with the same command "
                    "and files; the run goes on without it",
                    fields=["data"],
                )
            if join(lambda: link.ask(result) is not None or link.ask("over") is not None):
                self.outside, self.just_joined = False, True
                break
        return found

    def begin_loop(self, data: Sequence[str], *, main: bool) -> None:
        """A call has begun that others can join, with these data."""
        self._data = json.dumps(data)
        self.publish(main=main)

    def describe(self) -> tuple[list[str], str]:
        """For ``adopt`` on another worker."""
        return self._results, self._data

    def adopt(self, description: tuple[list[str], str]) -> None:
        """Takes over what the others remember."""
        self._results, self._data = list(description[0]), description[1]

    def publish(self, *, main: bool) -> None:
        """Tells what may not have been told: whoever begins to speak for all does not know what its predecessor has said."""
        if not main or self._link is None:
            return
        for number, result in enumerate(self._results):
            self._link.tell(self._key("history", number), result)
        if self._data:
            self._link.tell(self._key("data"), self._data)

    def _key(self, kind: str, number: int | None = None) -> str:
        assert self._link is not None
        return f"{kind}/{self._link.trainers}/{len(self._results) if number is None else number}"
