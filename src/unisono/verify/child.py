"""What happens in a process that a fork server has started: one worker of one run of the script."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import pickle
import runpy
import signal
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any, NoReturn

import torch

import unisono
from unisono.errors import UnisonoError
from unisono.launch.report import describe
from unisono.system.fork_server import BLOCKED_SIGNALS
from unisono.verify.bench import Bench
from unisono.verify.job import RunSpec
from unisono.verify.plain import PlainTrainer
from unisono.verify.probe import ProbeTrainer
from unisono.verify.record import Note, ScriptFailure, WorkerRecord
from unisono.verify.watch import ScriptWatch, is_users


def run(order: dict[str, Any]) -> NoReturn:
    """Runs the script, leaves a record, and ends the process.

    Args:
        order: "spec", the file of a `RunSpec`, and this worker's "rank".
    """
    status = 1
    try:
        faulthandler.enable()
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, BLOCKED_SIGNALS)
        spec: RunSpec = pickle.loads(Path(order["spec"]).read_bytes())
        status = _Worker(spec, order["rank"]).run()
    except BaseException:
        traceback.print_exc()
    finally:
        _leave(status)


def _leave(status: int) -> NoReturn:
    """Nothing of this process is worth tidying up, and that takes a second."""
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


class _Worker:
    def __init__(self, spec: RunSpec, rank: int) -> None:
        self._spec, self._record = spec, WorkerRecord(rank=rank)
        self._known = set(sys.modules)
        job = spec.job
        torch.set_num_threads(job.threads)
        self._watch = ScriptWatch(job.changes, shift=int(job.second) + rank, scratch=spec.scratch)
        self._bench = Bench(spec=spec, watch=self._watch, record=self._record, finish=self._finish)
        ProbeTrainer.bench = PlainTrainer.bench = self._bench
        trainer: Any = ProbeTrainer if job.reference is None else PlainTrainer
        unisono.Trainer = trainer  # type: ignore[misc]

    def run(self) -> int:
        script = self._spec.script
        sys.argv = [script, *self._spec.args]
        beside = str(Path(script).resolve().parent)
        if not os.environ.get("PYTHONSAFEPATH") and sys.path[0] != beside:  # a new interpreter has it there from the start
            sys.path.insert(0, beside)
        with warnings.catch_warnings(record=True) as self._caught:
            warnings.simplefilter("default")
            self._watch.install()
            try:
                runpy.run_path(script, run_name="__main__")
            except SystemExit as stop:
                if stop.code not in (None, 0):
                    self._fail(stop)
            except BaseException as error:
                traceback.print_exc()
                self._fail(error)
            self._write()
        return 0 if self._record.failure is None else 1

    def _fail(self, error: BaseException) -> None:
        trace = error.__traceback__
        while trace is not None and trace.tb_frame.f_code.co_filename.startswith((__file__, "<frozen")):
            trace = trace.tb_next  # what started the script would bury the place that matters
        frames = [frame for frame in traceback.extract_tb(trace) if is_users(frame.filename)]
        where = [Note(file=frame.filename, line=frame.lineno or 0, code=frame.line or "") for frame in frames[-1:]]
        self._record.failure = ScriptFailure(
            **vars(describe(error.with_traceback(trace))),
            worker=self._record.rank,
            refused=isinstance(error, UnisonoError),
            where=where[0] if where else Note(),
        )

    def _finish(self) -> NoReturn:
        """All that was wanted is there."""
        self._write()
        if self._bench.trainer is not None:
            with contextlib.suppress(Exception):
                self._bench.trainer.collective.barrier()  # nobody leaves while others still read its memory
        _leave(0)

    def _write(self) -> None:
        record = self._record
        record.notes = self._watch.notes
        record.warnings = [f"{entry.category.__name__}: {entry.message}" for entry in self._caught]
        record.threads = torch.get_num_threads()
        on_gpu = self._bench.trainer is not None and self._bench.trainer.device.type == "cuda"
        record.gpus = torch.cuda.device_count() if on_gpu else None
        record.modules = [
            name
            for name in sys.modules
            if name not in self._known and not is_users(getattr(sys.modules[name], "__file__", None) or "<none>")
        ]
        record.write(self._spec.folder / f"record-{record.rank}.pickle")
