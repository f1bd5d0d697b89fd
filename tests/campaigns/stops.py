"""Stops real runs at random moments, in random ways, and sees that they all end with the weights of an undisturbed one.

    python -m tests.campaigns.stops --stops 50 --seed 0

Each run trains ``stopped_training.py`` through ``unisono run``. It is interrupted while it starts, trains or ends, started
again on 1 to 4 workers, and so on until it is finished. Then the weights, the log and the files must be those of a run that
nothing happened to; no process and no temporary file may be left; and a stop by SIGTERM or SIGINT must not lose a step.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import enum
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Protocol

import psutil

SCRIPT = Path(__file__).with_name("stopped_training.py")
REPOSITORY = Path(__file__).parents[2]
MARKER = "UNISONO_CAMPAIGN"
MOST_WORKERS = 4
LIMIT_S = 120.0
"""When a start counts as hung."""
ORPHANS_S = 5.0
"""How long the processes of a dead launcher may live on."""
DURING_START = 0.25
"""Share of stops at any moment after the launch; the others come while it trains."""


class Kind(enum.Enum):
    TERM = "SIGTERM"
    INT = "SIGINT"
    KILL_ONE = "SIGKILL of one"
    KILL_ALL = "SIGKILL of all"


GRACEFUL = {Kind.TERM: 128 + signal.SIGTERM, Kind.INT: 128 + signal.SIGINT}


@dataclasses.dataclass(kw_only=True)
class Start:
    """One start of a run, and how it ended."""

    run: int
    workers: int
    kind: Kind | None
    """None: nothing was done to it."""
    after_s: float = 0.0
    """From launch to stop."""
    trained: list[int] = dataclasses.field(default_factory=list)
    """Steps that it said it had done."""
    checkpoint: int = 0
    """Newest complete checkpoint afterwards; 0 if there is none."""
    status: int = 0
    seconds: float = 0.0
    struck: bool = False
    """Whether a process was killed."""
    problems: list[str] = dataclasses.field(default_factory=list)

    @property
    def stopped(self) -> bool:
        """Whether the stop came before the end."""
        return self.kind is not None and (self.struck or self.status != 0)

    @property
    def survived(self) -> bool:
        """Whether it was done all the same: others went on for the one that was killed."""
        return self.struck and self.status == 0

    def row(self) -> str:
        kind = self.kind.value if self.kind else "-"
        steps = f"{self.trained[0]:>3} to {self.trained[-1]:>3}" if self.trained else "      none"
        late = "finished before the stop; " if self.kind and not self.stopped else ""
        went_on = "others went on; " if self.survived else ""
        told = late + went_on + ("; ".join(self.problems) or "ok")
        return (
            f"{self.run:>3}  {self.workers:>7}  {kind:<14}  {self.after_s:>5.1f} s  {steps:>10}  {self.checkpoint:>10}"
            f"  {self.status:>6}  {self.seconds:>5.1f} s  {told}"
        )


HEADER = "run  workers  stop            after    steps       checkpoint  status  lasted   remarks"


@dataclasses.dataclass
class Report:
    """What a campaign has seen."""

    starts: list[Start] = dataclasses.field(default_factory=list)
    problems: list[str] = dataclasses.field(default_factory=list)
    runs: int = 0

    @property
    def stops(self) -> Counter[Kind]:
        return Counter(start.kind for start in self.starts if start.kind is not None and start.stopped)

    def __str__(self) -> str:
        stops = ", ".join(f"{self.stops[kind]} {kind.value.replace('SIGKILL of all', 'of all')}" for kind in Kind)
        end = "all digests equal" if not self.problems else f"{len(self.problems)} PROBLEMS: {'; '.join(self.problems)}"
        return f"{self.stops.total()} stops ({stops}), {self.runs} runs, {end}"


class Started(Protocol):
    """What `subprocess.Popen` gives, of which this much is needed."""

    pid: int
    returncode: int | None
    stdout: IO[str] | None
    stderr: IO[str] | None

    def poll(self) -> int | None: ...
    def wait(self, timeout: float | None = None) -> int: ...
    def send_signal(self, sig: int) -> None: ...


class Python:
    """Starts `unisono` commands as new interpreters."""

    def start(self, arguments: Sequence[str], environment: Mapping[str, str]) -> Started:
        return subprocess.Popen(
            [sys.executable, "-m", "unisono.launch", *arguments],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def workers(self, launcher: psutil.Process) -> list[psutil.Process]:
        """The workers of a launcher: they are its fork server's children."""
        return [child for child in launcher.children(recursive=True) if "unisono.launch.worker" in _command(child)]


