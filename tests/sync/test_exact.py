"""The exact reduction, against a tree sum written down naively: bit for bit, for every number of workers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import TensorDataset

from unisono import Batch, ConfigurationError, Exact, Trainer
from unisono.assignment import assignment
from unisono.collective import Collective
from unisono.layout import Layout
from unisono.replica.parameters import layout_of
from unisono.sync import Reduction, finish
from unisono.testing import run_threads
from unisono.tree import pieces

SHAPES = {"odd": (10, 100), "scalar": (), "row": (37,), "wide": (33, 65), "tiny": (1,), "float64": (5, 7), "empty": (0, 3)}
DOUBLES = {"float64"}
EVERYWHERE = [(microbatches, workers) for microbatches in (1, 2, 6, 7, 8) for workers in range(1, microbatches + 1)]

Gradients = list[dict[str, Tensor]]
"""For each microbatch, the gradients of the parameters that have one."""


class Parameters(nn.Module):
    """Parameters whose gradient a test chooses: the loss is their product with it."""

    def __init__(self) -> None:
        super().__init__()
        for name, shape in SHAPES.items():
            self.register_parameter(name, nn.Parameter(torch.ones(shape, dtype=dtype_of(name))))

    def backward(self, layout: Layout, gradients: dict[str, Tensor]) -> list[Tensor | None]:
        """What a replica would give to the reduction, by slot."""
        named = dict(self.named_parameters())
        if gradients:
            torch.stack([(named[name] * gradient).sum().double() for name, gradient in gradients.items()]).sum().backward()
        found = [named[name].grad for name in layout.names]
        for parameter in named.values():
            parameter.grad = None
        return found


NOTHING = torch.empty(0, dtype=torch.float64)


def exchanged(reduction: Reduction, workers: int) -> None:
    """Sends the pieces, and checks the notes that went along."""
    reduction.launch(b"header", NOTHING, [0] * workers)
    for header, message in reduction.notes():
        assert header[:6] == b"header"
        assert message.numel() == 0
    assert not reduction.must_repeat


def give(reduction: Reduction, microbatch: int, gradients: list[Tensor | None]) -> None:
    """Some of the gradients early, from the last layer to the first, if they are wanted so."""
    if reduction.takes_early(microbatch):
        for slot in reversed(range(len(gradients))):
            gradient, gradients[slot] = gradients[slot], None
            if gradient is not None:
                reduction.early(slot, gradient)
    reduction.add(microbatch, gradients)


def dtype_of(name: str) -> torch.dtype:
    return torch.float64 if name in DOUBLES else torch.float32


def drawn(microbatches: int, seed: int) -> Gradients:
    """Gradients of very different sizes, zeros of both signs among them; a third of all are absent, microbatch by microbatch."""
    generator = torch.Generator().manual_seed(seed)
    found: Gradients = []
    for _ in range(microbatches):
        gradients: dict[str, Tensor] = {}
        for name, shape in SHAPES.items():
            value = torch.randn(shape, generator=generator, dtype=torch.float64) * 10 ** torch.randn((), generator=generator)
            value = torch.where(torch.rand(shape, generator=generator) < 0.2, -0.0, value)
            if torch.rand((), generator=generator) < 0.67:
                gradients[name] = value.to(dtype_of(name))
        found.append(gradients)
    return found


def tree_sum(values: Sequence[Tensor | None]) -> Tensor | None:
    """By the definition of the tree; an absent microbatch adds nothing, not even a zero."""
    if len(values) == 1:
        return values[0]
    split = 1
    while split * 2 < len(values):
        split *= 2
    left, right = tree_sum(values[:split]), tree_sum(values[split:])
    return (left if right is None else right) if left is None or right is None else left + right


def wanted(gradients: Gradients, filled: int) -> dict[str, Tensor]:
    padded: Gradients = [*gradients[:filled], *({} for _ in gradients[filled:])]
    sums = {name: tree_sum([microbatch.get(name) for microbatch in padded]) for name in SHAPES}
    return {name: value for name, value in sums.items() if value is not None}


def bits(value: Tensor) -> bytes:
    return value.detach().contiguous().numpy().tobytes()


def reduced(
    workers: int,
    steps: Sequence[tuple[Gradients, int]],
    *,
    bucket_mib: float = 25.0,
    overlap: bool = False,
    replicated: bool = False,
    per_host: int = 0,
) -> list[dict[str, Tensor]]:
    """What those who update get in each of several steps ``(gradients, filled)``: each parameter one worker, or all of them.

    Args:
        per_host: The number of hosts, each of which updates everything; 0: all workers do so among them.
    """
    settings = Exact(bucket_mib=bucket_mib, replicate_kib=256 if replicated else 0, overlap=overlap)

    def work(collective: Collective) -> list[tuple[dict[str, Tensor], set[str]]]:
        model = Parameters()
        layout = layout_of(list(model.named_parameters()))
        reduction = settings.bind(layout, collective, len(steps[0][0]), per_host=per_host > 0)
        assert reduction.replicates == (replicated or workers == per_host)
        lo, hi = reduction.ranges[collective.rank]
        results = []
        for gradients, filled in steps:
            reduction.begin(filled)
            present: set[str] = set()
            for microbatch in range(lo, min(hi, filled)):
                present |= set(gradients[microbatch])
                give(reduction, microbatch, model.backward(layout, gradients[microbatch]))
            exchanged(reduction, workers)
            found = reduction.finish(1.0)
            sums = {slot.name: value.clone() for slot, value in zip(found.slots, found.gradients, strict=True)}
            collective.barrier()
            results.append((sums, present))
        return results

    everybodys = run_threads(workers, work)
    merged: list[dict[str, Tensor]] = []
    for number in range(len(steps)):
        present = set().union(*(results[number][1] for results in everybodys))
        owned = [name for results in everybodys for name in results[number][0]]
        assert set(owned) >= present - {"empty"}, "every parameter that has a gradient, and holds anything, has an owner"
        holders = workers if replicated else per_host or 1
        assert len(owned) == len(set(owned)) * holders, "one alone, or one on each host, or every worker"
        for name in set(owned) & present:
            assert len({bits(results[number][0][name]) for results in everybodys if name in results[number][0]}) == 1
        merged.append({name: value for results in everybodys for name, value in results[number][0].items() if name in present})
    return merged


def assert_same_bits(found: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert set(found) | {"empty"} == set(right) | {"empty"}
    assert [name for name, value in found.items() if name != "empty" and bits(value) != bits(right[name])] == []


# ---- sums ----


@pytest.fixture(params=[64, None], ids=["in stretches", "in one go"])
def stretches(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With stretches of 64 elements, most of these small parameters are large ones: kept, and finished bit by bit."""
    if request.param:
        monkeypatch.setattr(finish, "_STRETCH", request.param)


