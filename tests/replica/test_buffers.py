"""Buffers that forward changes: averaged in float64 over microbatches if floating point, unanimous if not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from unisono import ConfigurationError, Trainer
from unisono.collective import Collective
from unisono.order import microbatch_bounds
from unisono.testing import run_threads

EVERY = [1, 2, 3, 4, 5, 7, 8]
BATCH_SIZE, MICROBATCHES = 32, 8


def inputs(samples: int, width: int = 3) -> Tensor:
    return torch.randn(samples, width, generator=torch.Generator().manual_seed(5)) * 3 + 1


def trained(
    workers: int,
    make: Callable[[], nn.Module],
    data: Tensor,
    *,
    epochs: int = 1,
    after_step: Callable[[nn.Module], None] | None = None,
) -> list[dict[str, Tensor]]:
    """All buffers after each step, hidden ones included, once they are seen to be the same bits on all workers."""

    def work(collective: Collective) -> list[dict[str, Tensor]]:
        torch.manual_seed(2)
        model = make()
        trainer = Trainer(
            model,
            torch.optim.SGD(model.parameters(), lr=0.01),
            lambda model, batch: (model(batch[0]).square().sum(), len(batch[0])),
            batch_size=BATCH_SIZE,
            microbatches=MICROBATCHES,
            collective=collective,
        )
        history: list[dict[str, Tensor]] = []
        for batch in trainer.batches(TensorDataset(data), epochs, order="sequential"):
            trainer.step(batch)
            history.append({name: buffer.clone() for name, buffer in model.named_buffers()})
            if after_step is not None:
                after_step(model)
        return history

    everybodys = run_threads(workers, work)
    for history in everybodys:
        assert len(history) == len(everybodys[0])
        for mine, first in zip(history, everybodys[0], strict=True):
            assert same_bits(mine, first)
    return everybodys[0]


def same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return list(one) == list(other) and all(
        value.dtype == other[name].dtype and raw(value) == raw(other[name]) for name, value in one.items()
    )


def raw(value: Tensor) -> bytes:
    return value.reshape(-1).view(torch.uint8).numpy().tobytes()


def same_everywhere(make: Callable[[], nn.Module], data: Tensor, **settings: Any) -> list[dict[str, Tensor]]:
    alone = trained(1, make, data, **settings)
    for workers in EVERY[1:]:
        other = trained(workers, make, data, **settings)
        assert all(same_bits(mine, first) for mine, first in zip(other, alone, strict=True)), f"{workers} workers"
    return alone


def parts(batch: Tensor) -> Sequence[Tensor]:
    return [batch[lo:hi] for lo, hi in microbatch_bounds(len(batch), BATCH_SIZE, MICROBATCHES) if hi > lo]


# ---- BatchNorm ----


def test_running_statistics_are_the_float64_mean_of_what_each_microbatch_made_of_them() -> None:
    data = inputs(32 + 32 + 11)
    history = same_everywhere(lambda: nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1)), data)

    mean, var = torch.zeros(3), torch.ones(3)
    for batch, found in zip([data[:32], data[32:64], data[64:]], history, strict=True):
        means, variances = [], []
        for part in parts(batch):
            norm = nn.BatchNorm1d(3)
            norm.running_mean, norm.running_var = mean.clone(), var.clone()
            norm(part)
            means.append(norm.running_mean.double())
            variances.append(norm.running_var.double())
        mean, var = torch.stack(means).mean(0).float(), torch.stack(variances).mean(0).float()
        assert torch.equal(found["0.running_mean"], mean)
        assert torch.equal(found["0.running_var"], var)


def test_the_first_batch_moves_the_mean_by_the_momentum_times_the_batch_mean() -> None:
    """Without a look at torch's own module: equal microbatches, so the mean of means is the mean."""
    data = inputs(32).double()
    (found,) = trained(2, lambda: nn.Sequential(nn.BatchNorm1d(3, momentum=0.25), nn.Linear(3, 1)).double(), data)

    torch.testing.assert_close(found["0.running_mean"], 0.25 * data.mean(0), rtol=1e-14, atol=1e-14)
    variance = torch.stack([part.var(0) for part in parts(data)]).mean(0)
    torch.testing.assert_close(found["0.running_var"], 0.75 + 0.25 * variance, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("workers", EVERY)
def test_the_batch_counter_counts_steps(workers: int) -> None:
    history = trained(workers, lambda: nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1)), inputs(32 + 32 + 9))

    assert [int(found["0.num_batches_tracked"]) for found in history] == [1, 2, 3]


