"""What makes a difference, found by experiment: the same two runs again, with one thing changed in both. If they are equal now,
that thing has to do with it.

An experiment is made only if what it changes was *seen* in the runs: nobody looks for a clock in a script that reads none.
Several may cure one difference (a dropout mask seeded with the rank goes away with the rank, with the seeding and with
dropout): the most specific one names the cause, the others say more about it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from unisono.verify.compare import Difference, first_difference, settings_difference
from unisono.verify.job import Change
from unisono.verify.runs import Run, Runs

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
    Change.SAME_MEMORY,
    Change.HIDE_RANK,
    Change.FREEZE_BUFFERS,
    Change.CONSTANT_DRAWS,
)
"""Most specific first."""


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
class Search:
    """Everything that was tried for one difference."""

    causes: tuple[Cause, ...]
    changes: frozenset[Change]
    """Under these the difference is gone."""
    tried: tuple[str, ...]
    """Changes that did not help."""


def search(runs: Runs, one: Run, other: Run, difference: Difference) -> Search:
    """*local*. The causes of a difference between two runs: one after the other, until nothing differs any more."""
    causes: list[Cause] = []
    base: frozenset[Change] = frozenset()
    tried: list[str] = []
    while len(causes) < 4:
        found = _one_cause(runs, one, other, difference, base, tried)
        if found is None:
            return Search(tuple(causes), frozenset(), tuple(tried))
        cause, changes = found
        causes.append(cause)
        base |= changes
        one, other = runs.all([dataclasses.replace(run.job, changes=run.job.changes | base) for run in (one, other)])
        remaining = first_difference(one, other)
        if remaining is None:
            return Search(tuple(causes), base, tuple(tried))
        difference = remaining
    return Search(tuple(causes), frozenset(), tuple(tried))


def _one_cause(
    runs: Runs, one: Run, other: Run, difference: Difference, base: frozenset[Change], tried: list[str]
) -> tuple[Cause, frozenset[Change]] | None:
    candidates = [change for change in applicable(one, other, difference) if change not in base]
    cures = _cures(runs, one, other, difference, [frozenset([change]) for change in candidates])
    if not cures:
        late = [change for change in _late(one, other) if change not in base and change not in candidates]
        cures = _cures(runs, one, other, difference, [frozenset([change]) for change in late])
        candidates += late
    if not cures and len(candidates) > 1:
        cures = _combination(runs, one, other, difference, frozenset(candidates))
    cured = {change for group in cures for change in group}
    tried += [change.value for change in candidates if change not in cured and change.value not in tried]
    if not cures:
        return None
    if len(cures) == 1 and len(cures[0]) > 1:  # only together
        names = [name_cause(runs, change, set(cures[0]), one, other, difference) for change in SPECIFIC if change in cures[0]]
        return dataclasses.replace(names[0], what="; and ".join(cause.what for cause in names)), cures[0]
    first = next(change for change in SPECIFIC if change in cured)
    return name_cause(runs, first, cured, one, other, difference), frozenset([first])


def _cures(
    runs: Runs, one: Run, other: Run, difference: Difference, groups: Sequence[frozenset[Change]]
) -> list[frozenset[Change]]:
    """Those changes under which the two runs are equal up to where they first differed."""
    events = difference.event or one.job.events
    jobs = [
        dataclasses.replace(run.job, changes=run.job.changes | group, events=events, keep=False)
        for group in groups
        for run in (one, other)
    ]
    made = runs.all(jobs)
    return [
        group
        for group, left, right in zip(groups, made[::2], made[1::2], strict=True)
        if first_difference(left, right) is None and left.failure is None
    ]


def _combination(runs: Runs, one: Run, other: Run, difference: Difference, changes: frozenset[Change]) -> list[frozenset[Change]]:
    """The fewest changes that together make the difference go away, if all of them do."""
    if not _cures(runs, one, other, difference, [changes]):
        return []
    for change in reversed(SPECIFIC):
        if change in changes and len(changes) > 1 and _cures(runs, one, other, difference, [changes - {change}]):
            changes -= {change}
    return [changes]


def applicable(one: Run, other: Run, difference: Difference) -> list[Change]:
    """The experiments for which the runs give a reason."""
    made = (one, other)

    def seen(test: Callable[[Run], Any]) -> bool:
        return any(test(run) for run in made)

    def noted(kind: str, phase: Callable[[str], bool] = lambda _: True) -> bool:
        return seen(lambda run: any(phase(note["phase"]) for note in run.notes(kind)))

    parallel = one.job.workers != other.job.workers
    reasons = {
        Change.HOLD_SETTINGS: parallel and [t.settings for t in one.trainers] != [t.settings for t in other.trainers],
        Change.NO_CALLBACKS: seen(lambda run: any(trainer.callbacks for trainer in run.trainers)),
        Change.NO_LOADER_WORKERS: seen(lambda run: any(trainer.loader_workers for trainer in run.trainers)),
        Change.RESTORE_STATE: seen(lambda run: run.every("state")),
        Change.FRESH_DATA: difference.stage == "data" or seen(lambda run: run.every("data_state")),
        Change.IGNORE_SEEDS: noted("seed", lambda phase: phase != "script"),
        Change.HOLD_THREADS: noted("threads"),
        Change.DETERMINISTIC: noted("deterministic") or one.job.threads > 1,
        Change.STOP_TIME: noted("clock") and not (parallel and difference.stage == "settings"),
        Change.FIX_ENTROPY: noted("entropy") and not parallel,
        Change.HIDE_RANK: noted("rank"),
        Change.FREEZE_BUFFERS: seen(lambda run: run.every("buffers")) and difference.stage not in ("data", "settings"),
        Change.CONSTANT_DRAWS: seen(lambda run: "torch" in run.every("draws")) and difference.stage == "loss",
    }
    return [change for change in SPECIFIC if reasons.get(change)]


def _late(one: Run, other: Run) -> list[Change]:
    """What leaves no trace that could be seen, or hardly ever matters: tried if nothing else has helped."""
    return [
        Change.SAME_HASH,
        Change.SAME_MEMORY,
        Change.FIX_ENTROPY,
        *([Change.STOP_TIME] if one.notes("clock") or other.notes("clock") else []),
    ]


# ---------------------------------------------------------------------- names


def name_cause(runs: Runs, change: Change, cured: set[Change], one: Run, other: Run, difference: Difference) -> Cause:
    """The cause in words, once ``change`` is known to be the most specific one of those that cured."""
    if change is Change.FRESH_DATA:  # what reading changes is seen where each sample is read on its own
        under = dataclasses.replace(
            one.job, changes=one.job.changes | {change}, events=difference.event or one.job.events, keep=False
        )
        one = runs(under)
    cause = _NAMERS[change](one, other, difference)
    if Change.HIDE_RANK in cured and change is not Change.HIDE_RANK:
        looks = rank_places(one, other, difference)
        cause = dataclasses.replace(
            cause,
            what=f"{cause.what}; it depends on the worker's rank or on how many there are",
            places=(*cause.places, *(place for place in looks if place not in cause.places)),
        )
    if Change.CONSTANT_DRAWS in cured and change is not Change.CONSTANT_DRAWS:
        cause = dataclasses.replace(cause, what=f"{cause.what}; it acts through random draws in forward (dropout, noise)")
    if Change.FREEZE_BUFFERS in cured and change is not Change.FREEZE_BUFFERS and difference.tensor is not None:
        names = ", ".join(dict.fromkeys([*one.every("buffers"), *other.every("buffers")]))
        cause = dataclasses.replace(cause, what=f"{cause.what}; it acts through what forward does to buffers ({names})")
    return dataclasses.replace(cause, experiments=tuple(each.value for each in SPECIFIC if each in cured))


def lines(notes: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    """Places in the user's code: "train.py:31  torch.manual_seed(rank)"."""
    return tuple(dict.fromkeys(f"{note['file']}:{note['line']}  {note['code']}" for note in notes if note["file"]))


