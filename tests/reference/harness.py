"""One experiment under unisono, on any number of threads, with everything that comes out of it; and how to compare two."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import unisono
from tests.reference import plain_loop
from unisono.collective import Collective
from unisono.order import make_order
from unisono.testing import run_threads


class Setup(NamedTuple):
    """What a script makes before it trains. Made anew on each worker."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss: Callable[[Any, Any], Any]
    scheduler: Any = None


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What training leaves behind."""

    losses: list[float]
    norms: list[float]
    state: dict[str, Tensor]
    """The model's state dict."""
    optimizer: dict[str, dict[str, Any]]
    """The optimizer's state of each trainable parameter, of all owners together."""
    rates: list[float]
    """Learning rate of each parameter group, for the step after the last."""
    bytes_sent: tuple[int, ...]


def in_unison(
    workers: int,
    setup: Callable[[], Setup],
    dataset: Any,
    *,
    batch_size: int,
    microbatches: int,
    epochs: int = 1,
    steps: int | None = None,
    order: Any = "shuffle",
    **settings: Any,
) -> Outcome:
    """Trains on ``workers`` threads, up to step ``steps`` if given, and checks that they end up the same."""

    def work(collective: Collective) -> Outcome:
        model, optimizer, loss, scheduler = setup()
        trainer = unisono.Trainer(
            model,
            optimizer,
            loss,
            batch_size=batch_size,
            microbatches=microbatches,
            scheduler=scheduler,
            collective=collective,
            # Each parameter has one owner, as in a large model, unless a test says otherwise.
            **{"sync": unisono.Exact(replicate_kib=0), **settings},
        )
        before = collective.bytes_sent
        batches = islice(trainer.batches(dataset, epochs, order=order), steps)
        results = [trainer.step(batch) for batch in batches]
        return outcome(
            model,
            optimizer,
            [result.loss for result in results],
            [result.gradient_norm for result in results],
            collective.bytes_sent - before,
        )

    outcomes = run_threads(workers, work)
    first = outcomes[0]
    optimizer: dict[str, dict[str, Any]] = {}
    for rank, other in enumerate(outcomes):
        assert_same_tensors(other.state, first.state, f"worker {rank} against worker 0")
        assert (other.losses, other.norms, other.rates) == (first.losses, first.norms, first.rates)
        assert not optimizer.keys() & other.optimizer.keys(), "two workers keep the state of one parameter"
        optimizer |= other.optimizer
    sent = tuple(count for other in outcomes for count in other.bytes_sent)
    return dataclasses.replace(first, optimizer=optimizer, bytes_sent=sent)


def plainly(
    setup: Callable[[], Setup],
    dataset: Any,
    *,
    batch_size: int,
    epochs: int = 1,
    steps: int | None = None,
    order: Any = "shuffle",
    seed: int = 0,
    **settings: Any,
) -> Outcome:
    """Trains with the plain loop on the very same batches."""
    made = setup()
    batches = index_lists(len(dataset), batch_size=batch_size, epochs=epochs, order=order, seed=seed)[:steps]
    losses, norms = plain_loop.train(
        made.model, made.optimizer, made.loss, dataset, batches, scheduler=made.scheduler, **settings
    )
    return outcome(made.model, made.optimizer, losses, norms)


def index_lists(length: int, *, batch_size: int, epochs: int = 1, order: Any = "shuffle", seed: int = 0) -> list[list[int]]:
    """The sample indices of every batch."""
    samples = make_order(order, length=length, batch_size=batch_size, seed=seed)
    plans = [samples.epoch(epoch) for epoch in range(epochs)]
    return [plan.batch(number).tolist() for plan in plans for number in range(plan.batches)]


def outcome(
    model: nn.Module, optimizer: torch.optim.Optimizer, losses: list[float], norms: list[float], sent: int = 0
) -> Outcome:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return Outcome(
        losses=losses,
        norms=norms,
        state={name: tensor.detach().clone() for name, tensor in model.state_dict().items()},
        optimizer={names[id(parameter)]: dict(state) for parameter, state in optimizer.state.items() if parameter.requires_grad},
        rates=[float(group["lr"]) for group in optimizer.param_groups],
        bytes_sent=(sent,),
    )


