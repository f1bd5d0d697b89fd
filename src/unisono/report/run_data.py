"""Reads a run directory so that nothing in it can stop the reader: files may be missing, growing or damaged. *Local.*"""

from __future__ import annotations

import functools
import json
import math
import os
from array import array
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, TypeGuard, TypeVar

import numpy as np

from unisono.checkpoint.store import Store
from unisono.errors import CheckpointError
from unisono.observe import formats
from unisono.observe.metrics import METRICS_FILE
from unisono.observe.strict_json import decode
from unisono.observe.summary import SUMMARY_FILE
from unisono.report.attachments import Attachment, read_attachments
from unisono.report.series import Column

MANIFEST_FILE = "manifest.json"
T = TypeVar("T")

_OVERLAP = 256
"""So many bytes before the place where we stopped must be as they were; else the file is another one."""
_RECENT_STEPS = 50
"""The time left is reckoned from the pace of so many steps."""
_METRIC = "metric/"
_MOST_DIGITS = 300
_NOTHING: Mapping[str, Any] = {}


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened to the workers between two steps."""

    step: int
    """Steps done when it happened."""
    kind: str
    """"generation", "straggler", "resumed", ..."""
    text: str
    """In words."""
    workers: int | None = None
    """How many workers there are from then on, if it says."""


@dataclass(frozen=True, kw_only=True)
class RunData:
    """What a run directory says of its run."""

    name: str
    """The last part of the address, or more of it where two runs would have the same name."""
    url: str
    """The address, as the user gave it."""
    columns: Mapping[str, Column] = field(default_factory=dict)
    """Numbers of the log's lines by name, float64 ``[lines]``; NaN where a line does not have that number."""
    events: tuple[Event, ...] = ()
    evaluations: tuple[tuple[int, Mapping[str, float]], ...] = ()
    """Steps done and results by name of each evaluation, as logged."""
    summary: Mapping[str, Any] = field(default_factory=dict)
    """``summary.json``; empty if there is none."""
    manifest: Mapping[str, Any] = field(default_factory=dict)
    """``manifest.json``; empty if there is none."""
    attachments: tuple[Attachment, ...] = ()
    troubles: tuple[str, ...] = ()
    """What could not be read, a sentence each."""

    @property
    def steps(self) -> Column:
        """Numbers of the logged steps, float64 ``[lines]``."""
        return self.column("step")

    def column(self, name: str) -> Column:
        """One column; NaN everywhere if no line has it."""
        found = self.columns.get(name)
        if found is not None:
            return found
        return np.full(len(self.columns.get("step", ())), np.nan)

    @property
    def elapsed_s(self) -> Column:
        """Seconds of training until the end of each logged step, over all starts of the run."""
        seconds = self.column("step_s")
        return np.cumsum(np.where(np.isfinite(seconds), seconds, 0.0))

    @property
    def has_ended(self) -> bool:
        """Whether the summary covers the last logged step: a run that was resumed leaves its old summary behind."""
        steps = _count(self.summary.get("steps"))
        return steps is not None and (not len(self.steps) or bool(self.steps[-1] <= steps))

    @property
    def weights_sha256(self) -> str | None:
        """The digest of the weights, if the run has ended and its summary has one."""
        digest = self.summary.get("weights_sha256")
        return digest if self.has_ended and isinstance(digest, str) and digest else None

    @property
    def metrics(self) -> Mapping[str, float]:
        """Results of evaluations: the summary's if the run has ended, else the last of each in the log."""
        if not self.has_ended:
            return {name: value for _, results in self.evaluations for name, value in results.items()}
        return {name: float(value) for name, value in _mapping(self.summary.get("metrics")).items() if is_number(value)}

    @property
    def workers(self) -> int:
        """How many workers there are or were at the end; 0 if nothing says so."""
        return _count(self.summary.get("workers")) or _count(self.manifest.get("workers")) or 0

    @property
    def planned_steps(self) -> int | None:
        """Steps of the whole run, as its last start reckoned; None if nothing says so."""
        return _count(_mapping(self.manifest.get("planned")).get("steps")) or None

    @property
    def seconds_left(self) -> float | None:
        """Seconds of training until the planned end at the speed of the last steps; None if that cannot be said."""
        seconds = self.column("step_s")[-_RECENT_STEPS:]
        seconds = seconds[np.isfinite(seconds)]
        if self.planned_steps is None or not len(seconds):
            return None
        return max(0.0, (self.planned_steps - float(self.steps[-1])) * float(np.mean(seconds)))

    @property
    def settings(self) -> Mapping[str, Any]:
        """The settings of the manifest; empty if there are none."""
        return _mapping(self.manifest.get("settings"))

    @property
    def fingerprint(self) -> Mapping[str, Any]:
        """The fingerprint of the manifest; empty if there is none."""
        return _mapping(self.manifest.get("fingerprint"))

    def per_worker(self, name: str) -> list[float]:
        """A list of the summary, a number for each worker; empty if it is not there, or is something else."""
        found = self.summary.get(name)
        if not isinstance(found, list) or not all(is_number(value) for value in found):
            return []
        return [float(value) for value in found]