@pytest.mark.usefixtures("stretches")
@pytest.mark.parametrize("replicated", [False, True])
@pytest.mark.parametrize(("microbatches", "workers"), EVERYWHERE)
def test_the_reduction_is_the_naive_tree_sum_in_full_and_short_batches(microbatches: int, workers: int, replicated: bool) -> None:
    steps = [(drawn(microbatches, seed=filled), filled) for filled in [*range(microbatches, 0, -1), microbatches]]

    for found, (gradients, filled) in zip(reduced(workers, steps, replicated=replicated), steps, strict=True):
        assert_same_bits(found, wanted(gradients, filled))


@pytest.mark.usefixtures("stretches")
@pytest.mark.parametrize("replicated", [False, True])
@pytest.mark.parametrize("bucket_mib", [1e-6, 0.004, 25.0])
@pytest.mark.parametrize(("microbatches", "workers"), [(8, 1), (8, 3), (8, 8), (7, 4), (6, 2), (1, 1)])
def test_gradients_that_leave_during_backward_have_the_same_sum(
    microbatches: int, workers: int, bucket_mib: float, replicated: bool
) -> None:
    steps = [(drawn(microbatches, seed=filled), filled) for filled in range(microbatches, 0, -1)]

    for found, (gradients, filled) in zip(
        reduced(workers, steps, bucket_mib=bucket_mib, overlap=True, replicated=replicated), steps, strict=True
    ):
        assert_same_bits(found, wanted(gradients, filled))


