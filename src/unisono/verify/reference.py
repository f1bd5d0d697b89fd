"""Whether the trainer computes what a plain loop computes: the distance, what of it rounding explains, what explains the rest."""

from __future__ import annotations

import ast
import dataclasses
import linecache
from collections.abc import Mapping
from typing import Any

from unisono.verify.causes import Cause, lines
from unisono.verify.compare import Distance, distance
from unisono.verify.job import Change, Job, Variant
from unisono.verify.runs import Run, Runs, brief

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
    first = runs(exact)
    held = frozenset([Change.CONSTANT_DRAWS]) if "torch" in first.first.draws else frozenset()
    base = exact.but(*held, keep=True)
    names = (_CONSTANT,) if held else ()
    run, plain, rounding, problem = _compared(runs, base)
    if problem:
        return ReferenceResult(
            distance=Distance({}), rounding=Distance({}), beyond=(), causes=(), held=names, explained=False, problem=problem
        )
    result = ReferenceResult(
        distance=distance(run, plain),
        rounding=rounding,
        beyond=tuple(distance(run, plain).beyond(rounding)),
        causes=(),
        held=names,
        explained=True,
    )
    if any(trainer.findings.get("in_parts") for trainer in plain.trainers):
        result = dataclasses.replace(result, held=(*names, _IN_PARTS))
    seen = tuple(_seen_directly(plain))
    if not result.beyond:
        return dataclasses.replace(result, causes=seen)
    causes, explained = _explain(runs, base, run, plain)
    causes += [cause for cause in seen if cause.name not in {other.name for other in causes}]
    return dataclasses.replace(result, causes=tuple(causes), explained=explained)


def _compared(runs: Runs, base: Job) -> tuple[Run, Run, Distance, str]:
    """Trainer and plain loop, what rounding explains, and why not."""
    variants = [
        base.plain(Variant.PLAIN, inspect=True),
        base.plain(Variant.DOUBLE),
        base.plain(Variant.REVERSED),
    ]
    run, plain, double, turned = runs.all([base, *variants])
    estimates = [distance(plain, other) for other in (double, turned) if other.failure is None]
    for one, name in ((run, "the trainer"), (plain, "the reference")):
        if one.failure is not None:
            return run, plain, Distance({}), f"{name} failed: {one.failure['kind']}: {brief(one.failure['message'])}"
    if not estimates:
        return run, plain, Distance({}), "neither float64 nor another order of samples works for this model"
    return run, plain, Distance.union(estimates), ""


def _explain(runs: Runs, base: Job, run: Run, plain: Run) -> tuple[list[Cause], bool]:
    """Experiment after experiment; what cures stays, until nothing is left."""
    causes: list[Cause] = []
    scheduled = plain.notes("scheduler")
    if scheduled:
        found = _try(runs, base, Change.USER_SCHEDULES)
        causes.append(_schedule(scheduled))
        if found:
            return causes, True
        base = base.but(Change.USER_SCHEDULES)
    candidates = {
        Change.FREEZE_NORM: bool(run.trainers and any(trainer.norms for trainer in run.trainers)),
        Change.CONSTANT_PYTHON_DRAWS: bool({"random", "numpy"} & set(run.first.draws)),
        Change.RESTORE_STATE: bool(run.first.state),
        Change.FREEZE_BUFFERS: bool(run.first.buffers),
    }
    wanted = [change for change, reason in candidates.items() if reason]
    for change in wanted:
        if _try(runs, base, change):
            return [*causes, _named(change, run)], True
    if len(wanted) > 1 and _try(runs, base, *wanted):
        needed = [change for change in wanted if not _try(runs, base, *(other for other in wanted if other is not change))]
        return [*causes, *(_named(change, run) for change in needed or wanted)], True
    parts = runs(base.but(*wanted).plain(Variant.PARTS))
    cut = parts.failure is None and not distance(runs(base.but(*wanted)), parts).beyond(_compared(runs, base.but(*wanted))[2])
    if not cut:
        return causes, False
    causes += [_named(change, run) for change in wanted if change is Change.FREEZE_NORM]
    composed = _composition(plain)
    return [*causes, composed], True


def _try(runs: Runs, base: Job, *changes: Change) -> bool:
    run, plain, rounding, problem = _compared(runs, base.but(*changes))
    return not problem and not distance(run, plain).beyond(rounding)


# ---------------------------------------------------------------------- names


def _schedule(notes: list[dict[str, Any]]) -> Cause:
    return Cause(
        name="scheduler_stepped_twice",
        what="the script steps the scheduler that the trainer steps already, so the learning rate runs ahead",
        advice="leave scheduler.step() to the trainer, or do not pass the scheduler to it",
        places=lines(notes),
        experiments=(Change.USER_SCHEDULES.value,),
    )