def _notes(one: Run, other: Run, kind: str) -> list[dict[str, Any]]:
    found = one.notes(kind)
    return found + [note for note in other.notes(kind) if note not in found]


def rank_places(one: Run, other: Run, difference: Difference) -> tuple[str, ...]:
    """Where the script looks at the rank: where it does in the phase that first went wrong, or anywhere."""
    notes = _notes(one, other, "rank")
    phases = {"data": ("data",), "loss": ("loss",), "callback": ("callback",), "start": ("between",), "settings": ("script",)}
    near = [note for note in notes if note["phase"].startswith(phases.get(difference.stage, ()))]
    return lines(near or notes)


def _settings(one: Run, other: Run, difference: Difference) -> Cause:
    found = next(
        settings_difference(a.settings, b.settings)
        for a, b in zip(one.trainers, other.trainers, strict=False)
        if a.settings != b.settings
    )
    return Cause(
        name="settings_by_workers",
        what=f"the optimizer's settings depend on the number of workers: {found} with {one.job.workers} and "
        f"{other.job.workers} of them",
        advice="take the settings that you would use on one device: the global batch is the same for every number of workers",
    )


def _callbacks(one: Run, other: Run, difference: Difference) -> Cause:
    edits: dict[str, set[str]] = {}
    ranks: dict[str, set[int]] = {}
    for record in (record for record in other.records if record is not None):
        for trainer in record.trainers:
            for step in trainer.steps:
                for callback, tensors in step.edited.items():
                    edits.setdefault(callback, set()).update(tensors)
                    ranks.setdefault(callback, set()).add(record.rank)
    everybody = set(range(other.job.workers))
    told = [
        f"{callback} changes {', '.join(sorted(tensors)[:3])}"
        + (f" on worker {', '.join(map(str, sorted(ranks[callback])))} only" if ranks[callback] != everybody else "")
        for callback, tensors in edits.items()
    ]
    talk = lines([note for note in _notes(one, other, "talk") if note["phase"].startswith("callback")])
    names = ", ".join(dict.fromkeys(name for trainer in one.trainers for name in trainer.callbacks))
    only = any(seen != everybody for seen in ranks.values())
    return Cause(
        name="callback_on_some_workers" if only else "callback",
        what=f"a callback ({names}) makes the difference" + (f": {'; '.join(told)}" if told else ""),
        advice="a callback that changes the model or the optimizer must do the same on every worker, from numbers that are "
        "the same there (those of the StepResult, or of trainer.evaluate)",
        places=talk,
    )


