"""What a run leaves behind: checkpoints, metrics, manifest, summary, and the final weights.

A checkpoint is written by all workers, each its own part, while training goes on. Every step's header says which part is
written; when all are, worker 0 makes the checkpoint complete. All workers take these decisions from the same headers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from unisono.checkpoint import fingerprint as fingerprints
from unisono.checkpoint.checkpoints import Checkpoint, Checkpoints, FileEntry
from unisono.checkpoint.format import decode, digest, encode, snapshot, to_json
from unisono.checkpoint.store import Store
from unisono.checkpoint.writer import BackgroundWriter
from unisono.collective import Collective, LostWorker
from unisono.errors import CheckpointError, ConfigurationError, UnisonoError
from unisono.observe.metrics import MetricsLog
from unisono.observe.strict_json import Scalar
from unisono.observe.summary import SUMMARY_FILE, Summary
from unisono.replica.parameters import plain_name
from unisono.system.process import Process
from unisono.training.header import Signals
from unisono.training.record import EVALUATION
from unisono.version import __version__

_RECENT_LINES = 4096
"""Lines of the log that a worker remembers which does not write it; worker 0 writes them about once a second."""
MODEL_FILE = "model.safetensors"
BEST_FILE = "best.safetensors"
MANIFEST_FILE = "manifest.json"
Entries = dict[str, FileEntry]


class RunDirectory:
    """One worker's view of the run directory. Made and used in unison by all workers.

    Args:
        url: A path, or any address that fsspec understands.
        collective: The other workers.
        settings: What makes this run this run; a checkpoint with other settings is refused.
        fingerprint: What the bits depend on beside the settings.
        keep: Checkpoints to keep.
        strict: Whether another fingerprint is an error.
        is_over: Whether the other workers have gone on, perhaps without this one, as after a pause: then it writes nothing.
    """

    def __init__(
        self,
        url: str | os.PathLike[str],
        collective: Collective,
        *,
        settings: Mapping[str, Any],
        fingerprint: Mapping[str, str | int],
        keep: int,
        strict: bool,
        is_over: Callable[[], bool] = lambda: False,
    ) -> None:
        self.url = os.fspath(url)
        self._collective = collective
        self._settings = dict(settings)
        self._fingerprint = dict(fingerprint)
        self._strict, self._keep = strict, keep
        self._store = Store(url)
        self._checkpoints = Checkpoints(self._store, keep=keep)
        self._writer: BackgroundWriter[Entries] = BackgroundWriter()
        self._pending: int | None = None
        self._pending_info: dict[str, Any] = {}
        self._entries: Entries | None = None
        self._failure: UnisonoError | None = None
        self.notes: list[str] = []
        self.saved_step: int | None = None
        self._is_over = is_over
        self.log = MetricsLog(self._store, is_over=is_over)
        self._manifest: dict[str, Any] | None = None  # while steps are taken
        self._recent: deque[Mapping[str, Scalar]] = deque(maxlen=_RECENT_LINES)
        self._has_begun = False  # to train: before that, nothing is written
        self._writes_log = False

    # ------------------------------------------------------------------ start

    def move(self, url: str) -> None:
        """*local*. It is at another place; nothing has been written yet."""
        if url != self.url:
            self.url = url
            self._store = Store(url)
            self._checkpoints = Checkpoints(self._store, keep=self._keep)
            self.log = MetricsLog(self._store, is_over=self._is_over)

    def open(self) -> Checkpoint | None:
        """*collective*. The newest whole checkpoint, or None if the run has none.

        Raises:
            CheckpointError: There are checkpoints, but all are damaged.
            ConfigurationError: The directory belongs to another run; the message says what differs.
            FingerprintMismatch: ``strict``, and this machine or build is not the one that wrote the checkpoint.
        """
        found = self._from_main(self._find)
        self.notes = list(found["notes"])
        if found["step"] is None:
            return None
        checkpoint = self._checkpoints.open(found["step"])
        self._check(checkpoint)
        self.saved_step = checkpoint.step
        return checkpoint

    def begin(self, step: int, *, epochs: int | None, steps: int | None) -> None:
        """*local*. Trains from step ``step`` on: earlier lines of the log stay, later ones go; the manifest is written.

        Args:
            epochs: Of the whole run.
            steps: Of the whole run, as far as can be said: a batch sampler's epochs may differ.
        """
        self._manifest = {
            "unisono": __version__,
            "settings": self._settings,
            "fingerprint": self._fingerprint,
            "command": sys.argv,
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "workers": self._collective.size,
            "resumed_from_step": step or None,
            "planned": {"epochs": epochs, "steps": steps},
        }
        self._has_begun = True
        if self._collective.rank == 0:
            self._writes_log = True
            self.log.resume(step)
            self._write_manifest(Process.this())

    def _write_manifest(self, process: Process | None) -> None:
        """Args:
        process: Who writes here at the moment.
        """
        owner = None if process is None else dataclasses.asdict(process)
        self._store.write(MANIFEST_FILE, to_json({**(self._manifest or {}), "process": owner}, indent=1))

    def prepare(self) -> None:
        """*collective*. Steps will follow: whether they can be kept here.

        Raises:
            CheckpointError: The directory cannot be made or written to.
            ConfigurationError: Another process trains there.
        """
        self._from_main(self._prepare)

    def _prepare(self) -> dict[str, Any]:
        self._check_unused()
        self._store.prepare()
        return {}

    def _check_unused(self) -> None:
        """Two that write to one directory would spoil each other's log and checkpoints. (Other machines' cannot be seen.)"""
        manifest: dict[str, Any] = {}
        if self._store.exists(MANIFEST_FILE):
            with contextlib.suppress(ValueError):
                manifest = json.loads(self._store.read(MANIFEST_FILE))
        if not isinstance(manifest, dict) or not manifest.get("process"):
            return
        owner = Process(**manifest["process"])
        if owner.lives_here and owner.pid != os.getpid():
            raise ConfigurationError(
                f"run_dir {self.url!r} is in use: process {owner.pid} trains there since {manifest.get('started')}. Wait for its "
                "end or stop it, or choose another run_dir"
            )

    def _find(self) -> dict[str, Any]:
        self._check_unused()
        self._store.clean()
        checkpoint = self._checkpoints.newest()
        return {"step": checkpoint.step if checkpoint else None, "notes": self._checkpoints.damaged}

    def _check(self, checkpoint: Checkpoint) -> None:
        saved = checkpoint.info["settings"]
        saved = {**saved, "parameters": {plain_name(name): what for name, what in saved["parameters"].items()}}
        mine = json.loads(json.dumps(self._settings))
        if "schedule" in mine:
            saved.setdefault("schedule", mine["schedule"])  # checkpoints of earlier versions have none
        different = list(_differences(saved, mine))
        if different:
            more = f"; and {len(different) - 8} more" if len(different) > 8 else ""
            raise ConfigurationError(
                f"run_dir {self.url!r} holds another run: {'; '.join(different[:8])}{more}. Choose another run_dir, or restore "
                "these settings to go on with that run"
            )
        if self._collective.rank == 0 or self._strict:
            fingerprints.check(checkpoint.info["fingerprint"], self._fingerprint, strict=self._strict)

    def is_at_home(self, checkpoint: Checkpoint) -> bool:
        """*local*. Whether a checkpoint was written by just this machine and build, as far as bits depend on it."""
        mine: dict[str, Any] = json.loads(json.dumps(self._fingerprint))
        return bool(checkpoint.info["fingerprint"] == mine)

    def note(self, line: Mapping[str, Scalar]) -> None:
        """*local*. Adds a line to the log (worker 0), or remembers it in case this worker becomes the one that writes."""
        if self._collective.rank == 0:
            self.log.append(line)
        else:
            self._recent.append(line)

    @property
    def pending(self) -> bool:
        """*local*. Whether a checkpoint has begun and is not complete."""
        return self._pending is not None

    def rebuild(self, collective: Collective) -> None:
        """*local*, alike on all workers. From now on these are the other workers; what was under way is given up."""
        self._collective = collective
        self._pending, self._entries, self._failure, self.saved_step = None, None, None, None
        if collective.rank == 0 and self._manifest is not None:
            with contextlib.suppress(CheckpointError):  # the next checkpoint will say so
                self._write_manifest(Process.this())

    def take_over_log(self, step: int) -> None:
        """*local*, on worker 0 of a new generation. All lines about the first ``step`` steps are in the file, and no others."""
        if self._has_begun and not self._writes_log:
            self.log.take_over(step, self._recent)
            self._recent.clear()
            self._writes_log = True
        self.log.flush()  # whoever comes later has none of them

    # ------------------------------------------------------------------ checkpoints

    def save(self, step: int, *, part: Any, model: Mapping[str, Tensor] | None, trainer: Any, info: dict[str, Any]) -> None:
        """*collective*. Starts to write the checkpoint of ``step``; returns once everything is copied.

        Args:
            part: This worker's state.
            model: The model's state dict (worker 0).
            trainer: State that all workers share (worker 0).
            info: Small facts for the manifest of the checkpoint.
        """
        self.finish()
        part, model, trainer = snapshot(part), snapshot(dict(model or {})), snapshot(trainer)
        rank = self._collective.rank

        def write() -> Entries:
            entries = self._checkpoints.write_part(step, f"optimizer-{rank}", part)
            if rank == 0:
                entries |= self._checkpoints.write_part(step, "trainer", trainer)
                entries |= self._checkpoints.write_tensors(step, "model", model)
            return entries

        with contextlib.suppress(UnisonoError):
            self._writer.wait()  # what was given up must not be taken for this one
        self._entries, self._failure = None, None
        self._pending = step
        self._pending_info = {**info, "settings": self._settings, "fingerprint": self._fingerprint}
        self._writer.submit(step, write)

    def signals(self, stop: int) -> Signals:
        """*local*. What to tell the others with the next step."""
        self._look()
        written = self._pending is not None and self._entries is not None
        return Signals(
            stop=stop,
            written=self._pending if written and self._pending is not None else -1,
            failed=self._failure is not None,
        )

    @staticmethod
    def is_written(signals: Sequence[Signals]) -> bool:
        """*local*. Whether, by what all workers signalled with a step, a checkpoint is there to be completed, or has failed."""
        written = {signal.written for signal in signals}
        return any(signal.failed for signal in signals) or (len(written) == 1 and min(written) >= 0)

    def finish(self) -> None:
        """*collective*. Waits until the checkpoint under way, if any, is complete.

        Raises:
            CheckpointError: A worker could not write its part; the checkpoint before it is whole.
        """
        if self._pending is None:
            return
        step = self._pending
        self._look(wait=True)
        message = {"entries": self._entries, "error": str(self._failure) if self._failure else None}
        told = [json.loads(text) for text in self._collective.all_gather_bytes(json.dumps(message).encode())]
        errors = [f"worker {rank}: {one['error']}" for rank, one in enumerate(told) if one["error"]]
        if errors:
            self._pending = None
            failure, self._failure = self._failure, None  # told once: whoever mends the cause may go on
            raise failure or CheckpointError("; ".join(errors))
        files = {name: entry for one in told for name, entry in one["entries"].items()}

        def commit() -> dict[str, Any]:
            self.log.flush()  # whoever resumes from this checkpoint expects the lines of all steps before it
            self._checkpoints.commit(step, files, self._pending_info)
            return {}

        try:
            self._from_main(commit)
        except CheckpointError:
            self._pending = None
            raise
        # Only now: until it is known to be complete, it is to be taken again if a worker is lost.
        self._pending, self.saved_step = None, step

    def rest(self) -> None:
        """*local*. No steps follow for now, perhaps never: somebody may have left a loop of his own. A worker that is alone
        completes the checkpoint under way; several cannot know whether the others are there.

        Raises:
            CheckpointError: It could not be written; the checkpoint before it is whole.
        """
        if self._collective.rank == 0 and self._manifest is not None:
            self._write_manifest(None)
        self._manifest = None
        if self._collective.size == 1:
            self.finish()

    def _look(self, *, wait: bool = False) -> None:
        try:
            for _, entries in self._writer.wait() if wait else self._writer.done():
                self._entries = entries
        except UnisonoError as error:
            self._failure = error

    # ------------------------------------------------------------------ end

    def publish(self, model: Mapping[str, Tensor] | None, file: str = MODEL_FILE) -> str:
        """*collective*. Writes worker 0's ``model`` as ``file`` if it is not there already; its SHA-256."""

        def write() -> dict[str, Any]:
            data = encode(model or {})
            sha256 = digest(data)
            if not (self._store.exists(file) and digest(self._store.read(file)) == sha256):
                self._store.write(file, data)
            return {"sha256": sha256}

        return str(self._from_main(write)["sha256"])

    def read_model(self) -> dict[str, Tensor] | None:
        """*local*. The weights that ``publish`` has written, if it has."""
        return decode(self._store.read(MODEL_FILE)) if self._store.exists(MODEL_FILE) else None

    def read_summary(self) -> Summary | None:
        """*local*. The summary of an earlier start, if there is a readable one."""
        if not self._store.exists(SUMMARY_FILE):
            return None
        try:
            return Summary.from_json(self._store.read(SUMMARY_FILE))
        except CheckpointError as error:
            warnings.warn(str(error), stacklevel=2)
            return None

    def write_summary(self, summary: Summary) -> None:
        """*collective*. Writes the last lines of the log, then ``summary.json`` (worker 0)."""

        def write() -> dict[str, Any]:
            self.log.flush()
            self._put_summary(summary)
            return {}

        self._from_main(write)

    def write_evaluation(
        self, step: int, results: Mapping[str, float], line: Mapping[str, Scalar] | None, *, number: int | None
    ) -> None:
        """*collective*. Writes what was measured into the log, and into the summary if that is of the same step (worker 0).

        Args:
            line: For the log; None: not there.
            number: How many evaluations after this step came before it, if this one's line may be there already.
        """

        def write() -> dict[str, Any]:
            if line is not None and (number is None or self.log.count(step, EVALUATION) <= number):
                self.log.append(line)
            self.log.flush()
            summary = self.read_summary()
            if summary is not None and summary.steps == step:
                self._put_summary(dataclasses.replace(summary, metrics={**summary.metrics, **results}))
            return {}

        self._from_main(write)

    def _put_summary(self, summary: Summary) -> None:
        """Writes ``summary.json``, unless it says the same already."""
        text = summary.to_json().encode()
        if not (self._store.exists(SUMMARY_FILE) and self._store.read(SUMMARY_FILE) == text):
            self._store.write(SUMMARY_FILE, text)

    # ------------------------------------------------------------------

    def _from_main(self, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """*collective*. What ``work``, which may write, returns on worker 0; its error on every worker."""
        answer: dict[str, Any] = {}
        failure: UnisonoError | None = None
        if self._collective.rank == 0:
            if self._is_over():
                raise LostWorker("the other workers have gone on without this one, so it no longer writes to the run directory")
            try:
                answer = {"ok": work()}
            except UnisonoError as error:
                failure = error
                answer = {"error": str(error), "kind": type(error).__name__}
        answer = json.loads(self._collective.all_gather_bytes(json.dumps(answer).encode())[0])
        if failure is not None:
            raise failure
        if "error" in answer:
            kinds = {kind.__name__: kind for kind in (CheckpointError, ConfigurationError)}
            raise kinds.get(answer["kind"], CheckpointError)(answer["error"])
        result: dict[str, Any] = answer["ok"]
        return result


def _differences(there: Any, here: Any, name: str = "") -> Iterator[str]:
    """What differs between two settings, down to the innermost ones, a text each."""
    if there == here:
        return
    if isinstance(there, list) and isinstance(here, list) and len(there) == len(here):
        there, here = ({str(number): item for number, item in enumerate(items)} for items in (there, here))
    if isinstance(there, dict) and isinstance(here, dict):
        for key in {**here, **there}:
            yield from _differences(there.get(key, "not set"), here.get(key, "not set"), f"{name}.{key}" if name else key)
    else:
        yield f"{name}: {_short(there)} there, {_short(here)} here"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
