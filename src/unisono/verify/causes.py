"""What makes a difference, found by experiment: the same two runs again, with one thing changed in both. If they are equal now,
that thing has to do with it.

An experiment is made only if what it changes was *seen* in the runs: nobody looks for a clock in a script that reads none.
Several may cure one difference (a buffer that worker 0 alone writes stays as it was without the rank, and if state is put back):
the most specific one names the cause, the others say more about it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence

from unisono.verify.compare import Difference, first_difference, settings_difference
from unisono.verify.job import Change, Job
from unisono.verify.record import Note
from unisono.verify.runs import RunOutcome, Runs

SPECIFIC = (
    Change.HOLD_SETTINGS,
    Change.NO_CALLBACKS,
    Change.NO_LOADER_WORKERS,
    Change.RESTORE_STATE,
    Change.FRESH_DATA,
    Change.IGNORE_SEEDS,
    Change.HOLD_THREADS,
    Change.DETERMINISTIC,
    Change.STOP_TIME,
    Change.FIX_ENTROPY,
    Change.SAME_HASH,
    Change.HIDE_RANK,
)
"""Most specific first."""
_MOST_CAUSES = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cause:
    """Why two runs differ."""

    name: str
    """A short name, the same for the same kind of cause."""
    what: str
    """What it is, in a sentence."""
    advice: str
    """What to do about it."""
    places: tuple[str, ...] = ()
    """Lines of the user's code that have to do with it."""
    experiments: tuple[str, ...] = ()
    """What was changed so that the difference went away; empty if it was seen directly."""
    fault: bool = True
    """False: a choice that the user may make, knowing it."""


@dataclasses.dataclass(frozen=True)
class CauseSearch:
    """Everything that was tried for one difference."""

    causes: tuple[Cause, ...]
    changes: frozenset[Change]
    """Under these the difference is gone."""
    tried: tuple[str, ...]
    """Changes that did not help."""


@dataclasses.dataclass(frozen=True)
class DifferentPair:
    """Two runs that should have the same bits."""

    one: RunOutcome
    """On one worker."""
    other: RunOutcome
    difference: Difference

    @property
    def jobs(self) -> tuple[Job, Job]:
        """What they are runs of."""
        return self.one.job, self.other.job

    @property
    def is_parallel(self) -> bool:
        """Whether they have different numbers of workers."""
        return self.one.job.workers != self.other.job.workers

    def notes(self, kind: str) -> list[Note]:
        """Of both runs."""
        return list(dict.fromkeys(self.one.notes(kind) + self.other.notes(kind)))

    def every(self, field: str) -> list[str]:
        """The union over all workers' records of both runs."""
        return list(dict.fromkeys(self.one.every(field) + self.other.every(field)))


def search(runs: Runs, one: RunOutcome, other: RunOutcome, difference: Difference) -> CauseSearch:
    """*local*. The causes of a difference between two runs: one after the other, until nothing differs any more."""
    pair = DifferentPair(one, other, difference)
    causes: list[Cause] = []
    tried: list[str] = []
    base: frozenset[Change] = frozenset()
    while len(causes) < _MOST_CAUSES:
        found = _one_cause(runs, pair, base, tried)
        if found is None:
            break
        cause, changes = found
        causes.append(cause)
        base |= changes
        one, other = runs.all([job.but(*changes) for job in pair.jobs])
        remaining = first_difference(one, other)
        if remaining is None:
            return CauseSearch(tuple(causes), base, tuple(tried))
        pair = DifferentPair(one, other, remaining)
    return CauseSearch(tuple(causes), frozenset(), tuple(tried))


