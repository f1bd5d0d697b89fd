"""A few steps of every worker on one time line, for ``chrome://tracing`` and https://ui.perfetto.dev.

``unisono run --trace SCRIPT`` asks for it, ``--profile`` for what ``torch.profiler`` sees of the same steps as well; under
another launcher the environment variable ``UNISONO_TRACE`` does (``phases`` or ``profile``). Or give a trainer
``callbacks=[Trace()]``.

The phases are those that the step's clock measures anyway: between two changes of phase nothing happens but a list that grows.
"""

from __future__ import annotations

import itertools
import json
import os
import tempfile
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unisono.checkpoint.store import Store
from unisono.errors import ConfigurationError
from unisono.observe.timing import OUTSIDE, PAUSED, PHASE, PHASES, SINCE, STEP, Shown
from unisono.system.output import say
from unisono.training.callbacks import Callback

if TYPE_CHECKING:
    from torch.profiler import profile as profile_type

    from unisono.training.step import StepResult
    from unisono.training.trainer import Trainer

ENVIRONMENT = "UNISONO_TRACE"
"""Environment variable: ``phases`` or ``profile``."""
FOLDER = "trace"
"""Where the files go, in the run directory; in the current folder if there is none."""
TRACE_FILE = "trace.json"
_PARTS = f"{FOLDER}/parts"

_SKIPPED, _TRACED = 2, 5
_NAMES = {**dict(enumerate(PHASES)), OUTSIDE: "", PAUSED: "callbacks and evaluation"}
_COLOURS = {"compute": "thread_state_running", "communication": "rail_animation", "waiting": "yellow", "data": "good"}
"""Names from Chrome's own list; Perfetto chooses its own."""


class Trace(Callback):
    """Writes a Chrome/Perfetto trace of some steps. *Local*: workers need not agree, and nothing is communicated.

    The trace is ``trace/trace.json`` in the run directory: each worker writes its part of it, and worker 0 puts them together
    after the next step, and once more when it ends. With ``profile`` each worker also writes ``trace/profile-RANK.json``.

    Args:
        steps: How many steps.
        skip: Steps of this start of the run before them: the first ones are not like the others.
        profile: Whether to run ``torch.profiler`` over them, too. It slows them down.

    Raises:
        ConfigurationError: ``steps`` or ``skip`` is no such number.
    """

    edits_weights = False

    def __init__(self, *, steps: int = _TRACED, skip: int = _SKIPPED, profile: bool = False) -> None:
        if steps < 1 or skip < 1:
            raise ConfigurationError(f"Trace needs steps and skip of 1 or more, got steps={steps} and skip={skip}.")
        self._steps, self._skip, self._profile = steps, skip, profile
        self._seen = 0
        self._recorder: _Recorder | None = None
        self._profiler: profile_type | None = None

    def on_step(self, trainer: Trainer, result: StepResult) -> None:
        """Begin after the last step that is skipped, end after the last one that is traced."""
        self._seen += 1
        if self._seen == self._skip:
            self._begin(trainer)
        elif self._seen == self._skip + self._steps:
            self._end(trainer)
        elif self._seen == self._skip + self._steps + 1 and trainer.collective.rank == 0:
            _merge(_store(trainer))  # nobody takes part in a step before its own part of the trace is written

    def on_epoch(self, trainer: Trainer, epoch: int) -> None:
        """Write what there is: this may be the end."""
        if self._recorder is not None:
            self._write_part(trainer, self._recorder)

    def _begin(self, trainer: Trainer) -> None:
        store = _store(trainer)
        if trainer.collective.rank == 0:
            store.remove(FOLDER)
            weakref.finalize(self, _merge, store, last=True)  # it runs at the interpreter's end
        self._recorder = _Recorder(trainer.clock.shown, trainer.position.step + 1)
        trainer.clock.shown = self._recorder
        if self._profile:
            from torch.profiler import profile

            self._profiler = profile()
            self._profiler.start()

    def _end(self, trainer: Trainer) -> None:
        recorder, self._recorder = self._recorder, None
        if recorder is None:
            return
        trainer.clock.shown = recorder.inner
        profiler, self._profiler = self._profiler, None
        if profiler is not None:
            profiler.stop()
            _write_profile(_store(trainer), trainer.collective.rank, profiler)
        self._write_part(trainer, recorder)
        if trainer.collective.rank == 0:
            last = recorder.first + self._steps - 1
            where = _store(trainer).where(f"{FOLDER}/{TRACE_FILE}")
            say(f"trace of steps {recorder.first} to {last}: {where} (open it at https://ui.perfetto.dev)")

    @staticmethod
    def _write_part(trainer: Trainer, recorder: _Recorder) -> None:
        rank = trainer.collective.rank
        part = {"rank": rank, "host": os.uname().nodename, "pid": os.getpid(), "events": recorder.events()}
        _store(trainer).write(f"{_PARTS}/{rank}.json", json.dumps(part).encode())


