"""The traps that break the promise silently: each shown where the naive way is cheap to show, and each avoided."""

from __future__ import annotations

import ast
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import unisono
from unisono import Callback, Loader, StepResult, Trainer, World
from unisono.assignment import assignment
from unisono.checkpoint.fingerprint import fingerprint
from unisono.collective import Collective, InProcess
from unisono.layout import ALIGNMENT_BYTES
from unisono.order import microbatch_bounds
from unisono.replica.loss import to_device
from unisono.testing import run_threads
from unisono.tree import fold_all

SOURCE = Path(unisono.__file__).parent
CPU = torch.device("cpu")
EVERY = [1, 2, 3, 4, 5, 7, 8]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def summed(model: nn.Module, batch: list[Tensor]) -> tuple[Tensor, int]:
    return model(batch[0]).square().sum(), len(batch[0])


def trained(
    workers: int,
    make: Callable[[], nn.Module],
    dataset: Any,
    loss: Callable[[Any, Any], Any] = summed,
    *,
    batch_size: int = 16,
    weight_decay: float = 0.0,
    **settings: Any,
) -> dict[str, bytes]:
    """The state dict after an epoch, once it is seen to be the same on all workers."""

    def work(collective: Collective) -> dict[str, bytes]:
        torch.manual_seed(11)
        model = make()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=weight_decay)
        trainer = Trainer(model, optimizer, loss, batch_size=batch_size, microbatches=8, collective=collective, **settings)
        for batch in trainer.batches(dataset, epochs=1):
            trainer.step(batch)
        return {name: value.numpy().tobytes() for name, value in model.state_dict().items()}

    everybodys = run_threads(workers, work)
    assert all(other == everybodys[0] for other in everybodys)
    return everybodys[0]


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# ---- a + b = b + a ----


def by_rank(leaves: list[Tensor], workers: int) -> Tensor:
    """What most systems do: each worker adds up its own, then the workers' sums are added in order of rank."""
    total = torch.zeros_like(leaves[0])
    for lo, hi in assignment(len(leaves), workers):
        own = torch.zeros_like(leaves[0])
        for leaf in leaves[lo:hi]:
            own = own + leaf
        total = total + own
    return total


def test_sums_by_rank_differ_from_one_number_of_workers_to_another() -> None:
    leaves = list(drawn(8, 1000))
    tree = fold_all(leaves, torch.add)

    assert len({by_rank(leaves, workers).numpy().tobytes() for workers in EVERY}) > 3
    assert tree is not None
    assert not torch.equal(by_rank(leaves, 1), tree)


def test_two_workers_with_a_microbatch_each_would_prove_nothing() -> None:
    one, other = drawn(2, 1000)

    assert torch.equal(one + other, other + one)


# ---- autograd adds into .grad ----


def test_accumulating_in_grad_is_not_the_tree() -> None:
    weight = nn.Parameter(torch.ones(1000))
    leaves = list(drawn(4, 1000))
    for leaf in leaves:
        (weight * leaf).sum().backward()

    assert weight.grad is not None
    assert torch.equal(weight.grad, ((leaves[0] + leaves[1]) + leaves[2]) + leaves[3])
    assert not torch.equal(weight.grad, (leaves[0] + leaves[1]) + (leaves[2] + leaves[3]))


@pytest.mark.parametrize("workers", EVERY)
def test_the_update_is_that_of_the_tree_sum_divided_once(workers: int) -> None:
    leaves = drawn(8, 1000)

    def work(collective: Collective) -> Tensor:
        model = nn.ParameterList([torch.zeros(1000)])
        trainer = Trainer(
            model,
            torch.optim.SGD(model.parameters(), lr=1.0),
            lambda model, batch: ((model[0] * batch[0]).sum(), 3),
            batch_size=8,
            microbatches=8,
            collective=collective,
        )
        for batch in trainer.batches(TensorDataset(leaves), epochs=1, order="sequential"):
            trainer.step(batch)
        return model[0].detach()

    tree = fold_all(list(leaves), torch.add)
    assert tree is not None
    assert all(torch.equal(weight, -(tree / 24)) for weight in run_threads(workers, work))


# ---- threads ----