@pytest.mark.parametrize("workers", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("microbatch", range(8))
def test_a_gradient_that_one_microbatch_alone_has_keeps_its_bits(microbatch: int, workers: int) -> None:
    gradients: Gradients = [{} for _ in range(8)]
    gradients[microbatch] = {"row": torch.full((37,), -0.0)}

    (found,) = reduced(workers, [(gradients, 8)])

    assert list(found) == ["row"]
    assert bits(found["row"]) == bits(torch.full((37,), -0.0))


@pytest.mark.usefixtures("stretches")
@pytest.mark.parametrize("replicated", [False, True])
@pytest.mark.parametrize("workers", [1, 3])
def test_a_gradient_of_the_step_before_leaves_no_trace(workers: int, replicated: bool) -> None:
    nan = {name: torch.full(shape, torch.nan, dtype=dtype_of(name)) for name, shape in SHAPES.items()}
    steps = [([nan] * 6, 6), (drawn(6, seed=1), 5), ([nan] * 6, 3), (drawn(6, seed=2), 6)]

    found = reduced(workers, steps, replicated=replicated)

    assert_same_bits(found[1], wanted(*steps[1]))
    assert_same_bits(found[3], wanted(*steps[3]))


def test_the_order_of_summation_shows_in_the_bits() -> None:
    """Else the tests above would prove nothing."""
    values = [gradients["odd"] for gradients in drawn(40, seed=0) if "odd" in gradients][:8]
    one_after_the_other = values[0]
    for value in values[1:]:
        one_after_the_other = one_after_the_other + value
    tree = tree_sum(values)

    assert tree is not None
    assert bits(one_after_the_other) != bits(tree)


def test_bucket_size_must_be_positive() -> None:
    with pytest.raises(ConfigurationError, match="bucket_mib must be positive, got 0"):
        Exact(bucket_mib=0)


# ---- whole steps ----


def trained(
    workers: int,
    make: Callable[[], nn.Module],
    inputs: Tensor,
    *,
    forward: Callable[[nn.Module, Tensor], Tensor] = lambda model, x: model(x),
    settings: Exact | None = None,
    batch_size: int = 16,
    epochs: int = 2,
    ahead: int = 0,
) -> tuple[list[bytes], list[int]]:
    """The weights, the same on all workers, and how many microbatches each worker computed.

    Args:
        ahead: Batches that are fetched before their turn.
    """

    def work(collective: Collective) -> tuple[list[bytes], int]:
        torch.manual_seed(3)
        model = make()
        computed = 0

        def loss(model: nn.Module, batch: list[Tensor]) -> tuple[Tensor, int]:
            nonlocal computed
            computed += 1
            return forward(model, batch[0]).square().sum(), len(batch[0])

        trainer = Trainer(
            model,
            torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9),
            loss,
            batch_size=batch_size,
            microbatches=8,
            sync=settings,
            collective=collective,
        )
        fetched: list[Batch] = []
        for batch in trainer.batches(TensorDataset(inputs), epochs):
            fetched.append(batch)
            if len(fetched) > ahead:
                trainer.step(fetched.pop(0))
        for batch in fetched:
            trainer.step(batch)
        return [bits(value) for value in model.state_dict().values()], computed

    everybodys = run_threads(workers, work)
    weights = everybodys[0][0]
    assert all(other == weights for other, _ in everybodys)
    return weights, [computed for _, computed in everybodys]


def tables(sparse: bool) -> nn.Module:
    return nn.ModuleDict(
        {"films": nn.Embedding(30, 7, sparse=sparse), "users": nn.Embedding(9, 7, sparse=sparse), "head": nn.Linear(7, 3)}
    )