def from_environment(environment: Mapping[str, str] = os.environ) -> tuple[Trace, ...]:
    """The callbacks that ``unisono run --trace`` asks for; none if nobody asked. *Local.*

    Raises:
        ConfigurationError: The variable holds something else.
    """
    asked = environment.get(ENVIRONMENT, "")
    if not asked:
        return ()
    if asked not in ("phases", "profile"):
        raise ConfigurationError(f"{ENVIRONMENT} is {asked!r}; it can be 'phases' or 'profile'. Unset it, or use --trace.")
    return (Trace(profile=asked == "profile"),)


def chrome_trace(workers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The trace event format of Chrome, which Perfetto reads too. *Local.*

    Args:
        workers: For each its ``rank``, ``host``, ``pid``, and ``events``: (name, begin, length, step), times in microseconds.
    """
    events: list[dict[str, Any]] = []
    begin = min((event[1] for worker in workers for event in worker["events"]), default=0.0)
    for worker in workers:
        rank = worker["rank"]
        name = f"worker {rank} ({worker['host']}, process {worker['pid']})"
        events.append({"ph": "M", "pid": rank, "tid": 0, "name": "process_name", "args": {"name": name}})
        events.append({"ph": "M", "pid": rank, "tid": 0, "name": "process_sort_index", "args": {"sort_index": rank}})
        for thread, title in enumerate(("steps", "phases")):
            events.append({"ph": "M", "pid": rank, "tid": thread, "name": "thread_name", "args": {"name": title}})
        for name, since, length, step in worker["events"]:
            event = {"ph": "X", "pid": rank, "tid": int(not name.startswith("step ")), "name": name}
            event |= {"ts": round(since - begin, 3), "dur": round(length, 3), "args": {"step": step}}
            if name in _COLOURS:
                event["cname"] = _COLOURS[name]
            events.append(event)
    return {"traceEvents": events, "displayTimeUnit": "ms"}


class _Recorder:
    """Stands where a clock shows its phase, passes it on, and remembers."""

    def __init__(self, inner: Shown, first: int) -> None:
        self.inner = inner
        self.first = first
        self._phase, self._step = OUTSIDE, first
        now = time.perf_counter()
        self._epoch_s = time.time() - now  # the clocks of several hosts have only the time of day in common
        self._changes: list[tuple[float, int, int]] = [(now, OUTSIDE, first)]  # since when, which phase, in which step
        self._laps: list[tuple[float, int]] = [(now, first)]

    def __setitem__(self, place: int, value: float) -> None:
        self.inner[place] = value
        if place == PHASE:
            self._phase = int(value)
        elif place == SINCE:
            self._changes.append((value, self._phase, self._step))
        elif place == STEP and value != self._step:
            self._step = int(value)
            self._laps.append((time.perf_counter(), self._step))

    def events(self) -> list[tuple[str, float, float, int]]:
        """Name, begin and length in microseconds, step."""
        now = time.perf_counter()
        found = []
        for (since, step), (until, _) in itertools.pairwise(self._laps):
            found.append((f"step {step}", self._at(since), (until - since) * 1e6, step))
        for (since, phase, step), (until, _, _) in itertools.pairwise([*self._changes, (now, OUTSIDE, 0)]):
            if _NAMES[phase] and until > since:
                found.append((_NAMES[phase], self._at(since), (until - since) * 1e6, step))
        return found

    def _at(self, clock_s: float) -> float:
        return (clock_s + self._epoch_s) * 1e6


def _merge(store: Store, *, last: bool = False) -> None:
    """Put the parts that are there into one trace."""
    parts = [json.loads(store.read(f"{_PARTS}/{name}")) for name in store.list(_PARTS)]
    if parts:
        parts.sort(key=lambda part: int(part["rank"]))
        store.write(f"{FOLDER}/{TRACE_FILE}", json.dumps(chrome_trace(parts), separators=(",", ":")).encode())
    if last:
        store.remove(_PARTS)


def _write_profile(store: Store, rank: int, profiler: profile_type) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "profile.json"
        profiler.export_chrome_trace(str(file))
        store.write(f"{FOLDER}/profile-{rank}.json", file.read_bytes())


def _store(trainer: Trainer) -> Store:
    return Store(trainer.run_dir or ".")
