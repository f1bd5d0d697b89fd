"""Whether the trainer computes what a plain loop computes: the distance, what of it rounding explains, what explains the rest."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from unisono.verify.causes import Cause, lines
from unisono.verify.compare import Distance, distance
from unisono.verify.job import Change, Job, Variant
from unisono.verify.record import Note
from unisono.verify.runs import RunOutcome, Runs, brief

_CONSTANT = (
    "PyTorch's random draws in forward are constants on both sides: dropout masks are drawn for each microbatch, so a plain loop "
    "has others"
)
_IN_PARTS = (
    "the reference, too, computes microbatches and accumulates: they are collated at random and padded to other lengths, so no "
    "whole batch can be made of them"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReferenceResult:
    """The trainer on one worker beside the plain loop."""

    distance: Distance
    """Between the two."""
    rounding: Distance
    """What rounding explains: the plain loop against itself in float64 and with each batch's samples the other way round."""
    beyond: tuple[str, ...]
    """What is farther apart than that."""
    causes: tuple[Cause, ...]
    held: tuple[str, ...]
    """What was held constant on both sides to compare at all."""
    explained: bool
    """Whether nothing is left to explain: equal but for rounding, or under the experiments that name the causes."""
    problem: str = ""
    """Why it could not be compared."""


def examine(runs: Runs, exact: Job) -> ReferenceResult:
    """*local*. Compares, and explains by experiment.

    Args:
        exact: The job of one worker, with what must be held for it to repeat itself.
    """
    draws = "torch" in runs(exact).first.draws
    base = exact.but(*([Change.CONSTANT_DRAWS] if draws else []), keep=True)
    compared = _compare(runs, base)
    plain = compared.plain
    in_parts = any(trainer.findings.get("in_parts") for trainer in plain.trainers)
    result = ReferenceResult(
        distance=compared.distance,
        rounding=compared.rounding,
        beyond=tuple(compared.beyond),
        causes=(),
        held=(*[_CONSTANT] * draws, *[_IN_PARTS] * in_parts),
        explained=not compared.problem,
        problem=compared.problem,
    )
    if compared.problem:
        return result
    causes: list[Cause] = []
    explained = True
    if compared.beyond:
        causes, explained = _explain(runs, base, compared.run, plain)
    known = {cause.name for cause in causes}
    causes += [cause for cause in _seen_directly(plain) if cause.name not in known]
    return dataclasses.replace(result, causes=tuple(causes), explained=explained)


@dataclasses.dataclass(frozen=True)
class _Compared:
    run: RunOutcome
    plain: RunOutcome
    distance: Distance
    rounding: Distance
    """What rounding explains."""
    problem: str

    @property
    def beyond(self) -> list[str]:
        return self.distance.beyond(self.rounding)

    @property
    def agrees(self) -> bool:
        return not self.problem and not self.beyond


def _compare(runs: Runs, base: Job, variant: Variant = Variant.PLAIN) -> _Compared:
    """Trainer and plain loop, what rounding explains, and why not."""
    jobs = [base, base.plain(variant), base.plain(Variant.DOUBLE), base.plain(Variant.REVERSED)]
    run, plain, *others = runs.all(jobs)
    whole = plain if variant is Variant.PLAIN else runs(base.plain(Variant.PLAIN))
    estimates = [distance(whole, other) for other in others if other.failure is None]
    problem = "" if estimates else "neither float64 nor another order of samples works for this model"
    for one, name in ((plain, "the reference"), (run, "the trainer")):
        if one.failure is not None:
            problem = f"{name} failed: {one.failure.kind}: {brief(one.failure.message)}"
    if problem:
        return _Compared(run, plain, Distance({}), Distance({}), problem)
    return _Compared(run, plain, distance(run, plain), Distance.union(estimates), "")