def _one_cause(
    runs: Runs, pair: DifferentPair, base: frozenset[Change], tried: list[str]
) -> tuple[Cause, frozenset[Change]] | None:
    seen = [change for change in _applicable(pair) if change not in base]
    # Those that leave no trace, or hardly ever matter, are tried if nothing else has helped.
    late = [Change.SAME_HASH, Change.FIX_ENTROPY, *([Change.STOP_TIME] if pair.notes("clock") else [])]
    candidates: list[Change] = []
    cured: list[Change] = []
    for group in (seen, [change for change in late if change not in base and change not in seen]):
        if not cured:
            candidates += group
            cured = _cures(runs, pair, group)
    together = () if cured else _combination(runs, pair, candidates)
    tried += [change.value for change in candidates if change not in (*cured, *together) and change.value not in tried]
    if together:
        causes = [_named(runs, change, together, pair) for change in SPECIFIC if change in together]
        return dataclasses.replace(causes[0], what="; and ".join(cause.what for cause in causes)), frozenset(together)
    if not cured:
        return None
    first = next(change for change in SPECIFIC if change in cured)
    return _named(runs, first, cured, pair), frozenset([first])


def _cures(runs: Runs, pair: DifferentPair, changes: Iterable[Change]) -> list[Change]:
    """Those changes under which the two runs are equal up to where they first differed."""
    groups = [(change,) for change in changes]
    return [change for (change,), equal in zip(groups, _equal_under(runs, pair, groups), strict=True) if equal]


def _equal_under(runs: Runs, pair: DifferentPair, groups: Sequence[Sequence[Change]]) -> list[bool]:
    events = pair.difference.event or pair.one.job.events
    made = runs.all([job.but(*group, events=events, keep=False) for group in groups for job in pair.jobs])
    return [
        first_difference(one, other) is None and one.failure is None for one, other in zip(made[::2], made[1::2], strict=True)
    ]


def _combination(runs: Runs, pair: DifferentPair, changes: Sequence[Change]) -> tuple[Change, ...]:
    """The fewest changes that together make the difference go away, if all of them do."""
    needed = tuple(changes)
    if len(needed) < 2 or not _equal_under(runs, pair, [needed])[0]:
        return ()
    for change in reversed(SPECIFIC):
        fewer = tuple(other for other in needed if other is not change)
        if change in needed and fewer and _equal_under(runs, pair, [fewer])[0]:
            needed = fewer
    return needed


def _applicable(pair: DifferentPair) -> list[Change]:
    """The experiments for which the runs give a reason."""
    one, other, stage = pair.one, pair.other, pair.difference.stage
    trainers = [*one.trainers, *other.trainers]
    settings = [[trainer.settings for trainer in run.trainers] for run in (one, other)]
    reasons = {
        Change.HOLD_SETTINGS: pair.is_parallel and settings[0] != settings[1],
        Change.NO_CALLBACKS: any(trainer.callbacks for trainer in trainers),
        Change.NO_LOADER_WORKERS: any(trainer.loader_workers for trainer in trainers),
        Change.RESTORE_STATE: pair.every("state"),
        Change.FRESH_DATA: stage == "data" or pair.every("data_state"),
        Change.IGNORE_SEEDS: any(note.phase != "script" for note in pair.notes("seed")),
        Change.HOLD_THREADS: pair.notes("threads"),
        Change.DETERMINISTIC: pair.notes("deterministic") or one.job.threads > 1,
        Change.STOP_TIME: pair.notes("clock") and not (pair.is_parallel and stage == "settings"),
        Change.FIX_ENTROPY: pair.notes("entropy") and not pair.is_parallel,
        Change.HIDE_RANK: pair.notes("rank"),
    }
    return [change for change in SPECIFIC if reasons.get(change)]


# ---------------------------------------------------------------------- names


def lines(notes: Iterable[Note]) -> tuple[str, ...]:
    """Places in the user's code: "train.py:31  torch.manual_seed(rank)"."""
    return tuple(dict.fromkeys(f"{note.file}:{note.line}  {note.code}" for note in notes if note.file))