def test_a_frozen_batchnorm_stays_as_it_is() -> None:
    def make() -> nn.Module:
        model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1))
        model[0].eval()
        return model

    history = same_everywhere(make, inputs(64))

    assert history[-1]["0.running_mean"].tolist() == [0, 0, 0]
    assert int(history[-1]["0.num_batches_tracked"]) == 0


def test_bf16_statistics_are_averaged_before_they_are_rounded() -> None:
    class Last(nn.Module):
        """Keeps the mean of its last input, coarsely."""

        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 1)
            self.register_buffer("seen", torch.zeros(3, dtype=torch.bfloat16))

        def forward(self, x: Tensor) -> Tensor:
            self.seen.copy_(x.detach().mean(0))
            output: Tensor = self.linear(x)
            return output

    data = inputs(32)
    (found,) = same_everywhere(Last, data)

    right = torch.stack([part.mean(0).bfloat16().double() for part in parts(data)]).mean(0).bfloat16()
    assert torch.equal(found["seen"], right)


# ---- other buffers ----


class Custom(nn.Module):
    """A linear layer, a buffer of the test's choice, and what forward does to it."""

    def __init__(self, start: Tensor, change: Callable[[Any, Tensor], None], *, persistent: bool = True) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 1)
        self.calls: Tensor
        self.kept: Tensor
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("kept", start, persistent=persistent)
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.calls += 1
            self.change(self, x)
        output: Tensor = self.linear(x)
        return output


def rebind(module: Any, x: Tensor) -> None:
    module.kept = 0.5 * module.kept + x.mean(0)


def in_place(module: Any, x: Tensor) -> None:
    module.kept.mul_(0.5).add_(x.mean(0))


def test_a_buffer_that_is_rebound_ends_as_one_that_is_changed_in_place() -> None:
    rebound = same_everywhere(lambda: Custom(torch.zeros(3), rebind), inputs(75))
    changed = same_everywhere(lambda: Custom(torch.zeros(3), in_place), inputs(75))

    assert all(same_bits(one, other) for one, other in zip(rebound, changed, strict=True))
    assert not torch.equal(rebound[-1]["kept"], torch.zeros(3))


def test_a_rebound_buffer_is_still_the_object_that_others_hold() -> None:
    held: list[Tensor] = []

    def make() -> nn.Module:
        model = Custom(torch.zeros(3), rebind)
        held.append(model.kept)
        return model

    history = trained(2, make, inputs(32))

    assert all(torch.equal(buffer, history[-1]["kept"]) for buffer in held)


def test_a_buffer_that_no_state_dict_shows_is_averaged_too() -> None:
    hidden = same_everywhere(lambda: Custom(torch.zeros(3), in_place, persistent=False), inputs(75))
    shown = trained(1, lambda: Custom(torch.zeros(3), in_place), inputs(75))

    assert all(torch.equal(one["kept"], other["kept"]) for one, other in zip(hidden, shown, strict=True))


def late(module: Any, x: Tensor) -> None:
    if int(module.calls) > 2:
        module.kept += x.mean(0)


def test_a_buffer_that_changes_first_at_a_later_step_is_averaged_from_that_step_on() -> None:
    data = inputs(32 * 4)
    history = same_everywhere(lambda: Custom(torch.zeros(3), late), data)

    assert [int(found["calls"]) for found in history] == [1, 2, 3, 4]
    assert torch.equal(history[1]["kept"], torch.zeros(3))
    third = torch.stack([part.mean(0).double() for part in parts(data[64:96])]).mean(0).float()
    assert torch.equal(history[2]["kept"], third)
    fourth = torch.stack([(third + part.mean(0)).double() for part in parts(data[96:])]).mean(0).float()
    assert torch.equal(history[3]["kept"], fourth)


