"""Findings as a person reads them, and as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from unisono.doctor.checks import check_host
from unisono.doctor.comparisons import check_together
from unisono.doctor.facts import Examination, Links
from unisono.doctor.findings import Finding, Level, worst
from unisono.observe.formats import count, data_size

if TYPE_CHECKING:
    from rich.console import Console

_COLOURS = {Level.FINE: "green", Level.NOTE: "yellow", Level.PROBLEM: "bold red"}
_LARGEST_MATRIX = 16
_SLOWEST = 5
_FEW = 4


def findings(examination: Examination) -> list[Finding]:
    """All findings: those about each host, then those about all together. *local*"""
    by_host = [found for workers in examination.hosts.values() for found in check_host(workers)]
    return by_host + check_together(examination)


def as_json(examination: Examination, found: Sequence[Finding]) -> str:
    """Findings, and the facts behind them. *local*"""
    document = {"level": worst(found), "findings": [asdict(finding) for finding in found], "facts": asdict(examination)}
    return json.dumps(document, indent=2, allow_nan=False)


def show(console: Console, examination: Examination, found: Sequence[Finding]) -> None:
    """The table, the matrix of links if there are three workers or more, and the sum of it. *local*"""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for where, finding in rows(found, len(examination.hosts)):
        text = Text(f"{where}: {finding.fact}" if where else finding.fact)
        if finding.advice:
            text.append(f"\n-> {finding.advice}", style=_COLOURS[finding.level])
        table.add_row(Text(finding.level, style=_COLOURS[finding.level]), finding.name, text)
    console.print(table)
    if len(examination.workers) > 2 and examination.links:
        _show_links(console, examination, examination.links[0])
    numbers = {level: sum(finding.level == level for finding in found) for level in Level}
    console.print(
        f"\n{count(numbers[Level.PROBLEM], 'problem')}, {count(numbers[Level.NOTE], 'note')}, {numbers[Level.FINE]} fine",
        style=_COLOURS[worst(found)],
    )


def rows(found: Sequence[Finding], hosts: int) -> list[tuple[str, Finding]]:
    """Where and what, one a line: what is the same on several hosts is said once, and each thing of all hosts together.

    Of more than a few fine hosts whose facts differ only the first is shown: JSON has them all. *local*
    """
    names: dict[str, dict[Finding, list[str]]] = {}
    for finding in found:
        names.setdefault(finding.name, {}).setdefault(replace(finding, host=""), []).append(finding.host)
    lines: list[tuple[str, Finding]] = []
    for same in names.values():
        fine = [finding for finding in same if finding.level == Level.FINE and same[finding] != [""]]
        for finding, where in same.items():
            if hosts == 1 or where == [""]:
                lines.append(("", finding))
            elif finding not in fine or len(fine) <= _FEW:
                lines.append(("all hosts" if len(where) == hosts else ", ".join(where), finding))
            elif finding == fine[0]:
                rest = sum(len(same[other]) for other in fine) - 1
                lines.append((f"{where[0]}, and {count(rest, 'other host')} as fine", finding))
    return lines


def _show_links(console: Console, examination: Examination, links: Links) -> None:
    from rich.table import Table

    host = [worker.host for worker in examination.workers]
    if len(host) > _LARGEST_MATRIX:
        console.print(f"\nthe slowest links ({links.transport}; all of them: --json)")
        for pair in sorted(links.pairs, key=lambda pair: pair.large_rate)[:_SLOWEST]:
            ends = f"{pair.first} ({host[pair.first]}) - {pair.second} ({host[pair.second]})"
            console.print(f"  {ends}: {data_size(pair.large_rate)}/s, {pair.small_s * 1e6:,.0f} us")
        return
    console.print(f"\n{links.transport}: GB/s each way / microseconds for 64 KiB")
    table = Table(box=None, pad_edge=False)
    table.add_column("worker")
    cells = [["" for _ in host] for _ in host]
    for pair in links.pairs:
        text = f"{pair.large_rate / 1e9:.2f} / {pair.small_s * 1e6:,.0f}"
        cells[pair.first][pair.second] = cells[pair.second][pair.first] = text
    for rank in range(len(host)):
        table.add_column(str(rank), justify="right")
    for rank, row in enumerate(cells):
        table.add_row(f"{rank} {host[rank]}" if len(examination.hosts) > 1 else str(rank), *row)
    console.print(table)