@pytest.mark.parametrize("before", [1, 2, 3])
def test_a_worker_computes_with_its_own_number_of_threads_whatever_the_process_had(before: int, threads: None) -> None:
    seen: list[int] = []

    def loss(model: nn.Module, batch: list[Tensor]) -> tuple[Tensor, int]:
        model.weight.register_hook(lambda _: seen.append(torch.get_num_threads()))
        seen.append(torch.get_num_threads())
        return summed(model, batch)

    model = nn.Linear(5, 3)
    torch.set_num_threads(before)
    trainer = Trainer(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        loss,
        batch_size=8,
        microbatches=2,
        world=World(),
        collective=InProcess(),
    )
    for batch in trainer.batches(TensorDataset(drawn(8, 5)), epochs=1):
        trainer.step(batch)

    assert set(seen) == {1}


def test_the_number_of_threads_is_part_of_the_fingerprint() -> None:
    one, two = (fingerprint(threads=count, device=CPU) for count in (1, 2))

    assert {field for field in one if one[field] != two[field]} == {"threads"}


def test_with_more_threads_kernels_are_deterministic_and_samples_are_still_read_with_one(threads: None) -> None:
    class Counting(torch.utils.data.Dataset[Tensor]):
        def __len__(self) -> int:
            return 16

        def __getitem__(self, index: int) -> Tensor:
            return torch.tensor([float(torch.get_num_threads())])

    seen: list[Any] = []

    def loss(model: nn.Module, batch: Tensor) -> tuple[Tensor, int]:
        seen.append((torch.get_num_threads(), batch.unique().tolist(), torch.are_deterministic_algorithms_enabled()))
        return model(batch).sum(), len(batch)

    fills = torch.utils.deterministic.fill_uninitialized_memory
    try:
        trained(1, lambda: nn.Linear(1, 1), Counting(), loss, world=World(threads=2))
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = fills

    assert seen == [(2, [1.0], True)] * 8


# ---- alignment ----


def misaligned(tensor: Tensor, elements: int) -> Tensor:
    """The same values at an address ``elements`` beyond a multiple of 64 bytes."""
    room = torch.empty(tensor.numel() + 16, dtype=tensor.dtype)
    view = room[elements : elements + tensor.numel()].view(tensor.shape)
    assert elements == 0 or view.data_ptr() % ALIGNMENT_BYTES
    return view.copy_(tensor)


@pytest.mark.parametrize("offset", [0, 1, 3, 5])
def test_a_batch_is_computed_from_aligned_memory_wherever_it_was_loaded(offset: int) -> None:
    value = drawn(10, 100)

    for data in (misaligned(value, offset), value.t().contiguous().t(), value[:, ::2]):
        moved = to_device({"x": [data]}, CPU)["x"][0]
        assert torch.equal(moved, data)
        assert moved.data_ptr() % ALIGNMENT_BYTES == 0


@pytest.mark.parametrize("workers", [1, 3, 8])
def test_misaligned_batches_and_models_change_no_bit(workers: int) -> None:
    inputs = TensorDataset(drawn(32, 513))

    def make(offset: int) -> nn.Module:
        model = nn.Sequential(nn.Linear(513, 257), nn.Linear(257, 100), nn.Linear(100, 10))
        for parameter in model.parameters():
            parameter.data = misaligned(parameter.data, offset)
        return model

    def collate(offset: int) -> Callable[[list[Any]], list[Tensor]]:
        return lambda samples: [misaligned(torch.stack([sample[0] for sample in samples]), offset)]

    straight = trained(1, lambda: make(0), inputs)
    for offset in (1, 3, 5):
        assert trained(workers, lambda o=offset: make(o), inputs, loader=Loader(collate_fn=collate(offset))) == straight