def _loader(one: Run, other: Run, difference: Difference) -> Cause:
    count = max(trainer.loader_workers for trainer in one.trainers + other.trainers)
    return Cause(
        name="loader_worker",
        what=f"a sample depends on which of the {count} loader processes reads it (with num_workers=0 the difference is gone)",
        advice="draw from torch, numpy.random or random as they are: they are seeded for each sample. Do not seed by "
        "get_worker_info(), and keep no generator in the dataset",
        places=lines([note for note in _notes(one, other, "seed") if note["phase"] == "data"]),
    )


def _state(one: Run, other: Run, difference: Difference) -> Cause:
    names = list(dict.fromkeys([*one.every("state"), *other.every("state")]))
    return Cause(
        name="state_between_batches",
        what=f"the model or the loss keeps state from one microbatch to the next, so the result depends on their order and on "
        f"which worker computes which: {', '.join(names[:5])}",
        advice="begin each batch from the same state (reset it at the beginning of forward), or make it a buffer, which is "
        "averaged over microbatches",
    )


def _data(one: Run, other: Run, difference: Difference) -> Cause:
    names = [name.removeprefix("dataset.") for name in dict.fromkeys([*one.every("data_state"), *other.every("data_state")])]
    return Cause(
        name="dataset_keeps_state",
        what="a sample depends on what was read before it: reading changes the dataset"
        + (f" ({', '.join(names[:5])})" if names else ""),
        advice="make __getitem__ a function of the index alone; for augmentation draw from torch, numpy.random or random "
        "themselves, which are seeded for each sample, not from a generator that the dataset keeps",
    )


def _seeds(one: Run, other: Run, difference: Difference) -> Cause:
    notes = [note for note in _notes(one, other, "seed") if note["phase"] != "script"]
    return Cause(
        name="own_seeding",
        what="the script seeds random generators itself during training, over the seeds by which each microbatch gets its own",
        advice="leave seeding to the trainer (seed=...): it seeds each sample and each microbatch, the same for any number of "
        "workers",
        places=lines(notes),
    )


def _threads(one: Run, other: Run, difference: Difference) -> Cause:
    counts = sorted({record.threads for run in (one, other) for record in run.records if record is not None})
    return Cause(
        name="thread_count",
        what=f"the script changes the number of threads ({' and '.join(map(str, counts))} at the end), and kernels sum in "
        "another order with another number",
        advice="leave threads to the launcher (unisono run --threads T): the same number for every worker and every run",
        places=lines(_notes(one, other, "threads")),
    )


