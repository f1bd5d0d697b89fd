"""Ranges that change again and again while training goes on, as no measurement would ever ask for."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from unisono.guard import stragglers
from unisono.guard.stragglers import TimingBlock
from unisono.training.balance import Balance
from unisono.tree import Span

Ranges = tuple[Span, ...]


def drawn(leaves: int, workers: int, seed: object) -> Ranges:
    """Any ranges, of at least one microbatch."""
    cuts = sorted(random.Random(f"{seed} {leaves} {workers}").sample(range(1, leaves), workers - 1))
    return tuple(pairwise([0, *cuts, leaves]))


def make_restless(monkeypatch: pytest.MonkeyPatch, seed: int = 0) -> list[Ranges]:
    """From now on every balance wants other ranges at each of its blocks, which are single steps.

    Returns:
        All that have been asked for, by all workers.
    """
    asked: list[Ranges] = []

    def add(balance: Balance, block: TimingBlock) -> Ranges:
        before = sum(ranges is balance for ranges in called)
        called.append(balance)
        balance.ranges = drawn(balance.ranges[-1][1], len(balance.ranges), f"{seed} {before}")
        asked.append(balance.ranges)
        return balance.ranges

    called: list[Balance] = []
    monkeypatch.setattr(stragglers, "BLOCK_S", 0.0)
    monkeypatch.setattr(Balance, "add", add)
    return asked
