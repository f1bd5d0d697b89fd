"""What happens in a process that a nursery has forked: one worker of one run of the script."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import os
import runpy
import signal
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any, NoReturn

import torch

import unisono
import unisono.training.trainer as home
from unisono.errors import UnisonoError
from unisono.launch.report import describe
from unisono.verify.job import Change, Variant
from unisono.verify.plain import PlainTrainer
from unisono.verify.probe import Bench, ProbeTrainer
from unisono.verify.record import WorkerRecord
from unisono.verify.watch import Watch, is_users

_PR_SET_PDEATHSIG = 1


def run(spec: dict[str, Any]) -> NoReturn:
    """Runs the script as ``spec`` says (see ``runs.Runs``), leaves a record, and ends the process."""
    status = 1
    try:
        os.setsid()
        with contextlib.suppress(OSError, AttributeError):  # Linux only; the nursery also ends what it has started
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        folder = Path(spec["folder"])
        log = os.open(folder / f"output-{spec['rank']}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(log, 1)
        os.dup2(log, 2)
        faulthandler.enable()
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, signal.SIG_DFL)
        status = _Worker(spec, folder).run()
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


class _Worker:
    def __init__(self, spec: dict[str, Any], folder: Path) -> None:
        self._spec, self._folder = spec, folder
        self._record = WorkerRecord(rank=spec["rank"])
        self._known = set(sys.modules)

    def run(self) -> int:
        spec = self._spec
        os.environ.update(spec["environment"])
        torch.set_num_threads(spec["threads"])
        watch = Watch(
            frozenset(Change(name) for name in spec["changes"]),
            rank=spec["rank"],
            size=spec["size"],
            shift=spec["shift"],
            scratch=Path(spec["scratch"]),
        )
        bench = Bench(
            watch=watch,
            record=self._record,
            folder=self._folder,
            meeting=spec["meeting"],
            steps=spec["steps"],
            events=spec["events"],
            dump=None if spec["dump"] is None else (spec["dump"][0], spec["dump"][1]),
            keep=spec["keep"],
            teacher=None if spec["teacher"] is None else Path(spec["teacher"]),
            held=spec["held"],
            finish=self._finish,
            inspect=spec["inspect"],
        )
        self._watch, self._bench = watch, bench
        ProbeTrainer.bench = PlainTrainer.bench = bench
        if spec["reference"] is not None:
            PlainTrainer.variant = Variant(spec["reference"])
        trainer: Any = ProbeTrainer if spec["reference"] is None else PlainTrainer
        unisono.Trainer = home.Trainer = trainer  # type: ignore[misc]
        return self._run_script()

    def _run_script(self) -> int:
        script = self._spec["script"]
        sys.argv = [script, *self._spec["args"]]
        if not os.environ.get("PYTHONSAFEPATH"):
            sys.path.insert(0, str(Path(script).resolve().parent))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("default")
            self._caught = caught
            self._watch.install()
            try:
                runpy.run_path(script, run_name="__main__")
                self._record.ended = True
            except SystemExit as stop:
                self._record.ended = stop.code in (None, 0)
                if not self._record.ended:
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
        account = describe(error.with_traceback(trace))
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if is_users(frame.filename)]
        self._record.failure = {
            "kind": account.kind,
            "message": account.message,
            "traceback": account.traceback,
            "secondary": account.secondary,
            "ours": isinstance(error, UnisonoError),
            "file": frames[-1].filename if frames else "",
            "line": frames[-1].lineno if frames else 0,
            "code": frames[-1].line if frames else "",
            "time_s": account.time_s,
        }

    def _finish(self) -> NoReturn:
        """All that was wanted is there."""
        self._write()
        if self._bench.collective is not None:
            with contextlib.suppress(Exception):
                self._bench.collective.barrier()  # nobody leaves while others still read its memory
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)

    def _write(self) -> None:
        record = self._record
        record.notes = self._watch.notes
        record.warnings = [f"{entry.category.__name__}: {entry.message}" for entry in self._caught]
        record.threads = torch.get_num_threads()
        record.gpus = torch.cuda.device_count() if self._bench.on_gpu else None
        record.modules = [
            name
            for name in sys.modules
            if name not in self._known and not is_users(getattr(sys.modules[name], "__file__", None) or "<none>")
        ]
        record.write(self._folder / f"record-{record.rank}.json")
