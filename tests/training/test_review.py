"""Legal but unusual models, loops and orders: each changed a result with the number of workers once, or was refused unclearly."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler, TensorDataset

import unisono
from unisono.collective import Collective
from unisono.collective.torch_distributed import TorchDistributed
from unisono.errors import CheckpointError, ConfigurationError
from unisono.layout import Layout
from unisono.sync import Exact
from unisono.testing import run_threads
from unisono.training.callbacks import Callback
from unisono.training.setup import enter
from unisono.training.step import _by_dtype
from unisono.world import World

WORKERS = (2, 3)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


INPUTS, TARGETS = drawn(32, 6), drawn(32, 4, seed=1)
DATA = TensorDataset(INPUTS, TARGETS)


class OneByOne(Dataset[Any]):
    """Read sample by sample, for which generators are seeded (plain tensors need none)."""

    def __len__(self) -> int:
        return len(DATA)

    def __getitem__(self, index: int) -> Any:
        return DATA[index]


def squares(model: Any, batch: Any) -> tuple[Tensor, int]:
    inputs, targets = batch
    return ((model(inputs) - targets) ** 2).sum(), len(inputs)


def trained(
    workers: int,
    make: Callable[[], nn.Module],
    *,
    data: Any = DATA,
    between: Callable[[unisono.Trainer], Any] | None = None,
    callbacks: tuple[Callback, ...] = (),
) -> list[tuple[dict[str, Tensor], list[Any]]]:
    """State after 3 steps, and what ``between`` returned before each, by rank."""

    def work(collective: Collective) -> tuple[dict[str, Tensor], list[Any]]:
        torch.manual_seed(0)
        model = make()
        trainer = unisono.Trainer(
            model,
            torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
            squares,
            batch_size=10,
            microbatches=4,
            collective=collective,
            callbacks=callbacks,
        )
        returned: list[Any] = []
        for batch in trainer.batches(data, epochs=1):
            returned.append(between(trainer) if between else None)
            trainer.step(batch)
            if trainer.position.step == 3:
                break
        return {name: value.clone() for name, value in model.state_dict().items()}, returned

    return run_threads(workers, work)


def check_alike(make: Callable[[], nn.Module], **settings: Any) -> None:
    ((one, returned),) = trained(1, make, **settings)
    for workers in WORKERS:
        for state, others in trained(workers, make, **settings):
            assert others == returned
            for name, value in one.items():
                assert torch.equal(state[name], value), (workers, name)


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.norm = nn.BatchNorm1d(8)
        self.last = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.last(self.norm(self.first(x)))
        return output


class Counting(nn.Module):
    """Follows its inputs in evaluation, too."""

    kept: Tensor

    def __init__(self, rebind: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 4)
        self.rebind = rebind
        self.register_buffer("kept", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        new = (self.kept * 0.9 + x.detach().mean() * 0.1).detach()
        if self.rebind:
            self.kept = new
        else:
            self.kept.copy_(new)
        output: Tensor = self.linear(x) * new
        return output


# ---- what happens between steps ----


def test_what_the_loop_draws_before_a_step_does_not_depend_on_the_samples_that_this_worker_has_read() -> None:
    check_alike(
        lambda: nn.Linear(6, 4),
        data=OneByOne(),
        between=lambda trainer: (torch.rand(1).item(), random.random(), float(np.random.rand())),
    )


def test_a_forward_in_training_mode_between_steps_moves_the_statistics_alike_for_any_number_of_workers() -> None:
    check_alike(Normed, between=lambda trainer: trainer.model(INPUTS[:8]) is None)


def test_a_buffer_replaced_between_steps_counts_for_every_microbatch() -> None:
    def replace(trainer: unisono.Trainer) -> None:
        trainer.model.norm.running_mean = torch.full((8,), 3.0)  # type: ignore[union-attr]

    check_alike(Normed, between=replace)


@pytest.mark.parametrize("rebind", [False, True])
def test_what_evaluation_does_to_buffers_is_undone(rebind: bool) -> None:
    def evaluate(trainer: unisono.Trainer) -> float:
        before = trainer.model.kept.clone()  # type: ignore[union-attr, operator]
        loss = trainer.evaluate(DATA)["loss"]
        assert torch.equal(trainer.model.kept, before)  # type: ignore[arg-type]
        return loss * 0

    check_alike(lambda: Counting(rebind), between=evaluate)


class Caching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 4)
        self.cache: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.cache is None:
            self.cache = torch.arange(1.0, 5.0)
        output: Tensor = self.linear(x) * self.cache
        return output


def test_what_a_model_caches_in_evaluation_can_be_used_in_training() -> None:
    check_alike(Caching, between=lambda trainer: trainer.evaluate(DATA) is None)


# ---- models ----


def test_weights_that_forward_changes_are_refused_by_name() -> None:
    class Bounded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(20, 4, max_norm=1.0)

        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = self.embedding(x).mean(dim=1)
            return output

    words = torch.randint(0, 20, (32, 3), generator=torch.Generator().manual_seed(2))
    with pytest.raises(ConfigurationError, match=r"parameter 'embedding.weight' is changed in place.*max_norm"):
        trained(1, Bounded, data=TensorDataset(words, TARGETS))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_scripted_model_trains_alike() -> None:
    check_alike(lambda: torch.jit.script(Normed()), between=lambda trainer: trainer.evaluate(DATA) is None)


def test_extra_state_that_no_tensor_holds_is_refused_by_name(tmp_path: Path) -> None:
    class Extra(nn.Linear):
        def get_extra_state(self) -> dict[str, int]:
            return {"version": 1}

    model = Extra(6, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = unisono.Trainer(model, optimizer, squares, batch_size=10, microbatches=4, run_dir=tmp_path)
    with pytest.raises(CheckpointError, match="cannot save '_extra_state' of the state dict: it is a dict"):
        trainer.save()


def test_a_buffer_that_forward_makes_is_refused_by_name() -> None:
    class Lazy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            if not hasattr(self, "center"):
                self.register_buffer("center", x.detach().mean(dim=0))
            output: Tensor = self.linear(x - self.center)
            return output

    with pytest.raises(ConfigurationError, match="came or went after the Trainer was made: center"):
        trained(1, Lazy)


def test_parameters_tied_by_their_memory_are_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight.data = model[0].weight.data
    with pytest.raises(ConfigurationError, match=r"'0.weight' and '1.weight' share memory"):
        Layout(model.named_parameters())


def test_empty_parameters_share_nothing() -> None:
    assert Layout([(name, nn.Parameter(torch.empty(0))) for name in "ab"]).nbytes == 0


def test_an_absent_complex_gradient_leaves_every_bit_alone() -> None:
    def work(collective: Collective) -> list[Tensor]:
        parameter = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
        layout = Layout([("weight", parameter)])
        layout.adopt(collective.allocate)
        reduction = Exact(replicate_kib=0).bind(layout, collective, 2)
        reduction.begin(2, overlap=False)
        for leaf in range(*reduction.ranges[collective.rank]):
            # The first leaf has none, so the sum is that of the second.
            parameter.grad = torch.full((2,), complex(-0.0, -0.0), dtype=torch.complex64) if leaf else None
            reduction.add(leaf)
        reduction.launch()
        reduction.notes()
        return [torch.view_as_real(gradient).clone() for gradient in reduction.finish(1.0, b"\1").gradients]

    for workers in (1, 2):
        found = [gradient for worker in run_threads(workers, work) for gradient in worker]
        assert len(found) == 1
        assert torch.signbit(found[0]).all()


def test_gradients_of_one_dtype_are_computed_on_together_whoever_owns_others() -> None:
    layout = Layout([(dtype, nn.Parameter(torch.zeros(2, dtype=getattr(torch, dtype)))) for dtype in ("float32", "bfloat16")])
    groups = _by_dtype([torch.ones_like(parameter) for parameter in (*layout.parameters, *layout.parameters)])
    assert [len(group) for group in groups] == [2, 2]
    assert all(len({gradient.dtype for gradient in group}) == 1 for group in groups)


# ---- orders ----


class Restless(Sampler[int]):
    """Another permutation each time it is read."""

    def __init__(self) -> None:
        self.reads = 0

    def __len__(self) -> int:
        return len(DATA)

    def __iter__(self) -> Iterator[int]:
        self.reads += 1
        return iter(torch.randperm(len(DATA), generator=torch.Generator().manual_seed(self.reads)).tolist())


def fitted(workers: int, order: Callable[[int], Any]) -> list[Tensor]:
    def work(collective: Collective) -> Tensor:
        torch.manual_seed(0)
        model = nn.Linear(6, 4)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        trainer = unisono.Trainer(model, optimizer, squares, batch_size=10, microbatches=4, collective=collective)
        trainer.fit(DATA, epochs=2, order=order(collective.rank))
        return model.weight.detach().clone()

    return run_threads(workers, work)


def test_a_sampler_that_counts_how_often_it_is_read_counts_alike_on_all_workers() -> None:
    (one,) = fitted(1, lambda rank: Restless())
    for workers in WORKERS:
        for weight in fitted(workers, lambda rank: Restless()):
            assert torch.equal(weight, one)


def test_another_order_on_each_worker_is_refused_before_anything_is_updated() -> None:
    with pytest.raises(ConfigurationError, match=r"step 1: worker 1 was given other samples.*same order"):
        fitted(2, lambda rank: np.random.default_rng(rank).permutation(len(DATA)))


# ---- the run directory, the process ----


def test_after_a_failed_checkpoint_the_next_one_is_written_once_the_cause_is_gone(tmp_path: Path) -> None:
    model = nn.Linear(6, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = unisono.Trainer(model, optimizer, squares, batch_size=10, microbatches=4, run_dir=tmp_path)
    in_the_way = tmp_path / "checkpoints"
    in_the_way.touch()
    with pytest.raises(CheckpointError):
        trainer.save()
    in_the_way.unlink()
    trainer.save()
    assert (in_the_way / "step-0" / "checkpoint.json").exists()


def test_a_second_trainer_neither_waits_for_workers_who_left_nor_sends_more_away(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "here"}
    for name, value in {**launched, "MASTER_PORT": "1", "UNISONO_LAUNCHED": "1", "UNISONO_WORKERS_DEFAULTED": "1"}.items():
        monkeypatch.setenv(name, value)
    assert enter(World.from_environment(), 2).size == 2
    second = World.from_environment()
    assert (second.size, second.local_size) == (2, 2)
    assert enter(second, 8).size == 2
    with pytest.raises(ConfigurationError, match="2 workers but only 1 microbatch"):
        enter(second, 1)


def test_a_process_group_that_cannot_send_control_messages_is_refused_with_what_to_do() -> None:
    dist.init_process_group("cuda:gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(ConfigurationError, match="serves cuda, but unisono sends tensors of cpu"):
            TorchDistributed.connect(rank=0, size=1, device=torch.device("cpu"))
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.int16, torch.float8_e4m3fn, torch.complex64, torch.bool])
def test_a_tensor_of_any_dtype_can_be_broadcast(dtype: torch.dtype) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for shape in ((), (3, 2)):
            tensor = torch.ones(shape).to(dtype)
            TorchDistributed.connect(rank=0, size=1, device=torch.device("cpu")).broadcast(tensor)
            assert torch.equal(tensor.to(torch.complex64), torch.ones(shape, dtype=torch.complex64))
    finally:
        dist.destroy_process_group()


def test_after_an_error_in_an_overlapped_step_a_backward_of_ones_own_is_left_alone() -> None:
    def failing(model: nn.Module, batch: Any) -> tuple[Tensor, int]:
        raise ArithmeticError("the loss has a fault")

    def work(collective: Collective) -> Tensor | None:
        model = nn.Linear(4, 1)
        trainer = unisono.Trainer(
            model,
            torch.optim.SGD(model.parameters(), lr=0.1),
            failing,
            batch_size=2,
            microbatches=1,
            sync=Exact(overlap=True),
            collective=collective,
        )
        data = TensorDataset(torch.ones(2, 4), torch.ones(2, 1))
        with pytest.raises(ArithmeticError):
            trainer.step(next(iter(trainer.batches(data, epochs=1))))
        model(torch.ones(1, 4)).sum().backward()
        return model.weight.grad

    (gradient,) = run_threads(1, work)
    assert gradient is not None
    assert torch.equal(gradient, torch.ones(1, 4))
