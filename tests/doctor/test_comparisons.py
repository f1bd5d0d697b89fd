"""What facts about links, clocks, the run directory and several hosts mean."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.doctor.made_up import build, examination, gpus, links, machine, pair, two_hosts, worker
from unisono.doctor.comparisons import check_together
from unisono.doctor.facts import Examination, StorageFacts, WorkerFacts, dumps, loads
from unisono.doctor.findings import Finding, Level


def found(name: str, facts: Examination) -> Finding:
    (finding,) = [finding for finding in check_together(facts) if finding.name == name]
    return finding


@pytest.mark.parametrize("facts", [examination(), two_hosts()])
def test_healthy_workers_are_fine_throughout(facts: Examination) -> None:
    assert {finding.level for finding in check_together(facts)} == {Level.FINE}


def test_links_stand_beside_what_the_hardware_allows() -> None:
    shared, gloo = found("shared memory", examination()), found("Gloo", examination())
    assert shared.fact == "barrier 30 us, 64 KiB 50 us, 64 MiB at 5.0 GB/s each way, 83% of what a core copies (6.0 GB/s)"
    assert gloo.fact.endswith("64 MiB at 1.5 GB/s each way; used between hosts, and where memory cannot be shared")


@pytest.mark.parametrize(
    "changes",
    [
        {"links": [links("shared memory", [pair(0, 1, rate=1e9)])]},
        {"links": [links("shared memory", [pair(0, 1)], barrier_s=0.01)]},
        {"links": [links("Gloo", [pair(0, 1, rate=0.1e9)])]},
        {"links": [links("Gloo", [pair(0, 1, rate=2e9)])], "no_shared_memory": "not permitted"},
        {"links": [links("Gloo", [pair(0, 1, rate=2e9)], barrier_s=0.1)]},
    ],
)
def test_a_slow_link_that_a_run_would_use_is_a_note(changes: dict[str, Any]) -> None:
    assert check_together(examination(**changes))[0].level == Level.NOTE


def test_a_slow_link_that_a_run_would_not_use_is_not() -> None:
    facts = examination(links=[links("shared memory", [pair(0, 1)]), links("Gloo", [pair(0, 1, rate=1e6)])])
    assert found("Gloo", facts).level == Level.FINE


def test_the_reason_for_no_shared_memory_is_given() -> None:
    facts = examination(links=[links("Gloo", [pair(0, 1, rate=2e9)])], no_shared_memory="Operation not permitted")
    assert "cannot share memory (Operation not permitted)" in found("Gloo", facts).advice


def test_a_pair_that_is_slower_than_the_others_is_named() -> None:
    workers = [worker(rank, host=host) for rank, host in enumerate(("alpha", "beta", "gamma"))]
    pairs = [pair(0, 1, rate=1e9), pair(0, 2, rate=1e9), pair(1, 2, rate=0.2e9)]
    facts = examination(workers=workers, links=[links("Gloo", pairs)], clock_offsets=[0.0] * 3)
    finding = found("Gloo", facts)
    assert finding.level == Level.NOTE
    assert "Workers 1 (beta) and 2 (gamma) exchange 200.0 MB/s, the others 1.0 GB/s" in finding.advice


def test_links_within_a_host_are_not_compared_with_those_between_hosts() -> None:
    workers = [worker(rank, host="beta" if rank == 3 else "alpha") for rank in range(4)]
    pairs = [pair(a, b, rate=1e9 if b == 3 else 9e9) for a in range(4) for b in range(a + 1, 4)]
    facts = examination(workers=workers, links=[links("Gloo", pairs)], clock_offsets=[0.0] * 4)
    assert found("Gloo", facts).level == Level.FINE


@pytest.mark.parametrize(("offset", "level"), [(0.001, Level.FINE), (-0.2, Level.NOTE), (90.0, Level.PROBLEM)])
def test_clocks_are_compared_between_hosts(offset: float, level: Level) -> None:
    finding = found("clocks", two_hosts(clock_offsets=[0.0, offset]))
    assert finding.level == level
    assert ("behind alpha" if offset < 0 else "ahead of alpha") in finding.fact
    assert found("clocks", examination()).fact == "one host: nothing to compare"


@pytest.mark.parametrize(
    ("changes", "level"),
    [
        ({"error": "Permission denied"}, Level.PROBLEM),
        ({"blind": [1]}, Level.PROBLEM),
        ({"free": 10_000_000}, Level.PROBLEM),
        ({"free": 1_000_000_000}, Level.NOTE),
        ({"rate": 5e6}, Level.NOTE),
        ({"small_s": 0.5}, Level.NOTE),
        ({"free": None}, Level.FINE),
    ],
)
def test_the_run_directory(changes: dict[str, Any], level: Level) -> None:
    usual = StorageFacts(url="runs", small_s=0.001, rate=1e9, free=10**12)
    assert found("run directory", examination(storage=replace(usual, **changes))).level == level


def test_workers_that_do_not_see_the_run_directory_are_named() -> None:
    facts = two_hosts(storage=StorageFacts(url="runs", small_s=0.001, rate=1e9, blind=[1]))
    assert found("run directory", facts).fact.endswith("what worker 0 writes is not seen by worker 1 (beta)")


def test_another_build_on_one_host_is_a_problem() -> None:
    other = worker(1, host="beta", build=build(fingerprint={**build().fingerprint, "torch": "2.12.0"}))
    finding = found("same build", two_hosts(workers=[worker(0), other]))
    assert (finding.level, finding.fact) == (Level.PROBLEM, "torch differs: 2.13.0 on alpha, 2.12.0 on beta")


def test_a_variable_that_only_one_worker_has_is_a_problem_on_one_host_too() -> None:
    other = worker(1, build=build(fingerprint={**build().fingerprint, "MKL_CBWR": "AVX2"}))
    assert (
        "MKL_CBWR differs: not set on alpha, AVX2 on alpha" in found("same build", examination(workers=[worker(0), other])).fact
    )


def test_other_sizes_of_hosts_are_notes() -> None:
    small = worker(1, host="beta", planned=1, machine=machine(host="beta", cores=4, affinity=[0, 1, 2, 3]))
    facts = two_hosts(workers=[worker(0, planned=1), small])
    finding = found("same hosts", facts)
    assert (finding.level, finding.fact) == (Level.NOTE, "cores: 8 on alpha, 4 on beta")


def test_workers_that_failed_are_a_problem_with_their_own_words() -> None:
    finding = found("workers", Examination(workers=[worker(0)], failure="worker 1 of 2 was killed by SIGILL"))
    assert (finding.level, finding.fact) == (Level.PROBLEM, "worker 1 of 2 was killed by SIGILL")


@pytest.mark.parametrize("facts", [examination(), two_hosts(storage=None), Examination(workers=[worker(build=None)])])
def test_an_examination_survives_the_journey(facts: Examination) -> None:
    assert loads(Examination, dumps(facts)) == facts


def test_gpus_survive_the_journey() -> None:
    facts = worker(build=build(gpus=gpus(2)), machine=machine(quota=1.5, variables={"OMP_PLACES": "cores"}))
    assert loads(WorkerFacts, dumps(facts)) == facts
