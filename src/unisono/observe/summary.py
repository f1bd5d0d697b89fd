"""What remains of a run at its end: ``summary.json``, and the text that a person sees.

The text ends with the digest of the weights and how to check it. The digest always stands on a line of its own that
is never wrapped or cut, so that it can be copied from a terminal of any width.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from unisono.errors import CheckpointError
from unisono.observe import formats
from unisono.observe.progress import standard_output
from unisono.observe.strict_json import decode, dumps

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

SUMMARY_FILE = "summary.json"
"""Name of the summary in the run directory."""

_WEIGHTS_FILE = "model.safetensors"
_VERBATIM: dict[str, Any] = {"markup": False, "emoji": False, "highlight": False, "soft_wrap": True}


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The end of a run in numbers."""

    steps: int
    """Optimizer steps done in the whole run, earlier starts included."""
    epochs: int
    """Epochs trained to their end."""
    samples: int
    """Samples trained in the whole run; one seen in two epochs counts twice."""
    samples_per_second: float
    """Samples per second while this start of the run trained."""
    seconds: float
    """Seconds that this start of the run trained."""
    workers: int
    """Workers at the end."""
    weights_sha256: str
    """SHA-256 of ``model.safetensors``, 64 hexadecimal digits; without a run directory, of the file that it would be."""
    loss: float
    """Loss of the last step."""
    metrics: dict[str, float]
    """Evaluation results by name."""
    waiting_share: float
    """Share of time that this worker waited for others, 0 to 1."""
    finished: bool
    """Whether all steps were done; False if the run was stopped before."""
    parameters: int
    """Trainable numbers in the model."""
    run_dir: str
    """The run directory, as it was given."""
    bytes_sent_per_step: float
    """Bytes that this worker sent in a step, on average."""
    data_s: list[float] = dataclasses.field(default_factory=list)
    """For each worker the seconds that it loaded samples in this start of the run, evaluations aside."""
    compute_s: list[float] = dataclasses.field(default_factory=list)
    """The same for forward, backward and update."""
    communication_s: list[float] = dataclasses.field(default_factory=list)
    """The same for moving bytes."""
    waiting_s: list[float] = dataclasses.field(default_factory=list)
    """The same for waiting until the other workers arrived."""
    microbatches: list[float] = dataclasses.field(default_factory=list)
    """Microbatches of each worker in a full step, on average over the steps of this start."""
    peak_memory_bytes: list[float] = dataclasses.field(default_factory=list)
    """For each worker the most memory that its process has had resident at once; pages that workers share count in each."""
    bytes_sent: list[float] = dataclasses.field(default_factory=list)
    """For each worker the bytes that it sent in a step, on average over this start of the run."""

    def to_json(self) -> str:
        """The text of ``summary.json``: strict JSON, with ``"nan"``, ``"inf"`` and ``"-inf"`` as strings."""
        return dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> Summary:
        """Read what ``to_json`` wrote. Keys that are not known are ignored.

        Raises:
            CheckpointError: The text is no JSON object, or a key is missing or has a value of another kind.
        """
        try:
            values = json.loads(text)
        except ValueError as error:
            raise _damaged(f"it is not JSON ({error})") from error
        if not isinstance(values, dict):
            raise _damaged(f"it holds a {type(values).__name__} instead of an object")
        fields = {}
        for field in dataclasses.fields(cls):
            if field.name not in values:
                if field.default_factory is not dataclasses.MISSING:
                    continue  # an earlier version did not write it
                raise _damaged(f"{field.name!r} is missing")
            try:
                fields[field.name] = _checked(values[field.name], str(field.type))
            except TypeError as error:
                raise _damaged(f"{field.name!r} is {values[field.name]!r} instead of a {field.type}") from error
        return cls(**fields)


def show_summary(
    summary: Summary, run_dir: str | None = None, *, seeded: bool | None = True, console: Console | None = None
) -> None:
    """Print the end-of-run text: a small table on a terminal, plain lines elsewhere. *Local*: rank 0 calls it.

    Args:
        summary: What to show.
        run_dir: The run directory as the user should type it; ``summary.run_dir`` by default.
        seeded: Whether another run begins with the same weights; None: unknown.
        console: Where to print; standard output by default.
    """
    console = console or standard_output()
    run_dir = run_dir or summary.run_dir
    if not console.is_interactive:
        console.print(render_plain(summary, run_dir, seeded), style=None, end="", **_VERBATIM)
        return
    console.print(_panel(summary))
    # The next lines are left to the terminal to wrap: it does so without putting line ends into what is copied.
    console.print("sha256 of the weights", style="dim", **_VERBATIM)
    console.print(summary.weights_sha256, style="bold green", **_VERBATIM)
    for line in _advice(summary, run_dir, seeded):
        console.print(line, **_VERBATIM)