def _named(runs: Runs, change: Change, cured: Sequence[Change], pair: DifferentPair) -> Cause:
    """The cause in words, once ``change`` is known to be the most specific one of those that cured."""
    if change is Change.FRESH_DATA:  # what reading changes is seen where each sample is read on its own
        under = runs(pair.one.job.but(change, events=pair.difference.event or pair.one.job.events, keep=False))
        pair = dataclasses.replace(pair, one=under)
    cause = _WITH_DETAILS[change](pair) if change in _WITH_DETAILS else _plainly(change, pair)
    if Change.HIDE_RANK in cured and change is not Change.HIDE_RANK:
        cause = dataclasses.replace(
            cause,
            what=f"{cause.what}; it depends on the worker's rank or on how many there are",
            places=tuple(dict.fromkeys([*cause.places, *_rank_places(pair)])),
        )
    return dataclasses.replace(cause, experiments=tuple(each.value for each in SPECIFIC if each in cured))


def _rank_places(pair: DifferentPair) -> tuple[str, ...]:
    """Where the script looks at the rank: where it does in the phase that first went wrong, or anywhere."""
    notes = pair.notes("rank")
    phases = {"data": "data", "loss": "loss", "callback": "callback", "start": "between", "settings": "script"}
    near = [note for note in notes if note.phase.startswith(phases.get(pair.difference.stage, "-"))]
    return lines(near or notes)


def _settings(pair: DifferentPair) -> Cause:
    found = next(
        settings_difference(one.settings, other.settings)
        for one, other in zip(pair.one.trainers, pair.other.trainers, strict=False)
        if one.settings != other.settings
    )
    return Cause(
        name="settings_by_workers",
        what=f"the optimizer's settings depend on the number of workers: {found} with {pair.one.job.workers} and "
        f"{pair.other.job.workers} of them",
        advice="take the settings that you would use on one device: the global batch is the same for every number of workers",
    )


def _callbacks(pair: DifferentPair) -> Cause:
    edits: dict[str, set[str]] = {}
    ranks: dict[str, set[int]] = {}
    for record in filter(None, pair.other.records):
        for step in (step for trainer in record.trainers for step in trainer.steps):
            for callback, tensors in step.edited.items():
                edits.setdefault(callback, set()).update(tensors)
                ranks.setdefault(callback, set()).add(record.rank)
    partly = {callback for callback, seen in ranks.items() if len(seen) < pair.other.job.workers}
    told = [
        f"{callback} changes {', '.join(sorted(tensors)[:3])}"
        + (f" on worker {', '.join(map(str, sorted(ranks[callback])))} only" if callback in partly else "")
        for callback, tensors in edits.items()
    ]
    names = ", ".join(dict.fromkeys(name for trainer in pair.one.trainers for name in trainer.callbacks))
    return Cause(
        name="callback_on_some_workers" if partly else "callback",
        what=f"a callback ({names}) makes the difference" + (f": {'; '.join(told)}" if told else ""),
        advice="a callback that changes the model or the optimizer must do the same on every worker, from numbers that are "
        "the same there (those of the StepResult, or of trainer.evaluate)",
        places=lines(note for note in pair.notes("talk") if note.phase.startswith("callback")),
    )


def _rank(pair: DifferentPair) -> Cause:
    inside = {"loss": "the model or the loss does", "data": "reading data does", "callback": "a callback does"}
    writers: dict[str, list[int]] = {}
    for record in filter(None, pair.other.records):
        for name in record.buffers:
            writers.setdefault(name, []).append(record.rank)
    partly = [f"buffer {name!r} is written by worker {ranks[0]} only" for name, ranks in writers.items() if len(ranks) == 1]
    more = f": {', '.join(partly[:3])}" if partly and pair.other.job.workers > 1 else ""
    return Cause(
        name="buffer_on_some_workers" if more else "rank_dependent",
        what=f"{inside.get(pair.difference.stage, 'the script does')} something that depends on the worker's rank or on how many "
        f"there are{more}",
        advice="compute the same on every worker; only what is written or shown may depend on the rank",
        places=_rank_places(pair),
    )


