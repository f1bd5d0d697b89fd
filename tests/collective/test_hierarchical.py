"""Hosts of several workers: what they are, and the conformance suite and the promise on them.

All run on one machine, where workers are told on which host they are. Real ones are in test_two_hosts.py.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.collective.test_conformance import CHECKS, failed_checks
from tests.training.hard_problem import Digests, merged, train
from tests.training.test_promise import alone, differing
from tests.training.test_weights import Looks, digests, fit
from unisono.collective import Collective, InProcess
from unisono.collective.hierarchical import Hierarchical, come_near
from unisono.collective.hosts import HostMap
from unisono.collective.shared_memory import host_identity
from unisono.collective.torch_distributed import TorchDistributed
from unisono.errors import WorkerFailure


def on_hosts(collective: Collective, hosts: Sequence[int], work: Callable[..., Any], *args: Any) -> Any:
    """``work`` over the transport of workers that believe to be on these hosts, given by their numbers of workers."""
    assert isinstance(collective, TorchDistributed)
    names = [str(number) for number, members in enumerate(hosts) for _ in range(members)]
    nearest = come_near(collective, host=names[collective.rank])
    assert isinstance(nearest, Hierarchical), nearest
    return work(nearest, *args)


# ---- who stands in for whom ----


def test_a_relay_has_the_same_place_on_its_host() -> None:
    hosts = HostMap([[0, 1, 2], [3, 4]], rank=3)

    assert [hosts.relay(worker, (3, 4)) for worker in range(5)] == [3, 4, 3, 3, 4]
    assert [hosts.relay(worker, (0, 1, 2)) for worker in range(5)] == [0, 1, 2, 0, 1]
    assert (hosts.near, hosts.clients, hosts.relays) == ((3, 4), [0, 2], [0])
    assert [hosts.clients_of(worker) for worker in range(5)] == [[3], [4], [], [0, 2], [1]]


@pytest.mark.parametrize(("groups", "levels"), [([[0, 1]], False), ([[0], [1]], False), ([[0, 1], [2]], True)])
def test_there_are_two_levels_where_one_of_several_hosts_has_several_workers(groups: list[list[int]], levels: bool) -> None:
    assert HostMap(groups, 0).two_levels == levels


# ---- the interface ----


@pytest.fixture(scope="module", params=[(2, 1), (2, 2), (2, 1, 2)], ids=str)
def world(request: pytest.FixtureRequest, run_workers: Callable[..., Any]) -> list[dict[str, str]]:
    size = sum(request.param)
    return run_workers(size, on_hosts, request.param, failed_checks, size, "Hierarchical")


@pytest.mark.parametrize("name", list(CHECKS))
def test_the_interface_is_that_of_every_collective(name: str, world: list[dict[str, str]]) -> None:
    assert [failed.get(name) for failed in world] == [None] * len(world)


def published(collective: Collective) -> list[float]:
    """What lies in a tensor once every host has published all of it."""
    flat = torch.full((4,), float(collective.rank))
    collective.publish(flat, [(0, 3), (3, 4), (0, 4)])
    return flat.tolist()


def test_hosts_that_each_hold_everything_send_each_other_nothing(run_workers: Callable[..., Any]) -> None:
    assert run_workers(3, on_hosts, (2, 1), published) == [[0, 0, 0, 1], [0, 0, 0, 1], [2, 2, 2, 2]]


# ---- the promise ----


def promised(collective: Collective) -> list[Digests]:
    """What several ways to train end with."""
    ways: list[dict[str, Any]] = [{}, {"share_weights": True}, {"replicated": True}, {"overlap": True}]
    return [train(collective, 8, collective.size, **way) for way in ways]


def shared_fit(collective: Collective) -> tuple[list[bool], list[str]]:
    looks = Looks()
    trainer = fit(collective, looks)
    return looks.shared, digests(trainer)


@pytest.mark.parametrize("hosts", [(2, 1), (2, 2), (2, 3)], ids=str)
def test_training_ends_with_the_bits_of_one_process(hosts: tuple[int, ...], run_workers: Callable[..., Any]) -> None:
    found = run_workers(sum(hosts), on_hosts, hosts, promised, timeout_s=100)

    for everybodys in zip(*found, strict=True):
        assert differing(merged(list(everybodys)), alone(8)) == []


def test_the_workers_of_each_host_share_their_weights(run_workers: Callable[..., Any]) -> None:
    expected = digests(fit(InProcess(), Looks()))

    assert run_workers(4, on_hosts, (2, 2), shared_fit) == [([True] * 4, expected)] * 4


# ---- which transport workers get ----

CASES = ["aaaa", "abcd", "aaab", "abbb", "aabb", "abab", ["a", "a", "", "b"]]


def chosen(collective: Collective) -> list[str]:
    """What workers get who are on hosts of these names; the last time, one of them on a kernel without shared memory."""
    assert isinstance(collective, TorchDistributed)
    found: list[str] = []
    for names in [*CASES, "aabb"]:
        if len(found) == len(CASES) and collective.rank == 2:
            del os.memfd_create
        nearest = come_near(collective, host=names[collective.rank])
        found.append(nearest if isinstance(nearest, str) else type(nearest).__name__)
    return found


def test_workers_get_the_fastest_transport_that_their_hosts_allow_or_all_the_same_reason_why_not(
    run_workers: Callable[..., Any],
) -> None:
    found = run_workers(4, chosen)

    assert found == [found[0]] * 4
    assert found[0][:5] == ["SharedMemory", "TorchDistributed", "Hierarchical", "Hierarchical", "Hierarchical"]
    assert found[0][5].startswith("the workers of one host have the numbers 0, 2;")
    assert found[0][6] == "worker 2 cannot tell which machine it is on, since /proc cannot be read"
    assert found[0][7] == "module 'os' has no attribute 'memfd_create'"


def test_a_host_is_a_machine_and_a_network_namespace() -> None:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()

    assert host_identity().startswith(boot)
    assert str(Path("/proc/self/ns/net").readlink()) in host_identity()


# ---- failures ----


def lose(collective: Collective, guilty: int) -> str:
    """One worker ends without a word; what the others get."""
    for _ in range(3):
        collective.barrier()
    if collective.rank == guilty:
        os._exit(3)
    began = time.monotonic()
    try:
        for _ in range(3):
            collective.all_gather(torch.zeros(100_000))
    except WorkerFailure as error:
        collective.close()  # as the end of a worker that failed
        return f"WorkerFailure after {time.monotonic() - began < 10}: {error}"
    return "nothing"


def reported(collective: Collective, folder: str, guilty: int) -> None:
    told = lose(collective, guilty)
    (Path(folder) / str(collective.rank)).write_text(told)


@pytest.mark.parametrize("guilty", [0, 3])
def test_a_worker_that_dies_is_noticed_on_every_host(guilty: int, tmp_path: Path, run_workers: Callable[..., Any]) -> None:
    with pytest.raises(WorkerFailure, match=f"worker {guilty}: died without a word"):
        run_workers(4, on_hosts, (2, 2), reported, str(tmp_path), guilty)

    told = {int(path.name): path.read_text() for path in tmp_path.iterdir()}
    assert set(told) == {0, 1, 2, 3} - {guilty}
    assert all(text.startswith("WorkerFailure after True: ") and "lost contact" in text for text in told.values()), told
