"""Whether a finished run can be reproduced on this machine: the first steps again, compared with what its directory holds."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from unisono.checkpoint.checkpoints import Checkpoints
from unisono.checkpoint.fingerprint import compare
from unisono.checkpoint.format import from_json
from unisono.checkpoint.store import Store
from unisono.errors import ConfigurationError
from unisono.observe.metrics import read_metrics
from unisono.observe.strict_json import dumps
from unisono.verify.compare import distance_of, first_difference
from unisono.verify.inquiry import Verdict
from unisono.verify.job import Job
from unisono.verify.runs import RunOutcome, Runs, brief
from unisono.verify.servers import ForkServers

_MANIFEST = "manifest.json"
_CAPABILITY = "cpu_capability"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reproduction:
    """What came out."""

    run_dir: str
    script: str
    verdict: Verdict
    steps: int = 0
    """Steps compared: loss and gradient norm of each, bit for bit."""
    checkpoints: tuple[int, ...] = ()
    """Steps whose weights were compared, too."""
    difference: str = ""
    """The first one, in words."""
    settings: tuple[str, ...] = ()
    """Settings of the script that are others now."""
    fingerprint: tuple[str, ...] = ()
    """What this machine or build has otherwise."""
    explained_by: tuple[str, ...] = ()
    """Fields of the fingerprint under whose old value the run comes out as it was."""
    problem: str = ""
    """Why nothing could be told; or what else explains a difference."""


def reproduce(
    run_dir: str,
    script: str | None,
    args: Sequence[str],
    *,
    steps: int,
    say: Callable[[str], None] = lambda _: None,
    servers: ForkServers | None = None,
) -> Reproduction:
    """*local*. Trains the first ``steps`` steps again, on one worker. The run directory is only read.

    Args:
        run_dir: Of a run that was trained with ``run_dir=``.
        script: The script that made it; None: as the manifest has it, arguments included.
        args: Its arguments.
        steps: How many steps.
        say: Told what is going on.
        servers: Where processes come from; None: new ones.

    Raises:
        ConfigurationError: The directory is no run's, or the script cannot be found.
    """
    store = Store(run_dir)
    if not store.exists(_MANIFEST):
        raise ConfigurationError(f"{store.where(_MANIFEST)} is not there: {run_dir!r} is not the directory of a run")
    manifest: Any = from_json(store.read(_MANIFEST))
    if script is None:
        script, *args = manifest["command"]
        if not Path(script).is_file():
            raise ConfigurationError(
                f"the manifest names the script {script!r}, which cannot be found from here: name it, unisono verify --against "
                f"{run_dir} SCRIPT [ARGS]"
            )
    threads = int(manifest["fingerprint"]["threads"])
    with contextlib.ExitStack() as closing:
        servers = servers or closing.enter_context(ForkServers())
        runs = closing.enter_context(Runs(servers, script, args, steps=steps, threads=threads))
        return _Reproducer(runs, store, manifest, say).result()


class _Reproducer:
    def __init__(self, runs: Runs, store: Store, manifest: dict[str, Any], say: Callable[[str], None]) -> None:
        self._runs, self._store, self._manifest, self._say = runs, store, manifest, say
        self._old = {line["step"]: line for line in read_metrics(store) if "event" not in line}
        self._threads = int(manifest["fingerprint"]["threads"])

    def result(self) -> Reproduction:
        """See ``reproduce``."""
        self._say("the first steps again")
        job = Job(threads=self._threads, keep=True)
        run = self._runs(job)
        result = Reproduction(run_dir=self._store.url, script=self._runs.script, verdict="unknown")
        number, why = self._number(run), run.failure
        if number is None:
            failed = f"the script failed: {why.kind}: {brief(why.message)}" if why else ""
            return dataclasses.replace(result, problem=failed or "the script trains nothing into this directory")
        new: Any = from_json((run.folder / f"run-{number + 1}" / _MANIFEST).read_bytes())
        compared = [step.step for step in run.trainers[number].steps if step.step in self._old]
        if not compared:
            return dataclasses.replace(result, problem="the run directory has no line for any of these steps (metrics.jsonl)")
        difference = next(self._differences(run, number), "")
        result = dataclasses.replace(
            result,
            verdict="different" if difference else "equal",
            steps=len(compared),
            checkpoints=tuple(self._saved()),
            difference=difference,
            settings=tuple(_settings(self._manifest["settings"], new["settings"])),
            fingerprint=tuple(
                text.replace(" at the checkpoint", " there").removesuffix(" now") + " here"
                for text in compare(self._manifest["fingerprint"], new["fingerprint"])
            ),
        )
        return self._explain(result, run, number, new) if difference else result

    def _number(self, run: RunOutcome) -> int | None:
        """Which of the script's trainers it is."""
        steps = [number for number, trainer in enumerate(run.trainers) if trainer.steps and trainer.run_dir]
        here = [number for number in steps if Path(run.trainers[number].run_dir).absolute() == self._store.path]
        return next(iter(here or steps), None)

    def _saved(self) -> list[int]:
        """The steps whose weights are there to compare."""
        steps = range(1, self._runs.steps + 1)
        return [step for step in steps if self._store.exists(f"checkpoints/step-{step}/checkpoint.json")]

    def _differences(self, run: RunOutcome, number: int) -> Iterator[str]:
        """Between what is written and what came out."""
        for step in run.trainers[number].steps:
            old = self._old.get(step.step, {})
            for field, name, now in (("loss", "loss", step.loss), ("gradient_norm", "gradient norm", step.norm)):
                if old and repr(float(old[field])) != repr(float(now)):
                    yield f"step {step.step}, {name}: {float(old[field]):.9g} there, {float(now):.9g} here"
        for saved in self._saved():
            kept = run.tensors(number, saved) or {"model": {}}
            for name, there in Checkpoints(self._store, keep=1).open(saved).tensors("model").items():
                ulp, largest = distance_of(there, kept["model"].get(name, there))
                if ulp:
                    yield f"step {saved}, weights: {name} by up to {ulp:,} ulp ({largest:.3g})"

    def _explain(self, result: Reproduction, run: RunOutcome, number: int, new: Any) -> Reproduction:
        """Which field of the fingerprint it is: by the old value of each that can be had here."""
        if result.settings:
            return dataclasses.replace(result, problem="the script has other settings now than the run had")
        again = self._runs(Job(threads=self._threads, keep=True, second=True))
        if first_difference(run, again) is not None:
            told = "this script does not even repeat itself on this machine: unisono verify SCRIPT tells why"
            return dataclasses.replace(result, problem=told)
        old, now = self._manifest["fingerprint"], new["fingerprint"]
        fields = [field for field in {**now, **old} if old.get(field) != now.get(field)]
        explained, untried = [], []
        for field in fields:
            environment = _as_environment(field, old.get(field))
            if environment is None:
                untried.append(field)
                continue
            self._say(f"{field} as it was")
            other = self._runs(Job(threads=self._threads, keep=True, environment=environment))
            if self._number(other) is not None and not any(self._differences(other, number)):
                explained.append(field)
        if explained:
            return dataclasses.replace(result, explained_by=tuple(explained))
        nothing = "nothing that the fingerprint holds explains it: the code or the data is not what it was"
        problem = f"fields that differ and cannot be tried here: {', '.join(untried)}" if untried else nothing
        return dataclasses.replace(result, problem=problem)


