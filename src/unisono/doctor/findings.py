"""What the doctor says about one thing."""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass


class Level(enum.StrEnum):
    """How serious a finding is, in rising order."""

    FINE = "fine"
    NOTE = "note"
    """A run works, but slower or less safely than it could."""
    PROBLEM = "problem"
    """A run fails, is far slower than it must be, or loses its promise."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A fact, how serious it is, and what to do about it."""

    name: str  # what was looked at
    level: Level
    fact: str  # what was found, with values
    advice: str = ""  # what to do; empty if nothing is to be done
    host: str = ""  # which host it is about; empty if it is about all of them together


def finding(name: str, fact: str, *, problem: str = "", note: str = "") -> Finding:
    """A finding whose advice is the problem's, else the note's, and whose level follows from that: without any, all is fine."""
    level = Level.PROBLEM if problem else Level.NOTE if note else Level.FINE
    return Finding(name=name, level=level, fact=fact, advice=problem or note)


def worst(findings: Iterable[Finding]) -> Level:
    """The level of the most serious finding."""
    return max((found.level for found in findings), key=list(Level).index, default=Level.FINE)
