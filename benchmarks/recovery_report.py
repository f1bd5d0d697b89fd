"""The tables of ``recovery.py``, from the pieces that it measured."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from recovery_systems import SYSTEMS

Piece = dict[str, Any]

EXPLANATION = """\
Seconds are medians over kills, 95th percentiles in parentheses. Each worker notes its steps in a file; what follows is read from
it. m is the median time of an undisturbed step in the same runs, which for torchrun includes its checkpoint.

- *recovery*: the longest of the waits for the next three committed steps, the first counted from the SIGKILL, less m. (The step
  under way may still be committed; then the one after it is the one that waits.)
- *all again*: from the SIGKILL to the first step in which the full number of workers took part.
- *lost time*: that, less m for each step that the others committed meanwhile.
- *steps lost*, a kill: steps that had been taken and were taken again, and attempts given up with their samples.
- *samples lost*, *repeated*, a kill: of those that the committed steps are to use once each.
- *same weights*: runs whose final weights have the sha256 of the same system's undisturbed run."""

PUBLISHED = (
    "From elsewhere, and not to be compared with these: torchft publishes 30.2 % and 82.3 % of steps committed on 300 GPUs, with "
    "a failure every 15 s and every 60 s."
)


def percentile(values: Sequence[float], part: float) -> float:
    """The smallest value that at least this part of all does not exceed."""
    return sorted(values)[max(0, math.ceil(part * len(values)) - 1)]


def recovery_table(pieces: Sequence[Piece], workers: int) -> list[str]:
    """Markdown: a row for each system that was measured with this number of workers."""
    lines = [
        f"\n## {workers} workers\n",
        "| system | kills | recovery, s | all again, s | lost time, s | steps lost | samples lost | repeated | same weights "
        "| m, ms |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    notes = []
    for name in SYSTEMS:
        own = [piece for piece in pieces if piece["kind"] == "kills" and piece["system"] == name and piece["workers"] == workers]
        good = [piece for piece in own if "failed" not in piece]
        undisturbed = [piece for piece in good if not piece["number"]]
        killed = [piece for piece in good if piece["recoveries"]]
        notes += [f"- {name}, run {piece['round']}, broke off: {piece['failed']}" for piece in own if "failed" in piece]
        if killed:
            lines.append(_row(name, killed, undisturbed))
        elif own:
            lines.append(f"| {name} | 0 | – | – | – | – | – | – | – | – |")
    return lines + (["", *notes] if notes else [])


def _row(name: str, killed: Sequence[Piece], undisturbed: Sequence[Piece]) -> str:
    found = [one for piece in killed for one in piece["recoveries"]]
    times = [_spread([one[key] for one in found]) for key in ("recovery", "all_again", "training_lost")]
    steps = sum(one["steps_lost"] for one in found) / len(found)
    samples = [f"{sum(piece[key] for piece in killed) / len(found):.4g}" for key in ("samples_lost", "samples_repeated")]
    digests = {(piece["steps"], *piece["weights_sha256"]) for piece in undisturbed}
    comparable = [piece for piece in killed if any(steps == piece["steps"] for steps, *_ in digests)]
    same = sum((piece["steps"], *piece["weights_sha256"]) in digests for piece in comparable)
    equal = f"{same} of {len(comparable)}" if comparable else "–"
    usual = f"{1e3 * statistics.median(piece['usual'] for piece in killed):.0f}"
    return f"| {' | '.join([name, str(len(found)), *times, f'{steps:.3g}', *samples, equal, usual])} |"


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} ({percentile(values, 0.95):.2f})"


def goodput_table(pieces: Sequence[Piece]) -> list[str]:
    """Markdown: a row for each system, number of workers and interval."""
    own = [piece for piece in pieces if piece["kind"] == "goodput"]
    if not own:
        return []
    lines = [
        "\n## Goodput\n",
        "Committed steps while a random worker is killed every so often, over those that the same run makes in that time when "
        "nobody is killed (measured before the first kill). The same for samples: a step without all workers may have fewer.\n",
        "| system | workers | a kill every, s | kills | steps | without kills | goodput | of samples |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in SYSTEMS:
        for piece in sorted((one for one in own if one["system"] == name), key=lambda one: (one["workers"], one["interval"])):
            start = f"| {name} | {piece['workers']} | {piece['interval']:g} |"
            if "failed" in piece:
                lines.append(f"{start} broke off: {piece['failed']} | | | | |")
                continue
            steps = f"{piece['kills']} | {piece['steps']} | {piece['ideal']:.0f}"
            lines.append(f"{start} {steps} | {piece['goodput']:.1%} | {piece['of_samples']:.1%} |")
    return [*lines, "", PUBLISHED]


def document(facts: dict[str, Any], pieces: Sequence[Piece]) -> str:
    """All tables, with what was measured and how."""
    lines = ["# What a SIGKILL costs\n", *(f"- {key}: {value}" for key, value in facts.items()), "", EXPLANATION, ""]
    measured = {piece["system"] for piece in pieces}
    lines += [f"- **{name}**: {system.note}" for name, system in SYSTEMS.items() if name in measured]
    for workers in sorted({piece["workers"] for piece in pieces if piece["kind"] == "kills"}):
        lines += recovery_table(pieces, workers)
    return "\n".join([*lines, *goodput_table(pieces)]) + "\n"