def _as_environment(field: str, value: Any) -> tuple[tuple[str, str], ...] | None:
    """How to give a field its old value, if that can be done: variables, where empty means not set."""
    if field.isupper():
        return ((field, "" if value is None else str(value)),)
    if field == _CAPABILITY and value is not None:
        return (("ATEN_CPU_CAPABILITY", str(value).lower()),)
    return None


def _settings(old: Any, new: Any, name: str = "") -> list[str]:
    if old == new:
        return []
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        old, new = dict(enumerate(old)), dict(enumerate(new))
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for key in {**old, **new}:
            found += _settings(old.get(key), new.get(key), f"{name}.{key}" if name else str(key))
        return found
    return [f"{name}: {old} there, {new} here"]


def to_json(result: Reproduction) -> str:
    """*local*. As strict JSON."""
    return dumps(dataclasses.asdict(result), indent=2)


def show(result: Reproduction, console: Console) -> None:
    """*local*. For a person."""
    lines = []
    if result.verdict == "unknown":
        lines.append(f"Could not tell: {result.problem}")
    elif result.verdict == "equal":
        weights = f", and the weights after step {', '.join(map(str, result.checkpoints))}" if result.checkpoints else ""
        lines.append(f"Reproduced: loss and gradient norm of {result.steps} steps{weights}, bit for bit")
    else:
        lines += [f"Not reproduced: {result.difference}"]
        lines += [f"  setting {text}" for text in result.settings]
        lines += [f"  fingerprint: {text}" for text in result.fingerprint]
        if result.explained_by:
            lines.append(f"Explained by {', '.join(result.explained_by)}: with the old value it comes out as it was")
        if result.problem:
            lines.append(result.problem)
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