def _named(change: Change, run: Run) -> Cause:
    record = run.first
    experiments = (change.value,)
    if change is Change.FREEZE_NORM:
        names = [name for trainer in run.trainers for name in trainer.norms]
        size = max(-(-trainer.batch_size // trainer.microbatches) for trainer in run.trainers)
        return Cause(
            name="batch_norm",
            what=f"batch normalisation ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''}) sees a microbatch of {size} "
            "samples, not the whole batch; with frozen statistics only rounding is left. The same for every number of workers",
            advice="a choice, not a fault. To come closer to the whole batch: fewer, larger microbatches (microbatches=1 is the "
            "whole batch, on one worker), GroupNorm or LayerNorm instead, or frozen statistics (module.eval())",
            experiments=experiments,
            fault=False,
        )
    if change is Change.CONSTANT_PYTHON_DRAWS:
        names = [name for name in record.draws if name != "torch"]
        return Cause(
            name="python_random_in_forward",
            what=f"the model or the loss draws from {' and '.join(names)}: once a microbatch, where a loop over whole batches "
            "draws once a batch",
            advice="decide per sample, with PyTorch's generator (torch.rand(len(x), ...)), or once a step, outside forward",
            experiments=experiments,
        )
    if change is Change.RESTORE_STATE:
        return Cause(
            name="state_between_batches",
            what=f"the model or the loss keeps state from one microbatch to the next: {', '.join(record.state[:5])}",
            advice="begin each batch from the same state, or make it a buffer",
            experiments=experiments,
        )
    return Cause(
        name="buffers",
        what=f"forward changes buffers that it uses ({', '.join(record.buffers[:5])}): each microbatch begins from the step's "
        "start and sees itself, where a whole batch sees all samples",
        advice="a choice, not a fault: the same for every number of workers. Fewer, larger microbatches come closer to the whole "
        "batch",
        experiments=experiments,
        fault=False,
    )


def _findings(inspected: Run) -> list[Mapping[str, Any]]:
    return [trainer.findings for trainer in inspected.trainers]


def _composition(inspected: Run) -> Cause:
    """Cutting the batch into microbatches is what makes the difference: why."""
    cut = (Variant.PARTS.value,)
    for found in _findings(inspected):
        if "mean" in found:
            return _mean_with_count(found["mean"])
        if "count" in found:
            samples, counts = found["count"]["samples"], found["count"]["counts"]
            return Cause(
                name="count_not_additive",
                what=f"the loss's count does not add up: {counts[0]:g} for sample {samples[0]}, {counts[1]:g} for sample "
                f"{samples[1]}, {counts[2]:g} for both together",
                advice="return the sum over the microbatch and the number of terms in it, for example (sum, number of tokens)",
                experiments=cut,
            )
        if "weights" in found:
            samples, ratio = found["weights"]["samples"], found["weights"]["ratio"]
            return Cause(
                name="mean_over_ragged_counts",
                what="the loss is a mean over something that samples have different numbers of (tokens?): sample "
                f"{samples[0]} weighs {ratio:.3g} times as much as sample {samples[1]}, but the trainer was told to count them "
                "by another measure, so what a sample weighs depends on its microbatch",
                advice='return (sum, count), for example (F.cross_entropy(..., reduction="sum"), number of tokens): the division '
                "is done once, over the whole batch",
                experiments=cut,
            )
        if "module" in found or ("coupled" in found and "padded" not in found):
            module = found.get("module")
            who = f"module {module['name']!r} ({module['kind']})" if module else "the loss"
            return Cause(
                name="samples_coupled",
                what=f"{who} lets the samples of a batch influence each other, so a microbatch is another computation than the "
                "whole batch. The same for every number of workers",
                advice="a choice, not a fault, if it is meant so: fewer, larger microbatches come closer to the whole batch",
                experiments=cut,
                fault=False,
            )
        if "padded" in found:
            return Cause(
                name="padding",
                what="samples are padded to the longest of their microbatch, and the model's result depends on the padding",
                advice="mask what is padded, or pad all samples to one length",
                experiments=cut,
            )
    return Cause(
        name="cut_into_microbatches",
        what="computing the batch in microbatches makes the difference (a plain loop that accumulates over the same microbatches "
        "agrees), but no module was found in which samples influence each other",
        advice="look at what the loss does with the batch as a whole",
        experiments=cut,
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


def _seen_directly(inspected: Run) -> list[Cause]:
    """Faults that both sides share, so that no distance shows them."""
    causes = []
    for trainer in inspected.trainers:
        found = trainer.findings
        if "mean" in found:
            causes.append(_mean_with_count(found["mean"]))
        for name, (whole, summed) in found.get("metrics", {}).items():
            causes.append(
                Cause(
                    name="metric_not_additive",
                    what=f"metric {name!r} is {whole:.6g} over the samples at once, but {summed:.6g} put together from parts: it "
                    "is a mean over something else than it is counted by",
                    advice="return (sum, count) with the number of terms of the sum, as for a loss",
                    experiments=(Variant.PARTS.value,),
                )
            )
        divided = found.get("divided")
        if divided is not None and _is_parts(divided["divisor"], trainer.call):
            causes.append(
                Cause(
                    name="loss_divided_twice",
                    what=f"the loss is divided by {divided['divisor']} = {divided['by']}, the number of microbatches; the "
                    f"trainer divides by the count already, so loss and gradient come out {divided['by']} times too small "
                    "(without this division they are that much larger)",
                    advice="return the sum and the count; nothing else is to be divided",
                    places=lines([divided]),
                    experiments=("undivided",),
                )
            )
    return causes


def _is_parts(divisor: str, call: Mapping[str, Any]) -> bool:
    """Whether a divisor that equals the number of microbatches stands for it: by its name, or because the trainer is given it."""
    if not divisor or divisor.lstrip("-").isdecimal():
        return False
    words = ("microbatch", "accum")
    return any(word in divisor.lower() for word in words) or divisor == _argument(call, "microbatches")


def _argument(call: Mapping[str, Any], name: str) -> str:
    """The expression that the script gives the trainer as argument ``name``."""
    source = "".join(linecache.getlines(call["file"]))
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return ""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and node.lineno <= call["line"] <= (node.end_lineno or node.lineno):
            for keyword in node.keywords:
                if keyword.arg == name:
                    return ast.unparse(keyword.value)
    return ""
