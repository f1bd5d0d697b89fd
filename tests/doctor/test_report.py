"""Findings as a person and a program read them."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest
from rich.console import Console

from tests.doctor.made_up import examination, links, machine, pair, two_hosts, worker
from unisono.doctor.build import topology
from unisono.doctor.facts import Examination
from unisono.doctor.findings import Finding, Level, worst
from unisono.doctor.report import as_json, findings, rows, show

TOPOLOGY = """\t\x1b[4mGPU0\tGPU1\tGPU2\tNIC0\tCPU Affinity\tNUMA Affinity\x1b[0m
GPU0\t X \tNV18\tSYS\tPIX\t0-51\t0
GPU1\tNV18\t X \tSYS\tSYS\t0-51\t0
GPU2\tSYS\tSYS\t X \tSYS\t52-103\t1
NIC0\tPIX\tSYS\tSYS\t X \t\t

Legend:
  X    = Self
"""


def text(facts: Examination, width: int = 200) -> str:
    console = Console(file=io.StringIO(), width=width)
    show(console, facts, findings(facts))
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def crowded() -> Examination:
    return examination(workers=[worker(rank, planned=4, machine=machine(quota=1.5)) for rank in (0, 1)])


def test_a_healthy_machine_ends_with_no_problems() -> None:
    assert text(examination()).splitlines()[-1] == "0 problems, 0 notes, 16 fine"


def test_advice_follows_its_fact() -> None:
    lines = text(crowded()).splitlines()
    (number,) = [number for number, line in enumerate(lines) if "1.5 usable" in line]
    assert lines[number].startswith("problem  cores")
    assert lines[number + 1].strip().startswith("-> Start 1 worker (--workers 1")


def test_a_narrow_terminal_loses_no_word() -> None:
    facts = crowded()
    narrow, wide = text(facts, width=60).split(), text(facts, width=300).split()
    assert sorted(narrow) == sorted(wide)


def test_three_workers_have_a_matrix_of_links() -> None:
    pairs = [pair(0, 1, rate=5e9), pair(0, 2, rate=4e9), pair(1, 2, rate=3e9, small_s=70e-6)]
    shown = text(examination(workers=[worker(rank) for rank in range(3)], links=[links("shared memory", pairs)]))
    assert "shared memory: GB/s each way / microseconds for 64 KiB" in shown
    table = [line.split() for line in shown.partition("microseconds for 64 KiB\n")[2].splitlines()]
    first, second, third = ("5.00", "/", "50"), ("4.00", "/", "50"), ("3.00", "/", "70")
    assert table[:4] == [["worker", "0", "1", "2"], ["0", *first, *second], ["1", *first, *third], ["2", *second, *third]]
    assert "microseconds" not in text(examination())


def test_of_many_workers_the_slowest_links_are_shown() -> None:
    size = 20
    pairs = [pair(a, b, rate=1e6 if (a, b) == (3, 17) else 5e9) for a in range(size) for b in range(a + 1, size)]
    shown = text(examination(workers=[worker(rank) for rank in range(size)], links=[links("shared memory", pairs)]))
    assert "the slowest links (shared memory; all of them: --json)\n  3 (alpha) - 17 (alpha): 1.0 MB/s" in shown


def test_what_is_the_same_on_all_hosts_is_said_once() -> None:
    same = [Finding(name="cores", level=Level.FINE, fact="8", host=host) for host in ("alpha", "beta", "gamma")]
    assert [where for where, _ in rows(same, 3)] == ["all hosts"]
    other = [*same[:2], replace(same[2], level=Level.PROBLEM, fact="1", advice="more")]
    assert [(where, finding.fact) for where, finding in rows(other, 3)] == [("alpha, beta", "8"), ("gamma", "1")]


def test_of_many_fine_hosts_one_is_shown_and_each_problem() -> None:
    fine = [Finding(name="cores", level=Level.FINE, fact=str(number), host=f"host-{number}") for number in range(9)]
    bad = [replace(fine[5], level=Level.PROBLEM, fact="none", advice="some")]
    assert [where for where, _ in rows([*fine[:5], *bad, *fine[6:]], 9)] == ["host-0, and 7 other hosts as fine", "host-5"]


def test_findings_of_several_hosts_name_them() -> None:
    assert "all hosts: none: workers compute on the CPU" in text(two_hosts())
    assert "all hosts" not in text(examination())


def test_json_has_findings_and_facts() -> None:
    facts = two_hosts(clock_offsets=[0.0, 90.0])
    document = json.loads(as_json(facts, findings(facts)))
    assert document["level"] == "problem"
    (clocks,) = [finding for finding in document["findings"] if finding["name"] == "clocks"]
    assert clocks["level"] == "problem"
    assert document["facts"]["workers"][1]["machine"]["host"] == "beta"
    assert document["facts"]["links"][0]["pairs"][0]["large_rate"] == 1.5e9


@pytest.mark.parametrize(
    ("levels", "expected"),
    [([], Level.FINE), (["fine", "note"], Level.NOTE), (["problem", "note", "fine"], Level.PROBLEM)],
)
def test_the_worst_finding_counts(levels: list[str], expected: Level) -> None:
    assert worst([Finding(name="x", level=Level(level), fact="") for level in levels]) == expected


def test_the_topology_of_gpus_is_read_without_nics_and_legend() -> None:
    assert topology(TOPOLOGY) == {
        0: {"1": "NV18", "2": "SYS"},
        1: {"0": "NV18", "2": "SYS"},
        2: {"0": "SYS", "1": "SYS"},
    }
    assert topology("") == {}
