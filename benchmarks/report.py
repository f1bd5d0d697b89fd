"""What the benchmarks write: Markdown tables, raw numbers, pictures, and the facts about the machine."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from processes import Memory

HERE = Path(__file__).parent
BASELINE, PLAIN = "DDP", "plain, 2 threads"
PACKAGES = ("torch", "accelerate", "lightning-fabric", "deepspeed", "torchft")
MIB = 2**20


@dataclasses.dataclass(kw_only=True)
class Case:
    """What was measured of one workload; all lists run over rounds."""

    seconds: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    """A step of each peer."""
    compute: list[float] = dataclasses.field(default_factory=list)
    """The limit's compute."""
    moving: list[float] = dataclasses.field(default_factory=list)
    """The limit's memory passes."""
    moved_bytes: int = 0
    memory: dict[str, Memory | None] = dataclasses.field(default_factory=dict)
    losses: dict[str, float] = dataclasses.field(default_factory=dict)
    """Mean loss after the first steps: the same work for all."""
    left_out: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def limit(self) -> list[float]:
        return [a + b for a, b in zip(self.compute, self.moving, strict=True)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spread:
    """Median and quartiles."""

    low: float
    middle: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(low=low, middle=middle, high=high)

    @classmethod
    def ratio(cls, above: Sequence[float], below: Sequence[float]) -> Spread:
        """Of the ratio, round by round."""
        return cls.of([a / b for a, b in zip(above, below, strict=True)])

    def text(self, digits: int = 2, scale: float = 1.0) -> str:
        low, middle, high = (f"{value * scale:.{digits}f}" for value in (self.low, self.middle, self.high))
        return f"{middle} ({low}–{high})"


def rows(case: Case) -> list[tuple[str, ...]]:
    """For each peer: name, ms, speed over DDP, speed over plain PyTorch with 2 threads, limit over time, PSS in MiB."""
    found: list[tuple[str, ...]] = []
    for peer, seconds in case.seconds.items():
        memory = case.memory.get(peer)
        found.append(
            (
                peer,
                Spread.of(seconds).text(scale=1e3),
                _ratio(case.seconds.get(BASELINE), seconds),
                _ratio(case.seconds.get(PLAIN), seconds),
                f"{Spread.ratio(case.limit, seconds).middle:.0%}",
                "–" if memory is None else f"{memory.pss / MIB:.0f}",
            )
        )
    return found


def limit_line(case: Case) -> str:
    """The limit and what it consists of."""
    moving = Spread.of(case.moving).middle
    return (
        f"limit {1e3 * Spread.of(case.limit).middle:.2f} ms = compute of a share {1e3 * Spread.of(case.compute).middle:.2f} ms "
        f"+ {case.moved_bytes / MIB:.1f} MiB moved by each worker {1e3 * moving:.2f} ms "
        f"({case.moved_bytes / moving / 1e9:.0f} GB/s)"
    )


def table(name: str, case: Case) -> str:
    """A Markdown table of one case."""
    lines = [
        f"## {name}",
        "",
        "| peer | ms a step | speed over DDP | speed over plain, 2 threads | share of the limit | PSS, MiB |",
        "|---|---|---|---|---|---|",
        *(f"| {' | '.join(row)} |" for row in rows(case)),
        "",
        limit_line(case) + ".",
    ]
    return "\n".join([*lines, *(f"{peer} was left out: {reason}" for peer, reason in case.left_out.items())])


def about(rounds: int) -> dict[str, Any]:
    """Command, commit, machine and date."""
    return {
        "command": shlex.join(["python", *(_relative(word) for word in sys.argv)]),
        "commit": _commit(),
        "machine": _machine(),
        "packages": ", ".join(f"{package} {version}" for package in PACKAGES if (version := _version(package))),
        "date": datetime.date.today().isoformat(),
        "rounds": rounds,
    }


def save(folder: Path, name: str, facts: dict[str, Any], cases: dict[str, Case]) -> None:
    """Writes ``name.md``, ``name.json`` and ``name.png``."""
    folder.mkdir(parents=True, exist_ok=True)
    header = "\n".join(f"- {key}: {value}" for key, value in facts.items())
    tables = "\n\n".join(table(case, measured) for case, measured in cases.items())
    (folder / f"{name}.md").write_text(
        f"# Training on one machine\n\n{header}\n\n"
        "Medians over rounds, quartiles in parentheses; ratios are taken round by round, more is better. The share of the limit "
        "(`limit.py`) is that of two workers; plain PyTorch with one thread has one core only. PSS is summed over a peer's "
        "workers, while all peers are alive and share the pages of program code.\n\n"
        f"![times]({name}.png)\n\n{tables}\n"
    )
    raw = {case: dataclasses.asdict(measured) for case, measured in cases.items()}
    (folder / f"{name}.json").write_text(json.dumps({**facts, "cases": raw}, indent=1) + "\n")
    draw(folder / f"{name}.png", cases)


def draw(path: Path, cases: dict[str, Case]) -> None:
    """A panel for each case: a bar for each peer, quartiles as whiskers, the limit as a line."""
    from matplotlib.figure import Figure

    columns = min(3, len(cases))
    lines = -(-len(cases) // columns)
    peers = list(dict.fromkeys(peer for case in cases.values() for peer in case.seconds))
    figure = Figure(figsize=(1.8 + 4.1 * columns, 0.9 + lines * (0.7 + 0.27 * len(peers))), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).flatten()
    for panel, (name, case) in zip(panels, cases.items(), strict=False):
        _panel(panel, name, case, peers)
    for number, panel in enumerate(panels):
        panel.set_visible(number < len(cases))
        if number % columns:
            panel.set_yticklabels([])
    figure.supxlabel("ms a step (less is better); beside the bars: speed over DDP; dashed: the limit", fontsize=9)
    figure.savefig(path, dpi=130)


def _panel(panel: Any, name: str, case: Case, peers: list[str]) -> None:
    widest = 0.0
    for place, peer in enumerate(peers):
        if peer not in case.seconds:
            panel.text(0, place, " left out", va="center", fontsize=7, color="gray")
            continue
        spread = Spread.of([1e3 * second for second in case.seconds[peer]])
        color = "#c8553d" if peer.startswith("unisono") else "#33658a" if peer == BASELINE else "#9db4c0"
        whiskers = [[spread.middle - spread.low], [spread.high - spread.middle]]
        panel.barh(place, spread.middle, color=color, xerr=whiskers, error_kw={"linewidth": 0.8, "ecolor": "black"})
        label = f" {spread.middle:.3g} ms"
        if BASELINE in case.seconds:
            label += f"  {Spread.ratio(case.seconds[BASELINE], case.seconds[peer]).middle:.2f}×"
        panel.text(spread.high, place, label, va="center", fontsize=7, bbox={"facecolor": "white", "linewidth": 0, "pad": 0.5})
        widest = max(widest, spread.high)
    panel.axvline(1e3 * Spread.of(case.limit).middle, color="black", linewidth=0.9, linestyle="--")
    panel.set_xlim(0, 1.45 * widest)
    panel.set_yticks(range(len(peers)), peers, fontsize=8)
    panel.invert_yaxis()
    panel.tick_params(axis="x", labelsize=7)
    panel.set_title(name, fontsize=10)
    panel.spines[["top", "right"]].set_visible(False)


def _ratio(above: Sequence[float] | None, below: Sequence[float]) -> str:
    return "–" if above is None else Spread.ratio(above, below).text()


def _relative(word: str) -> str:
    path = Path(word)
    return str(path.resolve().relative_to(HERE.parent)) if path.resolve().is_relative_to(HERE) else word


def _machine() -> str:
    models = [line.split(":")[1].strip() for line in _read("/proc/cpuinfo").splitlines() if "model name" in line]
    return (
        f"{platform.machine()}, {os.cpu_count()} cores ({models[0] if models else 'unknown'}), Python {platform.python_version()}"
    )


def _read(path: str) -> str:
    return Path(path).read_text() if Path(path).exists() else ""


def _commit() -> str:
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