def render_plain(summary: Summary, run_dir: str | None = None, seeded: bool | None = True) -> str:
    """The end-of-run text as lines without colour or box characters, with a line end after each. *Local*."""
    rows = [*_rows(summary), ("sha256 of the weights", summary.weights_sha256)]
    width = max(len(label) for label, _ in rows)
    lines = [_headline(summary), *(f"{label:<{width}}  {value}" for label, value in rows)]
    return "\n".join([*lines, *_advice(summary, run_dir or summary.run_dir, seeded)]) + "\n"


def _panel(summary: Summary) -> RenderableType:
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="dim", overflow="fold")
    table.add_column(overflow="fold")
    for label, value in _rows(summary):
        table.add_row(Text(label), Text(value))
    colour = "green" if summary.finished else "yellow"
    title = Text(_headline(summary), style=f"bold {colour}")
    return Panel(table, title=title, title_align="left", border_style=colour, expand=False, padding=(0, 1))


def _headline(summary: Summary) -> str:
    return "Trained in unison" if summary.finished else f"Stopped at step {summary.steps}"


def _rows(summary: Summary) -> list[tuple[str, str]]:
    """Label and value of everything but the digest."""
    shares = summary.microbatches
    uneven = bool(shares) and max(shares) - min(shares) > 1  # they need not divide evenly
    resumed = summary.samples - summary.samples_per_second * summary.seconds > 0.5
    waiting = f", {formats.percent(summary.waiting_share)} waiting" if summary.workers > 1 else ""
    return [
        ("loss", formats.number(summary.loss)),
        *((name, formats.number(value)) for name, value in summary.metrics.items()),
        ("steps", f"{summary.steps:,} in {formats.count(summary.epochs, 'epoch')}"),
        ("samples", f"{summary.samples:,}"),
        ("samples/s", formats.rate(summary.samples_per_second)),
        ("time", f"{formats.seconds(summary.seconds)}{waiting}{' (since the last start)' if resumed else ''}"),
        ("workers", str(summary.workers)),
        *([("microbatches", " + ".join(f"{share:.3g}" for share in shares))] if uneven else []),
        ("parameters", f"{summary.parameters:,}"),
        ("sent per step", formats.data_size(summary.bytes_sent_per_step)),
    ]


def _advice(summary: Summary, run_dir: str, seeded: bool | None) -> list[str]:
    """How to check the digest, or how to go on if the run was stopped."""
    if not summary.finished:
        return ["Start the same command again to go on from here, on as many workers as you like."]
    file = f"{run_dir.rstrip('/')}/{_WEIGHTS_FILE}"
    # sha256sum reads local files only; a run directory may be an fsspec address.
    check = f"{file} has this SHA-256." if "://" in run_dir else f"sha256sum {shlex.quote(file)}"
    other = summary.workers - 1 or 2
    if seeded is False:
        return [
            f"Check it: {check}",
            "The workers' models began with different weights (worker 0's were taken): seed before",
            "the model is made, else another run ends with another digest.",
        ]
    known = "." if seeded else ",\nif the model begins with the same weights (seed before it is made)."
    return [
        f"Check it: {check}",
        "Train again in a new run directory with another number of workers",
        f"(unisono run --workers {other} ...) and you will get the same digest{known}",
    ]


def _damaged(what: str) -> CheckpointError:
    return CheckpointError(
        f"{SUMMARY_FILE} is damaged: {what}. Delete it; the weights and checkpoints do not depend on it.",
        file=SUMMARY_FILE,
    )


def _checked(value: object, kind: str) -> Any:
    """The value of one field; TypeError if it is of another kind than its annotation says."""
    if kind == "float" and type(number := decode(value)) in (int, float):
        return float(number)
    if kind == "list[float]" and isinstance(value, list):
        return [_checked(item, "float") for item in value]
    if kind == "dict[str, float]" and isinstance(value, dict):
        return {key: _checked(item, "float") for key, item in value.items()}
    if kind in ("int", "str", "bool") and type(value).__name__ == kind:
        return value
    raise TypeError
