"""How to reproduce a run's weights: digest, commands, settings, fingerprint. *Local.*"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from html import escape
from itertools import pairwise
from pathlib import PurePosixPath
from typing import Any

from unisono.report.run_data import RunData
from unisono.report.section import Section, command, definitions


def reproduce_sections(run: RunData) -> Iterator[Section]:
    """The digest and how to reproduce it, the settings, the fingerprint."""
    if run.weights_sha256 is not None:
        yield Section(
            key="digest",
            kicker="proof",
            title="The same weights on any number of workers",
            text="SHA-256 of model.safetensors. The same code, data, seed and settings on the same builds reproduce it.",
            body=f'<p class="digest">{escape(run.weights_sha256)}</p>{_advice(run)}',
        )
    if run.settings:
        yield Section(
            key="settings",
            kicker="settings",
            title="What the weights depend on",
            body=definitions(_settings(run.settings)),
            half=True,
        )
    if run.fingerprint:
        yield Section(
            key="fingerprint",
            kicker="fingerprint",
            title="Builds, hardware and threads",
            body=definitions(run.fingerprint),
            half=True,
        )


def run_command(run: RunData) -> list[str]:
    """What the user typed after ``unisono run``, or the demo's command; empty if the manifest does not say."""
    words = run.manifest.get("command")
    if not isinstance(words, list) or not words:
        return []
    words = [str(word) for word in words]
    script = PurePosixPath(words[0])
    return ["unisono", "demo", script.stem, *words[1:]] if script.parts[-3:-1] == ("unisono", "demos") else words


def _advice(run: RunData) -> str:
    """Commands to check the digest, and to train again, as HTML."""
    html = ""
    if "://" not in run.url:
        check = f"sha256sum {shlex.quote(run.url.rstrip('/') + '/model.safetensors')}"
        html += f"<h3>Check it</h3>{command(check)}"
    words = run_command(run)
    if words:
        other, threads = run.workers - 1 or 2, run.fingerprint.get("threads")
        options = ["--workers", str(other), *(["--threads", str(threads)] if threads not in (None, 1) else [])]
        is_run_dir = [before == "--run-dir" or word.startswith("--run-dir=") for before, word in pairwise(["", *words])]
        words = [f"{word.rstrip('/')}-on-{other}" if changed else word for word, changed in zip(words, is_run_dir, strict=True)]
        words = [*words[:2], *options, *words[2:]] if words[:2] == ["unisono", "demo"] else ["unisono", "run", *options, *words]
        html += f"<h3>Train it again, on another number of workers, in a new run directory</h3>{command(shlex.join(words))}"
    return html


def _settings(settings: Mapping[str, Any]) -> dict[str, object]:
    shown: dict[str, object] = {}
    for name, value in settings.items():
        if name == "parameters" and isinstance(value, dict):
            shown["parameter tensors"] = f"{len(value):,}"
        elif name == "parameter_groups" and isinstance(value, list):
            for number, group in enumerate(value):
                shown[f"group {number}" if len(value) > 1 else "optimizer settings"] = _words(group)
        elif value is not None:
            shown[name.replace("_", " ")] = value if isinstance(value, (str, int, float)) else json.dumps(value)
    return shown


def _words(group: object) -> str:
    if not isinstance(group, dict):
        return json.dumps(group)
    return ", ".join(f"{name} {value}" for name, value in group.items() if value not in (None, False))
