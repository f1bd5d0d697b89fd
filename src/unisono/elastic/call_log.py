"""The user's calls to the trainer so far, with their results, for workers that join later.

A worker that joins runs the script from its beginning. Calls that the others have finished by then (an evaluation, a ``fit``) it
does not make again: it takes the result that they had, so that its script goes the same way, until it comes to the loop in which
they are. Everything here is *local*.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence

from unisono.elastic.link import Link
from unisono.errors import FingerprintMismatch
from unisono.system.output import say
from unisono.training.session import Call

_POLL_S = 0.02


class CallLog:
    """The calls that all workers make alike, in order.

    Args:
        link: How workers tell each other.

    Attributes:
        is_outside: Whether this worker has yet to catch up with the others.
        is_midway: Whether it has entered a call of theirs in the middle.
    """

    def __init__(self, link: Link) -> None:
        self._link = link
        self._results: list[str] = []
        self._arguments = ""
        self.is_outside = link.generation is None
        self.is_midway = False

    def done(self, result: object, *, main: bool) -> None:
        """A call has ended with this result.

        Args:
            main: Whether this worker speaks for all.
        """
        self._arguments = ""
        self._results.append(json.dumps(result))
        if main:
            self._link.tell(self._key("history", len(self._results) - 1), self._results[-1])

    def begin_loop(self, arguments: Sequence[str], *, main: bool) -> None:
        """A call has begun that others can join, with these arguments."""
        self._arguments = json.dumps(list(arguments))
        self.publish(main=main)

    def publish(self, *, main: bool) -> None:
        """Tells all calls: a worker that begins to speak for all does not know which of them its predecessor has told."""
        if not main:
            return
        for number, result in enumerate(self._results):
            self._link.tell(self._key("history", number), result)
        if self._arguments:
            self._link.tell(self._key("data"), self._arguments)

    # ------------------------------------------------------------------ on a worker that is outside

    def wait(self) -> Call:
        """A call that this worker cannot join, once the others have its result."""
        while (call := self._recorded()) is None:
            self._link.pause(_POLL_S)
        return call

    def enter(self, join: Callable[[Callable[[], bool]], bool], arguments: Sequence[str]) -> Call:
        """A call that can be joined: finished, if the others have finished it; else this worker takes part from now on.

        Args:
            join: Waits to be let in, or until it is told that there is nothing to wait for.
            arguments: What the call is given here.

        Raises:
            FingerprintMismatch: The others have other data or arguments.
        """
        link, result, loop = self._link, self._key("history"), self._key("data")
        while (call := self._recorded()) is None:
            theirs = link.ask(loop)
            if theirs is None:
                link.pause(_POLL_S)
                continue
            pairs = zip(json.loads(theirs), arguments, strict=True)
            if any(there != here and there and here for there, here in pairs):
                raise FingerprintMismatch(
                    f"this worker (process {os.getpid()}) cannot join: its data differ from the run's (number of samples, "
                    f"digests of some, arguments of fit or batches: {arguments} here, {theirs} there). Start it with the same "
                    "command and files; the run goes on without it",
                    fields=["data"],
                )
            if join(lambda: link.ask(result) is not None or link.ask("over") is not None):
                self.is_outside, self.is_midway = False, True
                return Call()
        return call

    def _recorded(self) -> Call | None:
        """The call that this worker is about to make, if the others have finished it; None if they are in it, or not that far.

        Raises:
            SystemExit: With status 0: the others have finished.
        """
        result = self._link.ask(self._key("history"))
        if result is not None:
            self._results.append(result)
            return Call(json.loads(result), is_done=True)
        if self._link.ask("over") is not None:
            say("unisono: the run was finished before this worker could join it")
            raise SystemExit(0)
        self._link.membership.check_members()
        return None

    # ------------------------------------------------------------------ on a worker that joins

    def describe(self) -> list[object]:
        """For ``adopt`` on another worker."""
        return [self._results, self._arguments]

    def adopt(self, description: Sequence[object]) -> None:
        """Takes over what another worker remembers."""
        results, arguments = description
        assert isinstance(results, list)
        self._results, self._arguments = [str(result) for result in results], str(arguments)

    def _key(self, kind: str, number: int | None = None) -> str:
        return f"{kind}/{self._link.trainers}/{len(self._results) if number is None else number}"