def rated(model: nn.Module, tokens: Tensor) -> Tensor:
    assert isinstance(model, nn.ModuleDict)
    rated: Tensor = model["head"](model["films"](tokens) * model["users"](tokens % 9))
    return rated


@pytest.mark.parametrize("replicate_kib", [0, 256])
@pytest.mark.parametrize("overlap", [False, True])
def test_gradients_of_few_rows_give_the_same_bits_on_every_number_of_workers(replicate_kib: float, overlap: bool) -> None:
    tokens = torch.randint(0, 30, (40, 5), generator=torch.Generator().manual_seed(0))
    settings = Exact(replicate_kib=replicate_kib, overlap=overlap)

    dense, _ = trained(1, lambda: tables(False), tokens, forward=rated)
    alone, _ = trained(1, lambda: tables(True), tokens, forward=rated)

    for workers in (2, 3, 4, 5, 7, 8):
        assert trained(workers, lambda: tables(True), tokens, forward=rated, settings=settings)[0] == alone
    # An index that occurs twice in a microbatch is added up in another order than the dense kernel's.
    for one, other in zip(alone, dense, strict=True):
        left, right = (torch.frombuffer(bytearray(raw), dtype=torch.float32) for raw in (one, other))
        torch.testing.assert_close(left, right)


def test_a_sparse_gradient_that_turns_dense_is_noticed_by_all_and_the_step_done_again() -> None:
    tokens = torch.randint(0, 30, (40, 5), generator=torch.Generator().manual_seed(0))

    def forward(model: nn.Module, tokens: Tensor) -> Tensor:
        assert isinstance(model, nn.ModuleDict)
        out = rated(model, tokens)
        # In some microbatches only: the others must follow.
        return out + model["users"].weight.sum() if int(tokens.sum()) % 3 == 0 else out

    def work(settings: Exact, workers: int) -> list[bytes]:
        return trained(workers, lambda: tables(True), tokens, forward=forward, settings=settings)[0]

    alone = work(Exact(), 1)
    for workers in (2, 3, 5, 8):
        assert work(Exact(replicate_kib=0), workers) == work(Exact(), workers) == alone


def deep() -> nn.Module:
    return nn.Sequential(*(layer for _ in range(4) for layer in (nn.Linear(11, 11), nn.Tanh())))


@pytest.mark.parametrize("workers", [1, 2, 3, 5, 8])
def test_overlap_changes_no_bit(workers: int) -> None:
    inputs = torch.randn(40, 11, generator=torch.Generator().manual_seed(0))

    plain, computed = trained(workers, deep, inputs, settings=Exact(one_pass=False))
    overlapped, computed_too = trained(workers, deep, inputs, settings=Exact(overlap=True, one_pass=False, bucket_mib=0.0005))

    assert overlapped == plain
    assert computed_too == computed, "nothing had to be computed again"


def in_several_goes(model: nn.Module, x: Tensor) -> Tensor:
    """The last layer's weights get a gradient from its own use, and later another one from inside the checkpoint."""
    assert isinstance(model, nn.Sequential)
    inside = checkpoint(lambda value: model[-2](model(value)), x.requires_grad_(), use_reentrant=True)
    assert isinstance(inside, Tensor)
    return model[-2](F.relu(inside))


@pytest.mark.parametrize("bucket_mib", [0.0001, 0.001, 25.0])
def test_a_gradient_that_arrives_in_several_goes_is_noticed_and_the_step_done_again(bucket_mib: float) -> None:
    inputs = torch.randn(32, 11, generator=torch.Generator().manual_seed(0))
    plain, computed = trained(1, deep, inputs, forward=in_several_goes, epochs=1, settings=Exact(one_pass=False))
    assert computed == [16]

    for workers in (1, 2, 3):
        repeated, computed = trained(
            workers,
            deep,
            inputs,
            forward=in_several_goes,
            epochs=1,
            settings=Exact(overlap=True, one_pass=False, bucket_mib=bucket_mib),
        )
        assert repeated == plain
        # The first step twice, the second once: from the first late gradient on nothing microbatches early.
        assert sum(computed) == 24