def _kernels(one: Run, other: Run, difference: Difference) -> Cause:
    return Cause(
        name="nondeterministic_kernel",
        what="a kernel gives other bits each time it runs; with deterministic kernels the difference is gone",
        advice="do not switch deterministic algorithms off (the trainer switches them on where they matter), or run with one "
        "thread a worker",
        places=lines(_notes(one, other, "deterministic")),
    )


def _clock(one: Run, other: Run, difference: Difference) -> Cause:
    return Cause(
        name="clock",
        what="the result depends on the time at which the script runs; with a clock that stands still the difference is gone",
        advice="use a fixed seed, and decide nothing by the clock",
        places=lines(_notes(one, other, "clock")),
    )


def _entropy(one: Run, other: Run, difference: Difference) -> Cause:
    return Cause(
        name="unseeded",
        what="the result depends on random numbers that nobody seeded (the operating system's, or a process number)",
        advice="seed every generator before you use it: torch.manual_seed(...), numpy.random.seed(...), random.seed(...), "
        "default_rng(seed)",
        places=lines(_notes(one, other, "entropy")),
    )


def _hash(one: Run, other: Run, difference: Difference) -> Cause:
    return Cause(
        name="set_order",
        what="the result depends on the order of a set (or on hash()): Python hashes strings differently in each process; with "
        "one hash seed for all the difference is gone",
        advice="sort what comes out of a set before you use its order: sorted(set(...))",
    )


def _memory(one: Run, other: Run, difference: Difference) -> Cause:
    return Cause(
        name="object_order",
        what="the result depends on where objects lie in memory: the order of a set of objects, or id()",
        advice="order by something that the program defines, not by set order or id()",
    )


def _rank(one: Run, other: Run, difference: Difference) -> Cause:
    inside = {"loss": "the model or the loss does", "data": "reading data does", "callback": "a callback does"}
    who = inside.get(difference.stage, "the script does")
    writers: dict[str, list[int]] = {}
    for record in other.records:
        for name in record.buffers if record is not None else ():
            writers.setdefault(name, []).append(record.rank if record is not None else 0)
    partly = [f"buffer {name!r} is written by worker {ranks[0]} only" for name, ranks in writers.items() if len(ranks) == 1]
    more = f": {', '.join(partly[:3])}" if partly and other.job.workers > 1 else ""
    return Cause(
        name="buffer_on_some_workers" if more else "rank_dependent",
        what=f"{who} something that depends on the worker's rank or on how many there are{more}",
        advice="compute the same on every worker; only what is written or shown may depend on the rank",
        places=rank_places(one, other, difference),
    )


def _buffers(one: Run, other: Run, difference: Difference) -> Cause:
    names = list(dict.fromkeys([*one.every("buffers"), *other.every("buffers")]))
    return Cause(
        name="buffers",
        what=f"what forward does to buffers differs: {', '.join(names[:5])}",
        advice="change a buffer in forward by what the microbatch says, alike on every worker",
    )


def _draws(one: Run, other: Run, difference: Difference) -> Cause:
    return Cause(
        name="random_draws",
        what="random draws in forward differ (dropout, noise); with constant draws the difference is gone",
        advice="draw from PyTorch's default generator, which is seeded for each microbatch",
    )


_NAMERS: dict[Change, Callable[[Run, Run, Difference], Cause]] = {
    Change.HOLD_SETTINGS: _settings,
    Change.NO_CALLBACKS: _callbacks,
    Change.NO_LOADER_WORKERS: _loader,
    Change.RESTORE_STATE: _state,
    Change.FRESH_DATA: _data,
    Change.IGNORE_SEEDS: _seeds,
    Change.HOLD_THREADS: _threads,
    Change.DETERMINISTIC: _kernels,
    Change.STOP_TIME: _clock,
    Change.FIX_ENTROPY: _entropy,
    Change.SAME_HASH: _hash,
    Change.SAME_MEMORY: _memory,
    Change.HIDE_RANK: _rank,
    Change.FREEZE_BUFFERS: _buffers,
    Change.CONSTANT_DRAWS: _draws,
}