class Launched:
    """A running ``unisono run``, and what it says."""

    def __init__(self, python: Python, run_dir: Path, workers: int, temporary: Path) -> None:
        # Those who are marked alike before it starts are not its own.
        self.marker = os.environ.get(MARKER) or uuid.uuid4().hex
        self._before = set(self._marked())
        self._python = python
        self.trained: list[int] = []
        self.output: list[str] = []
        self.trains = threading.Event()
        self._began_s = time.monotonic()
        env = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "OMP_NUM_THREADS")}
        self.process = python.start(
            ["run", "--workers", str(workers), str(SCRIPT), str(run_dir)],
            {**env, MARKER: self.marker, "TMPDIR": str(temporary), "PYTHONPATH": _python_path()},
        )
        # Apart: what the launcher says must not get into a line of the workers.
        self._readers = [threading.Thread(target=read, daemon=True) for read in (self._read, self._read_errors)]
        for reader in self._readers:
            reader.start()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began_s

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.output.append(line)
            if found := re.match(r"trained step (\d+)$", line):
                self.trained.append(int(found[1]))
                self.trains.set()
        self.trains.set()

    def _read_errors(self) -> None:
        assert self.process.stderr is not None
        self.output.extend(self.process.stderr)

    def close(self) -> None:
        """Ends the reading, once all processes are gone."""
        for reader, pipe in zip(self._readers, (self.process.stdout, self.process.stderr), strict=True):
            reader.join(ORPHANS_S)
            if pipe is not None and not reader.is_alive():
                pipe.close()

    def lasts(self, seconds: float) -> bool:
        """Waits that long, or until it ends; whether it still runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)
        return self.process.poll() is None

    def finish(self) -> int | None:
        """Its exit status; None if it does not end."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.process.wait(LIMIT_S)
        return None

    def stop(self, kind: Kind, rng: random.Random) -> bool:
        """Does it; whether a process was killed. One that ended just before is no error."""
        with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
            if kind is Kind.TERM:
                self.process.send_signal(signal.SIGTERM)
            elif kind is Kind.INT:
                os.killpg(self.process.pid, signal.SIGINT)
            elif kind is Kind.KILL_ONE:
                if workers := self._workers():
                    rng.choice(workers).kill()
                    return True
            else:
                kill([psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)])
        return False

    def _workers(self) -> list[psutil.Process]:
        """The workers, once there are any."""
        while self.process.poll() is None:
            workers = self._python.workers(psutil.Process(self.process.pid))
            if workers:
                return workers
            self.lasts(0.02)
        return []

    def survivors(self) -> list[psutil.Process]:
        """Processes of this start that live on after its end and a little grace."""
        deadline_s = time.monotonic() + ORPHANS_S
        while (left := self.processes()) and time.monotonic() < deadline_s:
            psutil.wait_procs(left, timeout=0.1)
        return left

    def processes(self) -> list[psutil.Process]:
        """All that this start brought into being and that still live."""
        return [process for process in self._marked() if process not in self._before]

    def _marked(self) -> list[psutil.Process]:
        return [process for process in psutil.process_iter() if self._is_marked(process)]

    def _is_marked(self, process: psutil.Process) -> bool:
        try:
            return process.environ().get(MARKER) == self.marker and process.status() != psutil.STATUS_ZOMBIE
        except (psutil.Error, OSError):
            return False


