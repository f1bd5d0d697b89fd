"""What the doctor says about one thing."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Level(enum.StrEnum):
    """How serious a finding is."""

    FINE = "fine"
    NOTE = "note"
    """A run works, but slower or less safely than it could."""
    PROBLEM = "problem"
    """A run fails, is far slower than it must be, or loses its promise."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A fact, how serious it is, and what to do about it."""

    name: str
    """What was looked at."""
    level: Level
    """How serious it is."""
    fact: str
    """What was found, with values."""
    advice: str = ""
    """What to do; empty if nothing is to be done."""
    host: str = ""
    """Which host it is about; empty if it is about all of them together."""


def finding(name: str, fact: str, *, problem: str = "", note: str = "") -> Finding:
    """A finding whose level follows from the kind of its advice; without any, all is fine. *local*"""
    level = Level.PROBLEM if problem else Level.NOTE if note else Level.FINE
    return Finding(name=name, level=level, fact=fact, advice=problem or note)
