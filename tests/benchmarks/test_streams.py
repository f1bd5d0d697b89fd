"""Plain TCP between real processes, which is what Gloo is measured against."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from benchmarks.streams import measure_streams, own_address
from unisono.collective.base import Collective
from unisono.doctor.facts import Links
from unisono.world import World


def _streams(collective: Collective) -> Links:
    # Worker 2 cannot be reached.
    address = None if collective.rank == 2 else "127.0.0.1"
    return measure_streams(collective, address, large_bytes=2**21)


def test_plain_tcp_is_measured_between_those_who_can_reach_each_other(run_workers: Callable[..., Any]) -> None:
    first, *others = run_workers(4, _streams)
    assert all(other == first for other in others)
    assert [(pair.first, pair.second) for pair in first.pairs] == [(0, 1), (0, 3), (1, 3)]
    assert 0 < first.barrier_s < 1
    assert all(pair.large_rate > 1e6 for pair in first.pairs)


def test_a_worker_is_reached_at_the_address_of_its_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    assert own_address(World(size=2, local_size=2, master_addr="example.invalid", master_port=1)) == "127.0.0.1"
    spread = World(size=2, local_size=1, master_addr="127.0.0.1", master_port=1)
    assert own_address(spread) == "127.0.0.1"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    assert own_address(spread) == "127.0.0.1"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nonsense")
    with pytest.raises(OSError, match="No such device"):
        own_address(spread)