def _explain(runs: Runs, base: Job, run: RunOutcome, plain: RunOutcome) -> tuple[list[Cause], bool]:
    """Experiment after experiment; what cures stays, until nothing is left."""
    causes: list[Cause] = []
    if scheduled := plain.notes("scheduler"):
        causes.append(_schedule(scheduled))
        base = base.but(Change.USER_SCHEDULES)
        if _compare(runs, base).agrees:
            return causes, True
    candidates = {
        Change.FREEZE_NORM: any(trainer.norms for trainer in run.trainers),
        Change.CONSTANT_PYTHON_DRAWS: {"random", "numpy"} & set(run.first.draws),
        Change.RESTORE_STATE: run.first.state,
        Change.FREEZE_BUFFERS: run.first.buffers,
    }
    wanted = [change for change, reason in candidates.items() if reason]
    for change in wanted:
        if _compare(runs, base.but(change)).agrees:
            return [*causes, _named(change, run)], True
    together = base.but(*wanted)
    if len(wanted) > 1 and _compare(runs, together).agrees:
        rest = {change: [other for other in wanted if other is not change] for change in wanted}
        needed = [change for change in wanted if not _compare(runs, base.but(*rest[change])).agrees]
        return [*causes, *(_named(change, run) for change in needed or wanted)], True
    if not _compare(runs, together, Variant.PARTS).agrees:
        return causes, False
    if Change.FREEZE_NORM in wanted:
        causes.append(_named(Change.FREEZE_NORM, run))
    return [*causes, _composition(plain)], True


# ---------------------------------------------------------------------- names


def _schedule(notes: list[Note]) -> Cause:
    return Cause(
        name="scheduler_stepped_twice",
        what="the script steps the scheduler that the trainer steps already, so the learning rate runs ahead",
        advice="leave scheduler.step() to the trainer, or do not pass the scheduler to it",
        places=lines(notes),
        experiments=(Change.USER_SCHEDULES.value,),
    )