@pytest.mark.parametrize("workers", [1, 2, 3, 5])
def test_weights_gradients_and_batches_lie_at_the_same_alignment_on_every_number_of_workers(workers: int) -> None:
    places: set[int] = set()

    class Watched(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            for group in self.param_groups:
                places.update(p.grad.data_ptr() % ALIGNMENT_BYTES for p in group["params"] if p.grad is not None)
            return super().step(closure)

    def loss(model: nn.Module, batch: list[Tensor]) -> tuple[Tensor, int]:
        places.update(p.data_ptr() % ALIGNMENT_BYTES for p in [*model.parameters(), *batch])
        return summed(model, batch)

    def work(collective: Collective) -> None:
        torch.manual_seed(11)
        model = nn.Sequential(nn.Linear(13, 7), nn.Linear(7, 3), nn.Linear(3, 1))
        trainer = Trainer(model, Watched(model.parameters(), lr=0.1), loss, batch_size=16, microbatches=8, collective=collective)
        for batch in trainer.batches(TensorDataset(drawn(37, 13)), epochs=1):
            trainer.step(batch)

    run_threads(workers, work)

    assert places == {0}


# ---- other people's reductions ----


def called(tree: ast.AST) -> set[str]:
    return {
        node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
    }


def imported(tree: ast.AST) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_nothing_is_ever_summed_by_a_backend() -> None:
    forbidden = {"all_reduce", "reduce", "reduce_scatter", "reduce_scatter_tensor", "all_reduce_coalesced"}
    for path in SOURCE.rglob("*.py"):
        calls = called(ast.parse(path.read_text()))
        allowed = {"reduce"} if path.name == "stragglers.py" else set()  # NumPy's bitwise or of flags, where order is nothing
        assert not calls & (forbidden - allowed), path


def test_algorithms_talk_through_a_collective_alone() -> None:
    for path in SOURCE.rglob("*.py"):
        talks = any(
            name.startswith("torch.distributed") and not name.startswith("torch.distributed.elastic")
            for name in imported(ast.parse(path.read_text()))
        )
        assert not talks or path.parts[-2] in ("collective", "elastic", "launch") or path.name == "watch.py", path


# ---- dropout, NumPy, random ----


def noisy(model: nn.Module, batch: list[Tensor]) -> tuple[Tensor, int]:
    """A loss with all the randomness that people put into one."""
    output = F.dropout(model(batch[0]), 0.3) * float(np.random.rand()) + random.random()
    return (output * torch.rand(()) + torch.randn_like(output)).square().sum(), len(batch[0])


def test_randomness_in_forward_belongs_to_the_microbatch_and_not_to_the_worker() -> None:
    inputs = TensorDataset(drawn(40, 5))
    alone = trained(1, lambda: nn.Linear(5, 3), inputs, noisy)

    assert all(trained(workers, lambda: nn.Linear(5, 3), inputs, noisy) == alone for workers in EVERY)


def test_each_step_and_each_microbatch_has_its_own_randomness() -> None:
    seen: list[float] = []

    def loss(model: nn.Module, batch: list[Tensor]) -> tuple[Tensor, int]:
        seen.extend([torch.rand(()).item(), np.random.rand(), random.random()])
        return summed(model, batch)

    trained(1, lambda: nn.Linear(5, 3), TensorDataset(drawn(48, 5)), loss, sync=unisono.Exact(one_pass=False))

    assert len(set(seen)) == len(seen) == 3 * 8 * 3


class Draws(Callback):
    """Draws between steps, as callbacks and schedules do."""

    def __init__(self) -> None:
        self.drawn: list[float] = []

    def on_step(self, trainer: Trainer, result: StepResult) -> None:
        self.drawn += [torch.rand(()).item(), float(np.random.rand()), random.random()]


def test_what_is_drawn_between_steps_does_not_depend_on_who_draws_it() -> None:
    found: list[list[float]] = []

    def work(collective: Collective) -> None:
        callback = Draws()
        torch.manual_seed(11)
        model = nn.Linear(5, 3)
        trainer = Trainer(
            model,
            torch.optim.SGD(model.parameters(), lr=0.1),
            summed,
            batch_size=16,
            microbatches=8,
            collective=collective,
            callbacks=[callback],
        )
        for batch in trainer.batches(TensorDataset(drawn(40, 5)), epochs=1):
            trainer.step(batch)
        found.append(callback.drawn)

    for workers in EVERY:
        run_threads(workers, work)

    assert len(found) == sum(EVERY)
    assert len(found[0]) == len(set(found[0])) == 9
    assert all(other == found[0] for other in found)


# ---- a short last batch ----


@pytest.mark.parametrize("size", range(1, 17))
def test_a_short_batch_is_split_without_a_look_at_the_workers(size: int) -> None:
    bounds = microbatch_bounds(size, 16, 8)
    filled = [hi - lo for lo, hi in bounds if hi > lo]

    assert sum(filled) == size
    assert max(filled) <= 2, "no microbatch is larger than in a full batch"
    assert [hi > lo for lo, hi in bounds] == [True] * len(filled) + [False] * (8 - len(filled)), "the empty ones come last"


@pytest.mark.parametrize("size", [1, 2, 3, 5, 9, 11, 15])
def test_a_short_batch_trains_alike_on_every_number_of_workers(size: int) -> None:
    """With batch normalisation, whose statistics take another way than gradients do."""

    def make() -> nn.Module:
        return nn.Sequential(nn.Conv1d(1, 3, 2), nn.BatchNorm1d(3), nn.Flatten(), nn.Linear(12, 2))

    inputs = TensorDataset(drawn(16 + size, 1, 5))
    alone = trained(1, make, inputs)

    assert all(trained(workers, make, inputs) == alone for workers in EVERY)


# ---- unused parameters ----


class Choosy(nn.Module):
    """Which branch is used depends on the data; one is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.positive, self.negative, self.never = (nn.Linear(3, 3) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        branch: nn.Module = self.positive if float(x.sum()) > 0 else self.negative
        result: Tensor = branch(x)
        return result


def test_branches_used_by_some_microbatches_train_alike_on_every_number_of_workers() -> None:
    inputs = TensorDataset(drawn(40, 3))
    alone = trained(1, Choosy, inputs, weight_decay=0.1)

    assert all(trained(workers, Choosy, inputs, weight_decay=0.1) == alone for workers in EVERY)


@pytest.mark.parametrize("workers", EVERY)
def test_a_parameter_that_nobody_used_is_not_even_decayed(workers: int) -> None:
    torch.manual_seed(11)
    before = {name: value.numpy().tobytes() for name, value in Choosy().state_dict().items()}
    inputs = TensorDataset(drawn(32, 3).abs())

    after = trained(workers, Choosy, inputs, weight_decay=0.1)

    assert {name for name, value in after.items() if value == before[name]} == {
        "never.weight",
        "never.bias",
        "negative.weight",
        "negative.bias",
    }


def test_a_zero_in_place_of_an_absent_gradient_would_decay_the_weight() -> None:
    weights = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    weights[1].grad = torch.zeros(3)
    torch.optim.AdamW(weights, lr=0.1, weight_decay=0.1).step()

    assert torch.equal(weights[0], torch.ones(3))
    assert not torch.equal(weights[1], torch.ones(3))


# ---- one division ----


def test_microbatches_of_other_counts_weigh_by_their_counts() -> None:
    """A mean of means would weigh a word of a short text more than one of a long text."""
    inputs = drawn(16, 3).double()
    counts = torch.arange(1, 17)

    def loss(model: nn.Module, batch: list[Tensor]) -> tuple[Tensor, Tensor]:
        x, count = batch
        return (model(x) * count[:, None]).sum(), count.sum()

    def work(collective: Collective) -> Tensor:
        model = nn.Linear(3, 1, bias=False).double()
        nn.init.zeros_(model.weight)
        trainer = Trainer(
            model, torch.optim.SGD(model.parameters(), lr=1.0), loss, batch_size=16, microbatches=8, collective=collective
        )
        for batch in trainer.batches(TensorDataset(inputs, counts), epochs=1):
            trainer.step(batch)
        return model.weight.detach()

    right = -(inputs * counts[:, None]).sum(dim=0) / counts.sum()

    for workers in EVERY:
        for weight in run_threads(workers, work):
            torch.testing.assert_close(weight[0], right, rtol=1e-12, atol=0)


class Graph:
    """As graph libraries hold a batch: an object that moves its tensors itself."""

    class Store:
        __slots__ = ("features",)

        def __init__(self, features: Tensor) -> None:
            self.features = features

    def __init__(self, features: Tensor, labels: Tensor) -> None:
        self.store = self.Store(features)
        self.more = {"labels": [labels], "me": self}

    def to(self, device: torch.device) -> Graph:
        return self


def test_tensors_in_objects_that_move_themselves_are_aligned() -> None:
    unaligned = [misaligned(torch.randn(7, 5), offset) for offset in (1, 3)]
    batch = Graph(*unaligned)
    moved = to_device(batch, torch.device("cpu"))
    assert moved is batch
    assert batch.store.features is unaligned[0]
    for tensor in (moved.store.features, moved.more["labels"][0]):
        assert tensor.data_ptr() % ALIGNMENT_BYTES == 0
    aligned = moved.store.features.data_ptr()
    assert to_device(batch, torch.device("cpu")).store.features.data_ptr() == aligned