_WITH_DETAILS: dict[Change, Callable[[DifferentPair], Cause]] = {
    Change.HOLD_SETTINGS: _settings,
    Change.NO_CALLBACKS: _callbacks,
    Change.HIDE_RANK: _rank,
}
_TEXTS: dict[Change, tuple[str, str, str, str]] = {
    Change.NO_LOADER_WORKERS: (
        "loader_worker",
        "seed",
        "a sample depends on which of the {loaders} loader processes reads it (with num_workers=0 the difference is gone)",
        "draw from torch, numpy.random or random as they are: they are seeded for each sample. Do not seed by get_worker_info(), "
        "and keep no generator in the dataset",
    ),
    Change.RESTORE_STATE: (
        "state_between_batches",
        "",
        "the model or the loss keeps state from one microbatch to the next, so the result depends on their order and on which "
        "worker computes which: {state}",
        "begin each batch from the same state (reset it at the beginning of forward), or make it a buffer, which is averaged "
        "over microbatches",
    ),
    Change.FRESH_DATA: (
        "dataset_keeps_state",
        "",
        "a sample depends on what was read before it: reading changes the dataset{data}",
        "make __getitem__ a function of the index alone; for augmentation draw from torch, numpy.random or random themselves, "
        "which are seeded for each sample, not from a generator that the dataset keeps",
    ),
    Change.IGNORE_SEEDS: (
        "own_seeding",
        "seed",
        "the script seeds random generators itself during training, over the seeds by which each microbatch gets its own",
        "leave seeding to the trainer (seed=...): it seeds each sample and each microbatch, the same for any number of workers",
    ),
    Change.HOLD_THREADS: (
        "thread_count",
        "threads",
        "the script changes the number of threads ({threads} at the end), and kernels sum in another order with another number",
        "leave threads to the launcher (unisono run --threads T): the same number for every worker and every run",
    ),
    Change.DETERMINISTIC: (
        "nondeterministic_kernel",
        "deterministic",
        "a kernel gives other bits each time it runs; with deterministic kernels the difference is gone",
        "do not switch deterministic algorithms off (the trainer switches them on where they matter), or run with one thread a "
        "worker",
    ),
    Change.STOP_TIME: (
        "clock",
        "clock",
        "the result depends on the time at which the script runs; with a clock that stands still the difference is gone",
        "use a fixed seed, and decide nothing by the clock",
    ),
    Change.FIX_ENTROPY: (
        "unseeded",
        "entropy",
        "the result depends on random numbers that nobody seeded (the operating system's, or a process number)",
        "seed every generator before you use it: torch.manual_seed(...), numpy.random.seed(...), random.seed(...), "
        "default_rng(seed)",
    ),
    Change.SAME_HASH: (
        "set_order",
        "",
        "the result depends on the order of a set, on hash() or on id(): Python hashes strings differently in each process, and "
        "objects lie elsewhere; with one hash seed and the same addresses for all the difference is gone",
        "sort what comes out of a set before you use its order: sorted(set(...))",
    ),
}
"""Name, kind of the notes that show where, what it is, and advice."""


def _plainly(change: Change, pair: DifferentPair) -> Cause:
    name, kind, what, advice = _TEXTS[change]
    runs = pair.one, pair.other
    data = ", ".join(name.removeprefix("dataset.") for name in pair.every("data_state")[:5])
    facts = {
        "loaders": max((trainer.loader_workers for run in runs for trainer in run.trainers), default=0),
        "state": ", ".join(pair.every("state")[:5]),
        "data": f" ({data})" if data else "",
        "threads": " and ".join(sorted({str(record.threads) for run in runs for record in filter(None, run.records)})),
    }
    during = ("data",) if change is Change.NO_LOADER_WORKERS else ("",)
    notes = [note for note in pair.notes(kind) if note.phase.startswith(during) and (kind != "seed" or note.phase != "script")]
    return Cause(name=name, what=what.format(**facts), advice=advice, places=lines(notes))