def assert_same_tensors(one: Mapping[str, Any], other: Mapping[str, Any], what: str) -> None:
    """Equal in name, dtype, shape and every bit."""
    assert one.keys() == other.keys(), f"{what}: {one.keys() ^ other.keys()} in one only"
    for name, left in one.items():
        right = other[name]
        if isinstance(left, Mapping):
            assert_same_tensors(left, right, f"{what}: {name}")
        elif isinstance(left, Tensor):
            assert (left.dtype, left.shape) == (right.dtype, right.shape), f"{what}: {name}"
            assert torch.equal(_bytes(left), _bytes(right)), f"{what}: {name} differs in its bits: {left} and {right}"
        else:
            assert left == right, f"{what}: {name}"


def assert_same_bits(one: Outcome, other: Outcome, what: str = "") -> None:
    """Equal in every bit of losses, norms, weights, buffers and optimizer state."""
    assert one.losses == other.losses, f"{what}: losses {one.losses} and {other.losses}"
    assert one.norms == other.norms, f"{what}: gradient norms {one.norms} and {other.norms}"
    assert one.rates == other.rates, f"{what}: learning rates {one.rates} and {other.rates}"
    assert_same_tensors(one.state, other.state, f"{what}: state")
    assert_same_tensors(one.optimizer, other.optimizer, f"{what}: optimizer")


def assert_close(one: Outcome, other: Outcome, tolerance: float, what: str = "") -> None:
    """Losses, norms, and tensors of model and optimizer agree relative to the largest magnitude of each."""
    numbers = [("loss", one.losses, other.losses), ("gradient norm", one.norms, other.norms), ("rate", one.rates, other.rates)]
    for name, left, right in numbers:
        assert_tensors_close(torch.tensor(left).double(), torch.tensor(right).double(), tolerance, f"{what}: {name}")
    assert one.state.keys() == other.state.keys()
    for name, tensor in one.state.items():
        assert_tensors_close(tensor, other.state[name], tolerance, f"{what}: {name}")


def assert_optimizers_close(one: Outcome, other: Outcome, tolerance: float) -> None:
    """The same state for the same parameters, whoever owns them."""
    assert one.optimizer.keys() == other.optimizer.keys()
    for name, state in one.optimizer.items():
        assert state.keys() == other.optimizer[name].keys()
        for key, value in state.items():
            left, right = torch.as_tensor(value), torch.as_tensor(other.optimizer[name][key])
            assert_tensors_close(left, right, tolerance, f"optimizer state {key} of {name}")


def assert_tensors_close(one: Tensor, other: Tensor, tolerance: float, what: str) -> None:
    assert one.shape == other.shape, what
    error = relative_error(one, other)
    assert error <= tolerance, f"{what} is off by {error:.1e} of its largest value, more than {tolerance:.0e}"


def relative_error(one: Tensor, other: Tensor) -> float:
    """The largest difference, relative to the largest magnitude; NaN counts as infinitely far."""
    if not one.numel():
        return 0.0
    largest = max(float(one.double().abs().max()), float(other.double().abs().max()))
    difference = float((one.double() - other.double()).abs().max())
    return difference / largest if largest else (0.0 if difference == 0 else float("inf"))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


class Samples(Sequence[Any]):
    """A dataset in memory: sample i is made of element i of each of ``parts`` (tensors, or nested dicts of them)."""

    def __init__(self, *parts: Any) -> None:
        self.parts = parts

    def __len__(self) -> int:
        return len(_leaf(self.parts[0]))

    def __getitem__(self, index: Any) -> Any:
        picked = tuple(_picked(part, index) for part in self.parts)
        return picked if len(picked) > 1 else picked[0]


def _leaf(part: Any) -> Tensor:
    while isinstance(part, Mapping):
        part = next(iter(part.values()))
    assert isinstance(part, Tensor)
    return part


def _picked(part: Any, index: int) -> Any:
    return {key: _picked(value, index) for key, value in part.items()} if isinstance(part, Mapping) else part[index]
