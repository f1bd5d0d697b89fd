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

from unisono.verify.causes import Cause, CauseSearch, lines, search
from unisono.verify.compare import Difference, first_difference, measure
from unisono.verify.job import Change, Job
from unisono.verify.record import Note, ScriptFailure
from unisono.verify.reference import ReferenceResult, examine
from unisono.verify.runs import RunOutcome, Runs, brief
from unisono.verify.servers import ForkServers

Verdict = Literal["equal", "different", "unknown"]
EXIT_STATUS: dict[Verdict, int] = {"equal": 0, "different": 1, "unknown": 2}


@dataclasses.dataclass(frozen=True, kw_only=True)
class WorkerComparison:
    """One run beside the run on one worker."""

    name: str
    """Such as "3 workers"."""
    workers: int
    difference: Difference | None = None
    search: CauseSearch | None = None
    """What was found about the difference."""
    skipped: str = ""
    """Why it was not compared."""

    @property
    def changes(self) -> frozenset[Change]:
        """Under these the difference is gone; empty if there is none, or if they were not found."""
        return self.search.changes if self.search else frozenset()


@dataclasses.dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """Everything that ``verify`` has to say."""

    script: str
    args: tuple[str, ...]
    verdict: Verdict
    steps: int
    """Optimizer steps that were compared, over all trainers."""
    comparisons: tuple[WorkerComparison, ...] = ()
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
    servers: ForkServers | None = None,
) -> VerifyReport:
    """*local*. Runs the script as often as needed, and says what came out.

    Args:
        script: Path.
        args: Its arguments.
        workers: Numbers of workers to compare with one.
        steps: Optimizer steps of each trainer.
        threads: Threads per worker.
        say: Told what is going on.
        servers: Where processes come from; None: new ones.
    """
    began_s = time.monotonic()
    with contextlib.ExitStack() as closing:
        servers = servers or closing.enter_context(ForkServers())
        runs = closing.enter_context(Runs(servers, script, args, steps=steps, threads=threads))
        report = _Inquiry(runs, workers, threads, say).report()
        return dataclasses.replace(report, runs=runs.made, seconds=time.monotonic() - began_s)