def kill(processes: Sequence[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def _python_path() -> str:
    paths = [str(REPOSITORY / "src"), os.environ.get("PYTHONPATH", "")]
    return os.pathsep.join(path for path in paths if path)


# ---------------------------------------------------------------------- what a run leaves behind


def newest_checkpoint(run_dir: Path) -> int:
    return max(
        (int(path.parent.name.removeprefix("step-")) for path in run_dir.glob("checkpoints/step-*/checkpoint.json")), default=0
    )


def lines(run_dir: Path) -> list[dict[str, object]]:
    """The log of steps without what depends on time."""
    timed = re.compile(r".*_s(_\d+)?|samples_per_second|microbatches(_\d+)?")
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if "event" not in record]  # one that was killed and survived is told of there
    return [{key: value for key, value in record.items() if not timed.fullmatch(key)} for record in steps]


def weights(run_dir: Path) -> str:
    return hashlib.sha256((run_dir / "model.safetensors").read_bytes()).hexdigest()


def compare(run_dir: Path, undisturbed: Path) -> Iterator[str]:
    """What differs from a run that nothing happened to."""
    if weights(run_dir) != weights(undisturbed):
        yield f"weights {weights(run_dir)[:12]} are not {weights(undisturbed)[:12]}"
    if lines(run_dir) != lines(undisturbed):
        steps = [line["step"] for line in lines(run_dir)]
        yield f"the log differs: {len(steps)} lines, steps {steps[:3]} to {steps[-3:]}"
    summary = json.loads((run_dir / "summary.json").read_text())
    if (summary["finished"], summary["weights_sha256"]) != (True, weights(undisturbed)):
        yield f"the summary says {summary}"
    names = {"checkpoints", "manifest.json", "metrics.jsonl", "model.safetensors", "summary.json"}
    if {path.name for path in run_dir.iterdir()} != names:
        yield f"the run directory holds {sorted(path.name for path in run_dir.iterdir())}"
    if left := [str(path) for path in run_dir.rglob("*") if "tmp" in path.name]:
        yield f"temporary files are left: {left}"


# ---------------------------------------------------------------------- the campaign


class Campaign:
    """Runs under stops.

    Args:
        folder: Where runs are kept.
        stops: How many stops to make; the run under way is then finished.
        seed: Of kinds, moments and numbers of workers.
        say: Shows a line.
        python: Starts the commands.
    """

    def __init__(
        self, folder: Path, *, stops: int, seed: int, say: Callable[[str], None] = print, python: Python | None = None
    ) -> None:
        self._folder = folder
        self._python = python or Python()
        self._stops = stops
        self._say = say
        self._rng = random.Random(seed)
        self._report = Report()
        self._planned: list[Kind] = []
        self._launched: Launched | None = None
        self._starts_s = self._trains_s = 0.0

    def run(self) -> Report:
        """Makes the stops and gives the report; the first problem ends it."""
        try:
            return self._run()
        finally:
            if self._launched is not None:
                kill(self._launched.processes())

    def _run(self) -> Report:
        self._say(HEADER)
        undisturbed = self._undisturbed()
        while self._report.stops.total() < self._stops and not self._report.problems:
            self._report.runs += 1
            run_dir = self._folder / f"run-{self._report.runs}"
            self._finish(run_dir)
            if not self._report.problems:
                self._report.problems += [f"run {self._report.runs}: {problem}" for problem in compare(run_dir, undisturbed)]
        return self._report

    def _undisturbed(self) -> Path:
        """One worker, nothing happens; also shows how long a start and the training take."""
        run_dir = self._folder / "undisturbed"
        launched = self._launch(run_dir, 1)
        launched.trains.wait(LIMIT_S)
        self._starts_s = launched.seconds
        start = Start(run=0, workers=1, kind=None)
        self._end(launched, start, run_dir, 0)
        self._trains_s = start.seconds - self._starts_s
        return run_dir

    def _finish(self, run_dir: Path) -> None:
        """Starts a run again and again until it is done."""
        while not self._report.problems:
            kind = self._next_kind() if self._report.stops.total() < self._stops else None
            workers = self._rng.randint(1, MOST_WORKERS)
            start = Start(run=self._report.runs, workers=workers, kind=kind)
            before = newest_checkpoint(run_dir)
            launched = self._launch(run_dir, workers)
            if kind is not None and self._comes_to(launched):
                start.after_s = launched.seconds
                start.struck = launched.stop(kind, self._rng)
            self._end(launched, start, run_dir, before)
            if start.status == 0:
                return

    def _next_kind(self) -> Kind:
        """Kinds in random order, each as often as the others."""
        if not self._planned:
            self._planned = self._rng.sample(list(Kind), k=len(Kind))
        return self._planned[-1]

    def _comes_to(self, launched: Launched) -> bool:
        """Waits for the moment of the stop; whether it still runs then."""
        if self._rng.random() < DURING_START:
            return launched.lasts(self._rng.uniform(0.0, self._starts_s))
        launched.trains.wait(LIMIT_S)
        return launched.lasts(self._rng.uniform(0.0, 0.5 * self._trains_s))

    def _launch(self, run_dir: Path, workers: int) -> Launched:
        temporary = self._folder / "temporary"
        temporary.mkdir(exist_ok=True)
        self._launched = Launched(self._python, run_dir, workers, temporary)
        return self._launched

    def _end(self, launched: Launched, start: Start, run_dir: Path, before: int) -> None:
        status = launched.finish()
        left = launched.survivors()
        kill(left)
        launched.close()
        start.status = -1 if status is None else status
        start.seconds = launched.seconds
        start.trained = launched.trained
        start.checkpoint = newest_checkpoint(run_dir)
        start.problems = list(self._problems(start, hung=status is None, orphans=left, before=before, run_dir=run_dir))
        if start.stopped and start.kind is not None:
            self._planned.pop()
        self._report.starts.append(start)
        self._report.problems += [f"run {start.run}: {problem}" for problem in start.problems]
        self._say(start.row())
        if start.problems:
            self._say("".join(launched.output))

    def _problems(self, start: Start, *, hung: bool, orphans: list[psutil.Process], before: int, run_dir: Path) -> Iterator[str]:
        if hung:
            yield f"hung for {LIMIT_S} s"
        elif orphans:
            yield f"{len(orphans)} orphans: {[' '.join(_command(process)[-4:]) for process in orphans]}"
        expected = {0}
        if start.kind in GRACEFUL:
            expected = {0, GRACEFUL[start.kind]}
            if not start.trained or (run_dir / "model.safetensors").exists():
                # Before the launcher listens, and once it has nothing left to save, the signal itself may end it.
                expected.add(128 - GRACEFUL[start.kind])
        elif start.kind is not None:
            expected = {0, 128 + signal.SIGKILL, -signal.SIGKILL}
        if start.status not in expected:
            yield f"exit status {start.status} is none of {sorted(expected)}"
        # Where others went on, worker 0 may have died before it said what it had done, or all began at a checkpoint again.
        if not start.survived and start.trained != list(range(before + 1, before + 1 + len(start.trained))):
            yield f"steps {start.trained} do not follow the checkpoint of step {before}"
        if start.kind in (None, *GRACEFUL):
            last = start.trained[-1] if start.trained else before
            if start.checkpoint != last:
                yield f"step {last} was done, but the newest checkpoint is that of step {start.checkpoint}"
            if temporary := [path.name for path in self._temporary()]:
                yield f"temporary files are left: {temporary}"
        for path in self._temporary():
            _remove(path)  # of a killed launcher, which nobody else could remove

    def _temporary(self) -> list[Path]:
        # PyTorch's compiler makes a cache there as soon as an optimizer is made, and means to keep it.
        return [path for path in (self._folder / "temporary").iterdir() if not path.name.startswith("torchinductor")]


def _remove(path: Path) -> None:
    for child in path.iterdir() if path.is_dir() else ():
        _remove(child)
    path.rmdir() if path.is_dir() else path.unlink()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stops", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="unisono-stops-") as folder:
        report = Campaign(Path(folder), stops=arguments.stops, seed=arguments.seed).run()
    print(report)
    return 1 if report.problems else 0


if __name__ == "__main__":
    sys.exit(main())
