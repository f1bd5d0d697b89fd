"""``metrics.jsonl``: one line of strict JSON for each logged step.

A line is an object with an integer ``step`` and any other numbers or strings::

    {"step": 120, "epoch": 2, "loss": 0.1234, "samples_per_second": 18400.0}

Floats that JSON cannot hold are the strings ``"nan"``, ``"inf"`` and ``"-inf"``; ``read_metrics`` turns them back.

A run can die in the middle of a line, and it resumes from a checkpoint that is older than its last line. So call
``MetricsLog.resume`` first when a run resumes: a step is then logged once, however often the run was stopped.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from unisono.checkpoint.store import Store
from unisono.errors import CheckpointError, ConfigurationError
from unisono.observe.strict_json import Scalar, decode, dumps

METRICS_FILE = "metrics.jsonl"
"""Name of the log in the run directory."""

_FLUSH_EVERY_S = 1.0


class MetricsLog:
    """Writes ``metrics.jsonl``. *Local*: rank 0 has one, the other workers have none.

    Lines are kept in memory and written about once a second, when one is appended, and by ``flush`` and ``close``.

    Args:
        store: The run directory.
        clock: Gives seconds; only differences are used.
        is_over: Whether another worker may write the log by now; then lines stay in memory.
    """

    def __init__(
        self,
        store: Store,
        *,
        clock: Callable[[], float] = time.monotonic,
        is_over: Callable[[], bool] = lambda: False,
    ) -> None:
        self._store = store
        self._is_over = is_over
        self._clock = clock
        self._lines: list[str] = []
        self._flushed_at = clock()
        self._closed = False

    def resume(self, step: int) -> None:
        """Make the file end at ``step`` steps done: later lines, and a torn last line, are dropped. *Local*.

        Call it once, before the first ``append``; ``resume(0)`` begins the log anew. The file is replaced atomically.

        Raises:
            CheckpointError: A line in the middle of the file is no metrics line.
        """
        if not self._store.exists(METRICS_FILE):
            return
        data = self._store.read(METRICS_FILE)
        kept = [line for line, record in _parse(data) if record["step"] <= step]
        wanted = b"".join(line + b"\n" for line in kept)
        if wanted != data:
            self._store.write(METRICS_FILE, wanted)

    def take_over(self, step: int, records: Iterable[Mapping[str, Scalar]]) -> None:
        """Go on with the log of a worker that died while it wrote. *Local*.

        Args:
            step: Steps done; what the other one has written about later ones will be written again.
            records: The last lines, in order; those of steps that the file has are left out.
        """
        self.resume(step)
        # A line about an event may have been written before that of its step.
        last = max((int(record["step"]) for record in read_metrics(self._store) if "event" not in record), default=0)
        for record in records:
            if int(record["step"]) > last:
                self.append(record)
        self.flush()

    def count(self, step: int, event: str) -> int:
        """How many lines there are about an event after ``step`` steps. *Local*; reads the file.

        Raises:
            CheckpointError: The file cannot be read or written.
        """
        self.flush()
        return sum((record["step"], record.get("event")) == (step, event) for record in read_metrics(self._store))

    def append(self, record: Mapping[str, Scalar]) -> None:
        """Add one line. *Local*.

        Args:
            record: ``step`` (the number of steps done, an int) and other ints, floats and strings by name.

        Raises:
            ConfigurationError: ``step`` is missing, or a value is no int, float or string.
            CheckpointError: The file cannot be written, or the log is closed.
        """
        if self._closed:
            raise CheckpointError(
                f"{METRICS_FILE}: the log is closed (step {record.get('step')} came after close() or a failed write). "
                "Make a new MetricsLog and call resume(step) to go on.",
                file=METRICS_FILE,
            )
        _check(record)
        self._lines.append(dumps(dict(record)) + "\n")
        if self._clock() - self._flushed_at >= _FLUSH_EVERY_S:
            self.flush()

    def flush(self) -> None:
        """Write what is still in memory. *Local*.

        After a failed write the log is closed: on some file systems the file may now end in half a line.

        Raises:
            CheckpointError: The file cannot be written.
        """
        self._flushed_at = self._clock()
        if not self._lines or self._is_over():
            return
        text = "".join(self._lines)
        self._lines.clear()
        try:
            self._store.append(METRICS_FILE, text)
        except BaseException:
            self._closed = True
            raise

    def close(self) -> None:
        """Flush and accept no more lines. Calling it again does nothing. *Local*.

        Raises:
            CheckpointError: The file cannot be written.
        """
        self.flush()
        self._closed = True


def read_metrics(store: Store) -> list[dict[str, Scalar]]:
    """Read every line of ``metrics.jsonl``, in file order; an empty list if there is no such file. *Local*.

    A torn last line (one without its line end that cannot be parsed) is left out.

    Raises:
        CheckpointError: Another line is no metrics line; the message names the file and the line number.
    """
    if not store.exists(METRICS_FILE):
        return []
    return [decode(record) for _, record in _parse(store.read(METRICS_FILE))]


def _check(record: Mapping[str, Scalar]) -> None:
    if not _is_step(record.get("step")):
        raise ConfigurationError(
            f"A metrics line needs 'step' as an int, this one has {record.get('step')!r} (fields: "
            f"{', '.join(map(repr, record)) or 'none'}). Pass the number of steps done."
        )
    for key, value in record.items():
        if not isinstance(key, str) or not isinstance(value, (int, float, str)):
            raise ConfigurationError(
                f"Metric {key!r} is {value!r}, a {type(value).__name__}; a metrics line holds ints, floats and strings "
                "by name. Pass float(value), int(value) or str(value)."
            )


def _parse(data: bytes) -> list[tuple[bytes, dict[str, Any]]]:
    """Split into (line without its end, record); a torn last line is left out."""
    *lines, rest = data.split(b"\n")
    parsed = []
    for number, line in enumerate(lines, start=1):
        record = _record(line)
        if record is None:
            raise CheckpointError(
                f"{METRICS_FILE}, line {number} is damaged: {line[:80]!r} is not a JSON object with an integer 'step'. "
                "Repair or delete that line, or move the file away; training does not read it.",
                file=METRICS_FILE,
            )
        parsed.append((line, record))
    last = _record(rest)
    return parsed if last is None else [*parsed, (rest, last)]


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line.decode("utf-8"))
    except ValueError:
        return None
    return record if isinstance(record, dict) and _is_step(record.get("step")) else None


def _is_step(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
