"""The questions, in order: does the script train at all? Does it repeat itself on one worker? Is it the same on several? Is it
what a plain loop computes?
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

from unisono.verify.causes import Cause, Search, lines, search
from unisono.verify.compare import Difference, first_difference, measure
from unisono.verify.job import Change, Job
from unisono.verify.nursery import Nurseries
from unisono.verify.reference import ReferenceResult, examine
from unisono.verify.runs import Run, Runs, brief

Verdict = Literal["equal", "different", "unknown"]
EXIT_STATUS: dict[Verdict, int] = {"equal": 0, "different": 1, "unknown": 2}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """One run beside the run on one worker."""

    name: str
    """Such as "3 workers"."""
    workers: int
    difference: Difference | None = None
    search: Search | None = None
    """What was found about the difference."""
    skipped: str = ""
    """Why it was not compared."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """Everything that ``verify`` has to say."""

    script: str
    args: tuple[str, ...]
    verdict: Verdict
    steps: int
    """Optimizer steps that were compared, over all trainers."""
    comparisons: tuple[Comparison, ...] = ()
    reference: ReferenceResult | None = None
    findings: tuple[Cause, ...] = ()
    """What is wrong without making a difference in bits."""
    notes: tuple[str, ...] = ()
    """What else a user should know."""
    problem: str = ""
    """Why nothing could be told."""
    runs: int = 0
    seconds: float = 0.0

    @property
    def causes(self) -> tuple[Cause, ...]:
        """All that were named, each once."""
        found: dict[str, Cause] = {}
        for comparison in self.comparisons:
            for cause in comparison.search.causes if comparison.search else ():
                found.setdefault(cause.name, cause)
        for cause in (*self.findings, *(self.reference.causes if self.reference else ())):
            found.setdefault(cause.name, cause)
        return tuple(found.values())


def inquire(
    script: str,
    args: Sequence[str] = (),
    *,
    workers: Sequence[int],
    steps: int = 10,
    threads: int = 1,
    say: Callable[[str], None] = lambda _: None,
    nurseries: Nurseries | None = None,
) -> Report:
    """*local*. Runs the script as often as needed, and says what came out.

    Args:
        script: Path.
        args: Its arguments.
        workers: Numbers of workers to compare with one.
        steps: Optimizer steps of each trainer.
        threads: Threads per worker.
        say: Told what is going on.
        nurseries: Where processes come from; None: new ones.
    """
    began_s = time.monotonic()
    with contextlib.ExitStack() as closing:
        nurseries = nurseries or closing.enter_context(Nurseries())
        runs = closing.enter_context(Runs(nurseries, script, args, steps=steps, threads=threads))
        report = _Inquiry(runs, workers, threads, say).report()
        return dataclasses.replace(report, runs=runs.made, seconds=time.monotonic() - began_s)


class _Inquiry:
    def __init__(self, runs: Runs, workers: Sequence[int], threads: int, say: Callable[[str], None]) -> None:
        self._runs, self._workers, self._threads, self._say = runs, list(workers), threads, say
        self._notes: list[str] = []
        self._findings: list[Cause] = []

    def report(self) -> Report:
        """See ``inquire``."""
        self._say("1 worker")
        first = self._runs(Job(threads=self._threads))
        problem = self._look(first)
        steps = sum(len(trainer.steps) for trainer in first.trainers)
        if problem:
            return self._conclude("unknown", steps, problem=problem)
        self._runs.learn(first)
        base = Job(threads=self._threads, events=first.first.events, keep=True)
        repeat = self._repeat(base)
        comparisons = [repeat]
        if repeat.difference is not None:
            changes = repeat.search.changes if repeat.search else frozenset()
            if not changes:
                rest = [Comparison(name=_name(count), workers=count, skipped=_UNSTABLE) for count in self._workers]
                return self._conclude("different", steps, comparisons=[repeat, *rest])
            base = base.but(*changes)
        comparisons += self._parallel(base)
        self._say("the plain loop")
        for comparison in comparisons:
            base = base.but(*(comparison.search.changes if comparison.search else ()))
        reference = examine(self._runs, base)
        return self._conclude(
            _verdict(comparisons, reference, self._findings, is_alone=not self._workers),
            steps,
            comparisons=comparisons,
            reference=reference,
        )

    # ------------------------------------------------------------------ the first run

    def _look(self, run: Run) -> str:
        """Why the first run tells nothing; notes what a user should know about it."""
        record, failure = run.first, run.failure
        trained = [trainer for trainer in run.trainers if trainer.steps]
        if failure is not None and not trained:
            return f"the script failed: {failure['kind']}: {brief(failure['message'])}" + _trace(failure)
        if not run.trainers:
            return "the script makes no unisono.Trainer, so there is nothing to compare"
        if not trained:
            return "the script makes a trainer, but trains no step with it (fit, or step on batches)"
        if failure is not None:
            self._notes.append(
                f"after {record.events} steps and evaluations it failed ({failure['kind']}: {brief(failure['message'])}); "
                "what came before was compared. Training was cut short, which it may not expect"
            )
        if len(run.trainers) > 1:
            self._notes.append(f"the script makes {len(run.trainers)} trainers: all are looked at, one after the other")
        for number, trainer in enumerate(trained):
            if len(trainer.steps) < self._runs.steps:
                which = f" of trainer {number + 1}" if len(trained) > 1 else ""
                self._notes.append(f"training ends after {len(trainer.steps)} steps{which}, {self._runs.steps} were asked for")
        written = list(dict.fromkeys(note["what"] for note in run.notes("writes")))
        if written:
            more = f" and {len(written) - 3} more" if len(written) > 3 else ""
            self._notes.append(f"the script itself writes files, also when it is verified: {', '.join(written[:3])}{more}")
        return ""

    def _repeat(self, base: Job) -> Comparison:
        """The same again, with other hashes, at another time."""
        self._say("1 worker, again")
        comparison = self._compare("1 worker, again", base, dataclasses.replace(base, second=True, keep=False))
        search = comparison.search
        if search and any(cause.name == "nondeterministic_kernel" for cause in search.causes):
            # Chance may have made two runs agree: they must agree once more, and those without the change differ once more.
            cured = base.but(*search.changes, repeat=1)
            if first_difference(*self._runs.all([cured, dataclasses.replace(cured, second=True)])) is not None:
                return dataclasses.replace(comparison, search=dataclasses.replace(search, causes=(), changes=frozenset()))
        return comparison

    # ------------------------------------------------------------------ several workers

    def _parallel(self, base: Job) -> list[Comparison]:
        first = self._runs(base).first
        parts = min(trainer.microbatches for trainer in first.trainers if trainer.steps)
        most = parts if first.gpus is None else min(parts, first.gpus)
        counts = [count for count in self._workers if count <= most]
        self._say(f"{', '.join(map(str, counts))} workers" if counts else "no more workers")
        for count in counts:
            self._runs.start(dataclasses.replace(base, workers=count, keep=False))
        comparisons: list[Comparison] = []
        known: Comparison | None = None
        for count in self._workers:
            if count not in counts:
                what = f"the trainer has {parts} microbatches" if count > parts else f"this machine has {first.gpus} GPUs"
                skipped = f"{what}, so at most as many workers"
                comparisons.append(Comparison(name=_name(count), workers=count, skipped=skipped))
                continue
            comparison = self._compare(_name(count), base, dataclasses.replace(base, workers=count, keep=False), known)
            known = known or (comparison if comparison.difference else None)
            comparisons.append(comparison)
            self._warned(self._runs(dataclasses.replace(base, workers=count, keep=False)), base, count)
        self._talked(base, counts)
        return comparisons

    def _compare(self, name: str, base: Job, other: Job, known: Comparison | None = None) -> Comparison:
        one, two = self._runs.all([base, other])
        difference = first_difference(one, two)
        if difference is None:
            return Comparison(name=name, workers=other.workers)
        if difference.stage != "failure" and difference.tensor is not None:
            dump = (difference.trainer, difference.step)
            kept = [dataclasses.replace(job, dump=dump, events=difference.event) for job in (base, other)]
            difference = measure(difference, *self._runs.all(kept))
        found = self._again(known, base, other)
        if found is None:
            self._say(f"{name}: experiments")
            found = search(self._runs, one, two, difference)
        if difference.stage == "failure" and two.failure is not None:
            found = dataclasses.replace(found, causes=found.causes or (_refused(two.failure),))
        return Comparison(name=name, workers=other.workers, difference=difference, search=found)

    def _again(self, known: Comparison | None, base: Job, other: Job) -> Search | None:
        """The causes of a difference that another number of workers has shown, if they explain this one, too."""
        if known is None or known.search is None or not known.search.changes:
            return None
        changed = self._runs.all([job.but(*known.search.changes) for job in (base, other)])
        return known.search if first_difference(*changed) is None else None

    def _warned(self, run: Run, base: Job, count: int) -> None:
        """What the trainer itself has warned of."""
        for text in run.first.warnings:
            if "models differ at the start" in text and not any(cause.name == "models_differ" for cause in self._findings):
                hidden = self._runs(dataclasses.replace(base, workers=count, events=1, keep=False).but(Change.HIDE_RANK))
                rank = not any("models differ at the start" in other for other in hidden.first.warnings)
                self._findings.append(
                    Cause(
                        name="models_differ",
                        what=text.partition(": ")[2]
                        + (". It depends on the worker's rank or on how many there are" if rank else ""),
                        advice="seed before you build the model, the same on every worker",
                        places=lines([note for note in run.notes("rank") if note["phase"] == "script"]) if rank else (),
                        experiments=(Change.HIDE_RANK.value,) if rank else (),
                        fault=False,
                    )
                )

    def _talked(self, base: Job, counts: Sequence[int]) -> None:
        """Numbers that the script itself puts together from all workers: they must not depend on how many there are."""
        if len(counts) < 2:
            return
        few, many = (self._runs(dataclasses.replace(base, workers=count, keep=False)) for count in counts[:2])
        told = [[note for note in run.first.notes.get("talk", []) if "." in note["result"]] for run in (few, many)]
        for one, other in zip(*told, strict=False):
            if (one["line"], one["order"]) == (other["line"], other["order"]) and not _alike(one["result"], other["result"]):
                again = self._runs(dataclasses.replace(base, workers=counts[0], repeat=1, keep=False)).first.notes.get("talk", [])
                if not any(note["order"] == one["order"] and _alike(note["result"], one["result"]) for note in again):
                    return  # a duration, say: it is never the same
                self._findings.append(
                    Cause(
                        name="combined_over_workers",
                        what=f"a number that the script combines over workers itself ({one['what']}) depends on how many there "
                        f"are: {one['result']} with {counts[0]}, {other['result']} with {counts[1]}",
                        advice="workers do not have equally many samples, so a mean of their means is none of the samples: add "
                        "up sums and counts, and divide once; or use trainer.evaluate, which does that",
                        places=lines([one]),
                        experiments=("another number of workers",),
                    )
                )
                return

    # ------------------------------------------------------------------

    def _conclude(self, verdict: Verdict, steps: int, **more: Any) -> Report:
        comparisons = tuple(more.pop("comparisons", ()))
        return Report(
            script=self._runs.script,
            args=tuple(self._runs.args),
            verdict=verdict,
            steps=steps,
            comparisons=comparisons,
            findings=tuple(self._findings),
            notes=tuple(self._notes),
            **more,
        )


_UNSTABLE = "two runs on one worker differ already"


def _name(workers: int) -> str:
    return f"{workers} workers"


def _verdict(
    comparisons: Sequence[Comparison], reference: ReferenceResult, findings: Sequence[Cause], *, is_alone: bool
) -> Verdict:
    """What the comparisons come to; ``is_alone``: no other number of workers than one was asked for."""
    if any(comparison.difference is not None for comparison in comparisons):
        return "different"
    if any(cause.fault for cause in (*findings, *reference.causes)):
        return "different"
    if reference.problem or not (is_alone or any(one.workers > 1 and not one.skipped for one in comparisons)):
        return "unknown"
    return "equal" if reference.explained else "different"


def _refused(failure: dict[str, Any]) -> Cause:
    return Cause(
        name="refused" if failure.get("ours") else "failure",
        what=f"with several workers the script fails: {failure['kind']}: {brief(failure['message'])}",
        advice="the message says what to do" if failure.get("ours") else "see the traceback",
        places=lines([failure]) if failure.get("file") else (),
    )


def _alike(one: str, other: str) -> bool:
    """Whether two lists of numbers, as text, agree but for rounding."""
    pattern = r"-?\d+\.?\d*(?:e-?\d+)?"
    left, right = ([float(text) for text in re.findall(pattern, value)] for value in (one, other))
    return len(left) == len(right) and all(abs(a - b) <= 1e-5 * max(abs(a), abs(b)) for a, b in zip(left, right, strict=True))


def _trace(failure: dict[str, Any]) -> str:
    return f"\n{failure['traceback'].rstrip()}" if failure.get("traceback") else ""