def seldom(module: Any, x: Tensor) -> None:
    if float(x[0, 0]) > 2:
        module.kept.fill_(1.0)


def test_a_microbatch_that_leaves_the_buffer_alone_counts_with_the_value_of_the_steps_start() -> None:
    data = inputs(64)
    history = same_everywhere(lambda: Custom(torch.zeros(3), seldom), data)

    kept = 0.0
    for batch, found in zip([data[:32], data[32:]], history, strict=True):
        firsts = [float(part[0, 0]) > 2 for part in parts(batch)]
        assert 0 < sum(firsts) < len(firsts), "the data must make some change it and some not"
        kept = sum(1.0 if first else kept for first in firsts) / len(firsts)
        assert found["kept"].tolist() == [kept] * 3


def test_a_buffer_edited_between_steps_goes_on_from_there() -> None:
    def reset(model: nn.Module) -> None:
        with torch.no_grad():
            model.get_buffer("kept").fill_(100.0)

    history = same_everywhere(lambda: Custom(torch.zeros(3), in_place), inputs(64), after_step=reset)

    assert float(history[1]["kept"].min()) > 25


def disagree(module: Any, x: Tensor) -> None:
    module.kept.fill_(int(x.abs().sum() * 1000))


@pytest.mark.parametrize("workers", [1, 2, 8])
def test_integer_buffers_that_disagree_are_an_error_that_names_them(workers: int) -> None:
    with pytest.raises(ConfigurationError, match=r"buffer 'kept' \(torch\.int64\) comes out differently"):
        trained(workers, lambda: Custom(torch.zeros(3, dtype=torch.int64), disagree), inputs(32))


def count_up(module: Any, x: Tensor) -> None:
    module.kept.logical_not_()


def test_boolean_buffers_that_agree_are_kept() -> None:
    history = same_everywhere(lambda: Custom(torch.tensor([True, False]), count_up), inputs(32 * 3))

    assert [found["kept"].tolist() for found in history] == [[False, True], [True, False], [False, True]]


def test_a_large_integer_keeps_all_its_bits() -> None:
    def add(module: Any, x: Tensor) -> None:
        module.kept += 3

    start = 2**62 + 1
    history = same_everywhere(lambda: Custom(torch.tensor([start, -start]), add), inputs(32 + 9))

    assert history[-1]["kept"].tolist() == [start + 6, -start + 6]


def grow(module: Any, x: Tensor) -> None:
    module.kept = torch.zeros(len(module.kept) + 1)


def to_double(module: Any, x: Tensor) -> None:
    module.kept = module.kept.double() + 1


@pytest.mark.parametrize("change", [grow, to_double])
def test_a_buffer_replaced_by_one_of_another_kind_is_an_error_that_names_it(change: Callable[[Any, Tensor], None]) -> None:
    with pytest.raises(ConfigurationError, match="buffer 'kept' was replaced by one of another shape or dtype"):
        trained(1, lambda: Custom(torch.zeros(3), change), inputs(32))


def test_a_complex_buffer_that_changes_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="buffer 'kept' is complex"):
        trained(1, lambda: Custom(torch.zeros(3, dtype=torch.complex64), in_place), inputs(32))


def test_a_model_without_buffers_needs_nothing() -> None:
    assert same_everywhere(lambda: nn.Linear(3, 1), inputs(40)) == [{}, {}]


def test_statistics_that_are_not_finite_stay_so() -> None:
    def overflow(module: Any, x: Tensor) -> None:
        module.kept.fill_(float("-inf"))

    history = same_everywhere(lambda: Custom(torch.zeros(3), overflow), inputs(64))

    assert history[-1]["kept"].tolist() == [float("-inf")] * 3