def test_reentrant_checkpointing_gives_the_same_bits_on_every_number_of_workers() -> None:
    inputs = torch.randn(40, 11, generator=torch.Generator().manual_seed(0))
    alone, _ = trained(1, deep, inputs, forward=in_several_goes)

    assert all(trained(workers, deep, inputs, forward=in_several_goes)[0] == alone for workers in (2, 3, 4, 5, 7, 8))


# ---- bytes ----

LAYERS, WIDTH = 32, 64


def bytes_per_step(workers: int) -> tuple[list[int], int]:
    """What each worker sends in one step, counted by the transport; and n, the bytes of all gradients."""

    def work(collective: Collective) -> tuple[int, int]:
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))
        trainer = Trainer(
            model,
            torch.optim.SGD(model.parameters(), lr=1e-3),
            lambda model, batch: (model(batch[0]).square().sum(), len(batch[0])),
            batch_size=16,
            microbatches=8,
            collective=collective,
        )
        sent: list[int] = []
        for batch in trainer.batches(TensorDataset(torch.randn(48, WIDTH, generator=torch.Generator().manual_seed(0))), epochs=1):
            before = collective.bytes_sent
            trainer.step(batch)
            sent.append(collective.bytes_sent - before)
        assert sent[0] == sent[1] == sent[2]
        return sent[0], sum(parameter.nbytes for parameter in model.parameters())

    everybodys = run_threads(workers, work)
    return [sent for sent, _ in everybodys], everybodys[0][1]


@pytest.mark.parametrize("workers", [2, 4, 8])
def test_no_worker_sends_more_than_a_ring_and_one_percent(workers: int) -> None:
    sent, size = bytes_per_step(workers)
    ring = 2 * (workers - 1) / workers * size
    print(f"{workers} workers: at most {max(sent) / ring:.4f} of a ring's bytes")

    assert max(sent) <= 1.01 * ring


@pytest.mark.parametrize("workers", [3, 5, 6, 7])
def test_other_numbers_of_workers_send_one_gradient_a_piece(workers: int) -> None:
    sent, size = bytes_per_step(workers)
    counts = [len(pieces(lo, hi, 8)) for lo, hi in assignment(8, workers)]
    # The others' segments of each piece, and the own segment to each other worker.
    share = -(-LAYERS // workers) / LAYERS
    most = [(count * (1 - 1 / workers) + share * (workers - 1)) * size for count in counts]
    print(f"{workers} workers: at most {max(sent) / (2 * (workers - 1) / workers * size):.3f} of a ring's bytes, pieces {counts}")

    assert all(mine <= 1.05 * limit for mine, limit in zip(sent, most, strict=True))


def test_a_worker_alone_sends_nothing() -> None:
    assert bytes_per_step(1)[0] == [0]


# ---- contract of the reduction ----


@pytest.mark.usefixtures("stretches")
@pytest.mark.parametrize("replicate_kib", [0, 256])
def test_the_sums_are_the_owners_to_change(replicate_kib: float) -> None:
    """Clipping scales them in place: neither the next step nor another worker may see that."""
    gradients = drawn(6, seed=5)

    def work(collective: Collective) -> list[dict[str, bytes]]:
        model = Parameters()
        layout = layout_of(list(model.named_parameters()))
        reduction = Exact(replicate_kib=replicate_kib).bind(layout, collective, 6)
        lo, hi = reduction.ranges[collective.rank]
        seen = []
        for _ in range(3):
            reduction.begin(6)
            for microbatch in range(lo, hi):
                reduction.add(microbatch, model.backward(layout, gradients[microbatch]))
            exchanged(reduction, collective.size)
            found = reduction.finish(3.0)
            seen.append({slot.name: bits(value) for slot, value in zip(found.slots, found.gradients, strict=True)})
            for value in found.gradients:
                value.mul_(7)
            collective.barrier()
        return seen

    for first, second, third in run_threads(4, work):
        assert first == second == third