class RunReader:
    """Reads one run directory, again and again while it grows. *Local*.

    Args:
        url: The run directory: a path or an fsspec address.
        name: What to call the run; the last part of the address by default.
    """

    def __init__(self, url: str | os.PathLike[str], *, name: str | None = None) -> None:
        self.store = Store(url)
        self.url = self.store.url
        self._name = name or run_name(self.url)
        self._log = _Log()

    def read(self) -> RunData:
        """What is there now. Of the log only what was added since the last call is read, on a local file system."""
        troubles: list[str] = []

        def told(read: Callable[[Store], T], nothing: T) -> T:
            try:
                return read(self.store)
            except CheckpointError as error:
                troubles.append(str(error))
                return nothing

        told(self._log.read, None)
        summary, manifest = (told(functools.partial(_document, path), _NOTHING) for path in (SUMMARY_FILE, MANIFEST_FILE))
        attachments = told(read_attachments, list[Attachment]())
        if self._log.damaged:
            lines = "line is" if self._log.damaged == 1 else "lines are"
            troubles.append(f"{METRICS_FILE}: {self._log.damaged} {lines} damaged and left out.")
        return RunData(
            name=self._name,
            url=self.url,
            columns=self._log.columns(),
            events=tuple(sorted((*self._log.events, *_resumed(manifest)), key=lambda event: event.step)),
            evaluations=tuple(self._log.evaluations),
            summary=summary,
            manifest=manifest,
            attachments=tuple(attachments),
            troubles=tuple(troubles),
        )


def _parsed(data: bytes) -> Any:
    """What JSON says. A whole number that no float could hold is infinite: any number here can be converted to a float."""
    return decode(json.loads(data, parse_int=lambda digits: int(digits) if len(digits) < _MOST_DIGITS else float(digits)))


def _document(path: str, store: Store) -> Mapping[str, Any]:
    """A file's JSON object, empty if there is no such file; CheckpointError if it cannot be read."""
    try:
        found = _parsed(store.read(path)) if store.exists(path) else {}
    except (CheckpointError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}", file=path) from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds a {type(found).__name__} instead of an object.", file=path)
    return found


class _Log:
    """``metrics.jsonl`` as columns, as far as it has been read."""

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._offset = 0
        self._seen = b""
        self._columns: dict[str, array[float]] = {}
        self._lines = 0
        self.events: list[Event] = []
        self.evaluations: list[tuple[int, dict[str, float]]] = []
        self.damaged = 0

    def read(self, store: Store) -> None:
        size = store.size(METRICS_FILE)
        if size is None or size < self._offset:
            self._reset()
        if size is None or size == self._offset:
            return
        begin = max(0, self._offset - len(self._seen))
        data = _read_from(store, METRICS_FILE, begin)
        if not data.startswith(self._seen):  # a run that went on has cut the log, or another run has begun here
            self._reset()
            data = _read_from(store, METRICS_FILE, 0)
        new = data[len(self._seen) :]
        whole = new[: new.rfind(b"\n") + 1]
        for line in whole.splitlines():
            self._add(line)
        self._offset += len(whole)
        self._seen = (self._seen + whole)[-_OVERLAP:]

    def _add(self, line: bytes) -> None:
        try:
            record = _parsed(line)
            step = record["step"]
        except (ValueError, TypeError, KeyError, RecursionError):
            step = None
        if _count(step) is None:
            self.damaged += bool(line.strip())
        elif record.get("event") == "evaluation":
            named = {name.removeprefix(_METRIC): value for name, value in record.items() if name.startswith(_METRIC)}
            self.evaluations.append((step, {name: float(value) for name, value in named.items() if is_number(value)}))
        elif "event" in record:
            self.events.append(_event(record))
        elif "loss" in record:
            for name, value in record.items():
                if is_number(value):
                    column = self._columns.setdefault(name, array("d"))
                    _pad(column, self._lines)
                    column.append(value)
            self._lines += 1

    def columns(self) -> dict[str, Column]:
        """Each number by name, float64 ``[lines]``."""
        for column in self._columns.values():
            _pad(column, self._lines)
        return {name: np.array(column, dtype=np.float64) for name, column in self._columns.items()}


def _pad(column: array[float], length: int) -> None:
    """Lines that did not have this number."""
    column.extend([math.nan] * (length - len(column)))


def run_name(url: str) -> str:
    """The last part of a run directory's address."""
    return PurePosixPath(os.path.abspath(url) if "://" not in url else url).name or url  # noqa: PTH100 (keeps links)


def run_names(urls: list[str]) -> list[str]:
    """Names that tell runs apart: the last parts of their addresses, as few as will do."""
    parts = [PurePosixPath(os.path.abspath(url) if "://" not in url else url).parts for url in urls]  # noqa: PTH100
    for length in range(1, max(map(len, parts), default=1) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{run_name(url)} ({number})" for number, url in enumerate(urls, start=1)]


def _read_from(store: Store, path: str, begin: int) -> bytes:
    if store.path is None:
        return store.read(path)[begin:]
    try:
        with (store.path / path).open("rb") as file:
            file.seek(begin)
            return file.read()
    except OSError as error:
        raise CheckpointError(f"cannot read {store.where(path)}: {error.strerror}.", file=path) from error


def _event(record: Mapping[str, Any]) -> Event:
    kind, workers = str(record["event"]), _count(record.get("workers"))
    if kind == "generation":
        now = "" if workers is None else f"{formats.count(workers, 'worker')} from here on"
        text = ": ".join(part for part in (now, str(record.get("reason") or "")) if part) or "the workers changed"
    else:
        rest = {name: value for name, value in record.items() if name not in ("step", "event")}
        words = next((str(rest[name]) for name in ("text", "message", "reason") if rest.get(name)), "")
        text = words or ", ".join(f"{name} {value}" for name, value in rest.items()) or kind
    return Event(step=record["step"], kind=kind, text=text, workers=workers)


def _resumed(manifest: Mapping[str, Any]) -> Iterator[Event]:
    if step := _count(manifest.get("resumed_from_step")):
        workers = _count(manifest.get("workers"))
        on = "" if workers is None else f" on {formats.count(workers, 'worker')}"
        yield Event(step=step, kind="resumed", text=f"started again{on} from the checkpoint of step {step}", workers=workers)


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether it is one; true and false are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _count(value: object) -> int | None:
    """A whole number from 0; None if it is anything else."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else _NOTHING
