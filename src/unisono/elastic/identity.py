"""Whether a worker that wants to join a run belongs to it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from typing import Any

from unisono.collective import Collective
from unisono.elastic.link import Link
from unisono.errors import FingerprintMismatch

_POLL_S = 0.02


def tell_identity(link: Link, identity: Mapping[str, Any]) -> None:
    """*local*. Tells those who come later what run this is."""
    link.tell(f"identity/{link.trainers}", json.dumps(identity))


def tell_arguments(link: Link, collective: Collective) -> None:
    """*collective*. Tells the script's arguments that all workers have alike: those who join must have them, too. Where workers
    have different ones from the beginning (paths on their hosts), so may those who join."""
    told = [json.loads(text) for text in collective.all_gather_bytes(json.dumps(sys.argv[1:]).encode())]
    alike = None
    if len({len(arguments) for arguments in told}) == 1:
        alike = [values[0] if len(set(values)) == 1 else None for values in zip(*told, strict=True)]
    link.tell(f"arguments/{link.trainers}", json.dumps(alike))


def check_identity(link: Link, identity: Mapping[str, Any]) -> None:
    """*local*, on a worker that is to join. Waits for what the members tell, and compares.

    Raises:
        FingerprintMismatch: It does not belong to the run; the message names the first difference.
        SystemExit: With status 0: the run was finished before.
    """
    theirs = _told(link, f"identity/{link.trainers}")
    for name, value in json.loads(json.dumps(identity)).items():
        if theirs.get(name) != value:
            is_digest = name == "script"  # which tells a person nothing
            what = "another than the run's" if is_digest else f"{_short(value)}, the run's {_short(theirs.get(name))}"
            raise FingerprintMismatch(
                f"this worker (process {os.getpid()}) cannot join the run: its {name} is {what}. Start it with the same script, "
                "settings and builds; the run goes on without it",
                fields=[name],
            )
    run, own = _told(link, f"arguments/{link.trainers}"), sys.argv[1:]
    if run is None:
        return
    different = [f"{mine!r}, not {its!r}" for its, mine in zip(run, own, strict=False) if its not in (None, mine)]
    if len(run) != len(own):
        different = [f"{len(own)} of them, not {len(run)}"]
    if different:
        raise FingerprintMismatch(
            f"this worker (process {os.getpid()}) cannot join the run: its script has other arguments than the run's "
            f"({_short('; '.join(different))}). Start it with the same ones, and pass what differs from host to host in "
            "environment variables; the run goes on without it",
            fields=["arguments"],
        )


def tell_run_dir(link: Link, run_dir: str) -> None:
    """*local*. Tells those who come later where the run is kept."""
    link.tell(f"run_dir/{link.trainers}", json.dumps(run_dir))


def ask_run_dir(link: Link) -> str:
    """*local*, on a worker that is to join. Waits for that."""
    return str(_told(link, f"run_dir/{link.trainers}"))


def _told(link: Link, key: str) -> Any:
    """What the members have told, once they have."""
    while (text := link.ask(key)) is None:
        if link.ask("over") is not None:
            raise SystemExit(0)
        link.membership.check_members()
        link.pause(_POLL_S)
    return json.loads(text)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 200 else f"{text[:197]}..."