class _Inquiry:
    def __init__(self, runs: Runs, workers: Sequence[int], threads: int, say: Callable[[str], None]) -> None:
        self._runs, self._workers, self._threads, self._say = runs, list(workers), threads, say
        self._notes: list[str] = []
        self._findings: list[Cause] = []

    def report(self) -> VerifyReport:
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
        if repeat.difference is not None and not repeat.changes:
            rest = [WorkerComparison(name=f"{count} workers", workers=count, skipped=_UNSTABLE) for count in self._workers]
            return self._conclude("different", steps, comparisons=[repeat, *rest])
        base = base.but(*repeat.changes)
        comparisons = [repeat, *self._parallel(base)]
        self._say("the plain loop")
        reference = examine(self._runs, base.but(*(change for comparison in comparisons for change in comparison.changes)))
        verdict = _verdict(comparisons, reference, self._findings, is_alone=not self._workers)
        return self._conclude(verdict, steps, comparisons=comparisons, reference=reference)

    # ------------------------------------------------------------------ the first run

    def _look(self, run: RunOutcome) -> str:
        """Why the first run tells nothing; notes what a user should know about it."""
        record, failure = run.first, run.failure
        trained = [trainer for trainer in run.trainers if trainer.steps]
        if failure is not None and not trained:
            trace = f"\n{failure.traceback.rstrip()}" if failure.traceback else ""
            return f"the script failed: {failure.kind}: {brief(failure.message)}{trace}"
        if not run.trainers:
            return "the script makes no unisono.Trainer, so there is nothing to compare"
        if not trained:
            return "the script makes a trainer, but trains no step with it (fit, or step on batches)"
        if failure is not None:
            self._notes.append(
                f"after {record.events} steps and evaluations it failed ({failure.kind}: {brief(failure.message)}); "
                "what came before was compared. Training was cut short, which it may not expect"
            )
        if len(run.trainers) > 1:
            self._notes.append(f"the script makes {len(run.trainers)} trainers: all are looked at, one after the other")
        for number, trainer in enumerate(trained):
            if len(trainer.steps) < self._runs.steps:
                which = f" of trainer {number + 1}" if len(trained) > 1 else ""
                self._notes.append(f"training ends after {len(trainer.steps)} steps{which}, {self._runs.steps} were asked for")
        written = list(dict.fromkeys(note.what for note in run.notes("writes")))
        if written:
            more = f" and {len(written) - 3} more" if len(written) > 3 else ""
            self._notes.append(f"the script itself writes files, also when it is verified: {', '.join(written[:3])}{more}")
        return ""

    def _repeat(self, base: Job) -> WorkerComparison:
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

    def _parallel(self, base: Job) -> list[WorkerComparison]:
        first = self._runs(base).first
        parts = min(trainer.microbatches for trainer in first.trainers if trainer.steps)
        most = parts if first.gpus is None else min(parts, first.gpus)
        jobs = [dataclasses.replace(base, workers=count, keep=False) for count in self._workers if count <= most]
        self._say(f"{', '.join(str(job.workers) for job in jobs)} workers" if jobs else "no more workers")
        for job in jobs:
            self._runs.start(job)
        comparisons: list[WorkerComparison] = []
        known: WorkerComparison | None = None
        for job in jobs:
            comparison = self._compare(f"{job.workers} workers", base, job, known)
            known = known or (comparison if comparison.difference else None)
            comparisons.append(comparison)
            self._warned(self._runs(job), job)
        for count in [count for count in self._workers if count > most]:
            what = f"the trainer has {parts} microbatches" if count > parts else f"this machine has {first.gpus} GPUs"
            skipped = f"{what}, so at most as many workers"
            comparisons.append(WorkerComparison(name=f"{count} workers", workers=count, skipped=skipped))
        if len(jobs) > 1:
            self._combined(jobs[:2])
        return comparisons

    def _compare(self, name: str, base: Job, other: Job, known: WorkerComparison | None = None) -> WorkerComparison:
        one, two = self._runs.all([base, other])
        difference = first_difference(one, two)
        if difference is None:
            return WorkerComparison(name=name, workers=other.workers)
        if difference.stage != "failure" and difference.tensor is not None:
            dump = (difference.trainer, difference.step)
            kept = [dataclasses.replace(job, dump=dump, events=difference.event) for job in (base, other)]
            if one.tensors(*dump) is not None:
                kept[0] = base
            difference = measure(difference, *self._runs.all(kept))
        found = self._again(known, base, other)
        if found is None:
            self._say(f"{name}: experiments")
            found = search(self._runs, one, two, difference)
        if difference.stage == "failure" and two.failure is not None:
            found = dataclasses.replace(found, causes=found.causes or (_refused(two.failure),))
        return WorkerComparison(name=name, workers=other.workers, difference=difference, search=found)

    def _again(self, known: WorkerComparison | None, base: Job, other: Job) -> CauseSearch | None:
        """The causes of a difference that another number of workers has shown, if they explain this one, too."""
        if known is None or not known.changes:
            return None
        changed = self._runs.all([job.but(*known.changes) for job in (base, other)])
        return known.search if first_difference(*changed) is None else None

    def _warned(self, run: RunOutcome, job: Job) -> None:
        """What the trainer itself has warned of."""
        warned = [text for text in run.first.warnings if _MODELS_DIFFER in text]
        if not warned or any(cause.name == "models_differ" for cause in self._findings):
            return
        hidden = self._runs(dataclasses.replace(job, events=1).but(Change.HIDE_RANK))
        by_rank = not any(_MODELS_DIFFER in other for other in hidden.first.warnings)
        self._findings.append(
            Cause(
                name="models_differ",
                what=warned[0].partition(": ")[2] + (". It depends on the worker's rank or on how many there are" * by_rank),
                advice="seed before you build the model, the same on every worker",
                places=lines(note for note in run.notes("rank") if note.phase == "script") if by_rank else (),
                experiments=(Change.HIDE_RANK.value,) if by_rank else (),
                fault=False,
            )
        )

    def _combined(self, jobs: Sequence[Job]) -> None:
        """Numbers that the script itself puts together from all workers: they must not depend on how many there are.

        Args:
            jobs: Of two numbers of workers.
        """
        few, many = (_talk(self._runs(job)) for job in jobs)
        for one, other in zip(few, many, strict=False):
            if (one.line, one.order) == (other.line, other.order) and not _alike(one.result, other.result):
                again = _talk(self._runs(dataclasses.replace(jobs[0], repeat=1)))
                if not any(note.order == one.order and _alike(note.result, one.result) for note in again):
                    return  # a duration, say: it is never the same
                self._findings.append(
                    Cause(
                        name="combined_over_workers",
                        what=f"a number that the script combines over workers itself ({one.what}) depends on how many there "
                        f"are: {one.result} with {jobs[0].workers}, {other.result} with {jobs[1].workers}",
                        advice="workers do not have equally many samples, so a mean of their means is none of the samples: add "
                        "up sums and counts, and divide once; or use trainer.evaluate, which does that",
                        places=lines([one]),
                        experiments=("another number of workers",),
                    )
                )
                return

    # ------------------------------------------------------------------

    def _conclude(self, verdict: Verdict, steps: int, **more: Any) -> VerifyReport:
        comparisons = tuple(more.pop("comparisons", ()))
        return VerifyReport(
            script=self._runs.script,
            args=tuple(self._runs.args),
            verdict=verdict,
            steps=steps,
            comparisons=comparisons,
            findings=tuple(self._findings),
            notes=tuple(self._notes),
            **more,
        )


_MODELS_DIFFER = "models differ at the start"  # of a warning of the trainer
_UNSTABLE = "two runs on one worker differ already"


def _verdict(
    comparisons: Sequence[WorkerComparison], reference: ReferenceResult, findings: Sequence[Cause], *, is_alone: bool
) -> Verdict:
    """What the comparisons come to; ``is_alone``: no other number of workers than one was asked for."""
    if any(comparison.difference is not None for comparison in comparisons):
        return "different"
    if any(cause.fault for cause in (*findings, *reference.causes)):
        return "different"
    if reference.problem or not (is_alone or any(one.workers > 1 and not one.skipped for one in comparisons)):
        return "unknown"
    return "equal" if reference.explained else "different"


def _refused(failure: ScriptFailure) -> Cause:
    return Cause(
        name="refused" if failure.refused else "failure",
        what=f"with several workers the script fails: {failure.kind}: {brief(failure.message)}",
        advice="the message says what to do" if failure.refused else "see the traceback",
        places=lines([failure.where]),
    )


def _talk(run: RunOutcome) -> list[Note]:
    """What worker 0 was told by the others and has fractions."""
    return [note for note in run.first.notes.get("talk", []) if "." in note.result]


def _alike(one: str, other: str) -> bool:
    """Whether two lists of numbers, as text, agree but for rounding."""
    pattern = r"-?\d+\.?\d*(?:e-?\d+)?"
    left, right = ([float(text) for text in re.findall(pattern, value)] for value in (one, other))
    return len(left) == len(right) and all(abs(a - b) <= 1e-5 * max(abs(a), abs(b)) for a, b in zip(left, right, strict=True))