def _named(change: Change, run: RunOutcome) -> Cause:
    name, fault, what, advice = _TEXTS[change]
    norms = [name for trainer in run.trainers for name in trainer.norms]
    facts = {
        "norms": ", ".join([*norms[:3], *["..."] * (len(norms) > 3)]),
        "size": max(-(-trainer.batch_size // trainer.microbatches) for trainer in run.trainers),
        "draws": " and ".join(name for name in run.first.draws if name != "torch"),
        "state": ", ".join(run.first.state[:5]),
        "buffers": ", ".join(run.first.buffers[:5]),
    }
    return Cause(name=name, what=what.format(**facts), advice=advice, experiments=(change.value,), fault=fault)


_TEXTS: dict[Change, tuple[str, bool, str, str]] = {
    Change.FREEZE_NORM: (
        "batch_norm",
        False,
        "batch normalisation ({norms}) sees a microbatch of {size} samples, not the whole batch; with frozen statistics only "
        "rounding is left. The same for every number of workers",
        "a choice, not a fault. To come closer to the whole batch: fewer, larger microbatches (microbatches=1 is the whole "
        "batch, on one worker), GroupNorm or LayerNorm instead, or frozen statistics (module.eval())",
    ),
    Change.CONSTANT_PYTHON_DRAWS: (
        "python_random_in_forward",
        True,
        "the model or the loss draws from {draws}: once a microbatch, where a loop over whole batches draws once a batch",
        "decide per sample, with PyTorch's generator (torch.rand(len(x), ...)), or once a step, outside forward",
    ),
    Change.RESTORE_STATE: (
        "state_between_batches",
        True,
        "the model or the loss keeps state from one microbatch to the next: {state}",
        "begin each batch from the same state, or make it a buffer",
    ),
    Change.FREEZE_BUFFERS: (
        "buffers",
        False,
        "forward changes buffers that it uses ({buffers}): each microbatch begins from the step's start and sees itself, where a "
        "whole batch sees all samples",
        "a choice, not a fault: the same for every number of workers. Fewer, larger microbatches come closer to the whole batch",
    ),
}
"""Name, whether it is a fault, what it is, and advice."""
_CUT: dict[str, tuple[str, bool, str, str]] = {
    "count": (
        "count_not_additive",
        True,
        "the loss's count does not add up: {counts[0]:g} for sample {samples[0]}, {counts[1]:g} for sample {samples[1]}, "
        "{counts[2]:g} for both together",
        "return the sum over the microbatch and the number of terms in it, for example (sum, number of tokens)",
    ),
    "weights": (
        "mean_over_ragged_counts",
        True,
        "the loss is a mean over something that samples have different numbers of (tokens?): sample {samples[0]} weighs "
        "{ratio:.3g} times as much as sample {samples[1]}, but the trainer was told to count them by another measure, so what a "
        "sample weighs depends on its microbatch",
        'return (sum, count), for example (F.cross_entropy(..., reduction="sum"), number of tokens): the division is done once, '
        "over the whole batch",
    ),
    "coupled": (
        "samples_coupled",
        False,
        "the loss lets the samples of a batch influence each other (negatives within the batch?), so a microbatch is another "
        "computation than the whole batch. The same for every number of workers",
        "if it is to see the whole batch, as contrastive losses are, give the Trainer unisono.WholeBatchLoss(embed, loss), which "
        "does so in the memory of a microbatch. Else a choice, not a fault: fewer, larger microbatches come closer to the whole "
        "batch",
    ),
    "padded": (
        "padding",
        True,
        "samples are padded to the longest of their microbatch, and the model's result depends on the padding",
        "mask what is padded, or pad all samples to one length",
    ),
    "": (
        "cut_into_microbatches",
        True,
        "computing the batch in microbatches makes the difference (a plain loop that accumulates over the same microbatches "
        "agrees), but no samples were found that influence each other",
        "look at what the loss does with the batch as a whole",
    ),
}
"""The same, by what an inspection of the loss has found."""


def _composition(inspected: RunOutcome) -> Cause:
    """Cutting the batch into microbatches is what makes the difference: why."""
    found = {key: value for trainer in reversed(inspected.trainers) for key, value in trainer.findings.items()}
    if "mean" in found:
        return _mean_with_count(found["mean"])
    key = next((key for key in _CUT if key in found), "")
    name, fault, what, advice = _CUT[key]
    return Cause(
        name=name, what=what.format(**found.get(key, {})), advice=advice, experiments=(Variant.PARTS.value,), fault=fault
    )


def _mean_with_count(found: Mapping[str, Any]) -> Cause:
    (one, two), counts = found["values"], found["counts"]
    return Cause(
        name="mean_with_count",
        what=f"the loss returns a mean together with a count: {one:.6g} and {counts[0]:g} for sample {found['sample']}, "
        f"{two:.6g} and {counts[1]:g} for the same sample twice. It is divided by the count once more, so loss and gradient come "
        "out as many times too small as a microbatch has samples",
        advice='return the sum and the count, for example (F.cross_entropy(..., reduction="sum"), len(labels)), or only the mean',
        experiments=("repeated",),
    )


def _seen_directly(inspected: RunOutcome) -> Iterator[Cause]:
    """Faults that both sides share, so that no distance shows them."""
    for found in (trainer.findings for trainer in inspected.trainers):
        if "mean" in found:
            yield _mean_with_count(found["mean"])
        for name, (whole, summed) in found.get("metrics", {}).items():
            yield Cause(
                name="metric_not_additive",
                what=f"metric {name!r} is {whole:.6g} over the samples at once, but {summed:.6g} put together from parts: it "
                "is a mean over something else than it is counted by",
                advice="return (sum, count) with the number of terms of the sum, as for a loss",
                experiments=(Variant.PARTS.value,),
            )
        divided = found.get("divided")
        # Another number may happen to equal the number of microbatches: the divisor's name tells what it stands for.
        if divided is not None and any(word in divided["divisor"].lower() for word in ("microbatch", "accum")):
            yield Cause(
                name="loss_divided_twice",
                what=f"the loss is divided by {divided['divisor']} = {divided['by']}, the number of microbatches; the "
                f"trainer divides by the count already, so loss and gradient come out {divided['by']} times too small "
                "(without this division they are that much larger)",
                advice="return the sum and the count; nothing else is to be divided",
                places=lines([divided["where"]]),
                experiments=("undivided",),
            )
