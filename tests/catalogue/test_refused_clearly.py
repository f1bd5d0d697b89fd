"""What cannot be trained exactly is refused before it costs time, with what to do."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR

import unisono
from tests.catalogue import trained
from tests.training.small_run import Dies, Killed
from unisono.testing import run_threads

WORKERS = pytest.mark.parametrize("workers", [1, 2, 3])


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def refused(match: str, kind: type[Exception] = unisono.ConfigurationError, workers: int = 1, **settings: Any) -> None:
    with pytest.raises(kind, match=match):
        run_threads(workers, lambda collective: trained.train(sgd, collective, **settings))


# ---------------------------------------------------------------------- the loss


class Weighted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.centers = nn.Parameter(torch.eye(3))

    def forward(self, model: Any, batch: Any) -> tuple[Tensor, int]:
        inputs, targets = batch
        return F.cross_entropy(model(inputs) @ self.centers, targets, reduction="sum"), len(targets)


@WORKERS
@pytest.mark.parametrize("hidden", [False, True], ids=["as a module", "in a closure"])
def test_weights_of_the_loss_itself(workers: int, hidden: bool) -> None:
    criterion = Weighted()
    loss = (lambda model, batch: criterion(model, batch)) if hidden else criterion
    refused(r"a parameter of shape \(3, 3\) .*model\.criterion = criterion", workers=workers, loss=loss)
    model = trained.Net()
    both = torch.optim.SGD([*model.parameters(), *criterion.parameters()], lr=0.1)
    with pytest.raises(unisono.ConfigurationError, match=r"model\.criterion = criterion"):
        unisono.Trainer(model, both, loss, batch_size=12)


def test_weights_of_the_loss_that_are_frozen_or_a_part_of_the_model_are_fine() -> None:
    class Whole(trained.Net):
        def __init__(self) -> None:
            super().__init__()
            self.criterion = Weighted()

    assert len({trained.in_threads(n, sgd, net=Whole, loss=lambda m, b: m.criterion(m, b)) for n in (1, 2, 3)}) == 1
    trained.train(sgd, loss=Weighted().requires_grad_(False))


def mean_of(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Any, Any], tuple[Tensor, int]]:
    return lambda model, batch: (function(model(batch[0]), batch[1]), len(batch[1]))


@WORKERS
@pytest.mark.parametrize(
    "function",
    [
        F.cross_entropy,
        lambda x, y: F.cross_entropy(x, y, reduction="none").mean(),
        lambda x, y: F.mse_loss(x, F.one_hot(y, 3).float()) + 0.1 * F.l1_loss(x, F.one_hot(y, 3).float()),
        lambda x, y: -x.log_softmax(1).gather(1, y[:, None]).mean() / 4,
    ],
    ids=["cross entropy", "mean", "two", "negative"],
)
def test_a_mean_that_comes_with_a_count_is_told_once(workers: int, function: Any) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run_threads(workers, lambda collective: trained.train(sgd, collective, loss=mean_of(function)))
    assert [str(warning.message)[:47] for warning in caught] == ["the loss returns a mean together with a count ("]


@pytest.mark.parametrize(
    "function",
    [
        lambda x, y: F.cross_entropy(x, y, reduction="sum"),
        lambda x, y: F.cross_entropy(x, y) * len(y),
        lambda x, y: F.cross_entropy(x, y, reduction="none").sum() + 0.1 * x.sum(0).mean(),
        lambda x, y: (x - F.one_hot(y, 3)).square().mean(1).sum(),
    ],
    ids=["sum", "mean times number", "with a term of its own", "mean of each sample"],
)
def test_a_sum_is_no_mean(function: Any) -> None:
    trained.train(sgd, loss=mean_of(function))
    trained.train(sgd, loss=lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]))


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def test_a_loss_that_talks_to_the_other_workers() -> None:
    def gathers(model: Any, batch: Any) -> tuple[Tensor, int]:
        total, count = trained.loss(model, batch)
        dist.all_reduce(total.detach().clone())
        return total, count

    with process_group():
        trained.train(sgd)
        refused("exchanges values with the other workers", loss=gathers)


@WORKERS
def test_a_count_of_zero_is_an_error_or_skipped(workers: int) -> None:
    def nothing(model: Any, batch: Any) -> tuple[Tensor, int]:
        return trained.loss(model, batch)[0] * 0, 0

    refused("the count over the whole batch of 12 samples is 0", unisono.DataError, workers, loss=nothing)
    torch.manual_seed(3)
    start = trained.Net()
    found = trained.in_threads(workers, sgd, net=lambda: _copy(start), loss=nothing, on_nonfinite="skip")
    state = start.state_dict().values()
    assert found == trained.digest(torch.cat([value.reshape(-1).view(torch.uint8) for value in state]))


def _copy(model: nn.Module) -> nn.Module:
    made = trained.Net()
    made.load_state_dict(model.state_dict())
    return made


# ---------------------------------------------------------------------- the model


class More(trained.Net):
    def get_extra_state(self) -> dict[str, int]:
        return {"calls": 1}

    def set_extra_state(self, state: Any) -> None: ...


class Wide(trained.Net):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("spectrum", torch.zeros(2, dtype=torch.complex128))


@pytest.mark.parametrize("net", [More, Wide])
def test_what_no_file_can_hold_is_found_before_the_first_step(net: Callable[[], nn.Module], tmp_path: Path) -> None:
    def never(model: Any, batch: Any) -> Any:
        raise AssertionError

    refused("leave it out", unisono.CheckpointError, net=net, loss=never)
    refused("leave it out", unisono.CheckpointError, net=net, loss=never, run_dir=tmp_path)
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:Please use quant_min", "ignore:.*reduce_range")
def test_quantization_that_observes_is_refused_and_trains_once_it_is_settled() -> None:
    from torch.ao import quantization

    def net() -> nn.Module:
        torch.manual_seed(3)
        model: Any = trained.Net().train()
        model.qconfig = quantization.get_default_qat_qconfig("fbgemm")
        return quantization.prepare_qat(model)  # type: ignore[no-untyped-call,no-any-return]

    def settled() -> nn.Module:
        model = net()
        model(trained.drawn().tensors[0])
        return model.apply(quantization.disable_observer)

    refused(r"'first\.weight_fake_quant' .* observes .*disable_observer", net=net)
    assert len({trained.in_threads(workers, sgd, net=settled) for workers in (1, 2, 3)}) == 1


class Grows(trained.Net):
    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(0))

    def forward(self, x: Tensor) -> Tensor:
        self.seen.resize_(2)
        return super().forward(x)


@WORKERS
def test_a_buffer_that_forward_resizes(workers: int) -> None:
    refused(r"'seen' was resized in forward, from \(0,\) to \(2,\)", workers=workers, net=Grows)


# ---------------------------------------------------------------------- the schedule


def run(run_dir: Path, make: Callable[[Any], Any], epochs: int, callbacks: Any = ()) -> unisono.Trainer:
    torch.manual_seed(3)
    model = trained.Net()
    optimizer = sgd(model)
    trainer = unisono.Trainer(
        model,
        optimizer,
        trained.loss,
        batch_size=12,
        microbatches=4,
        scheduler=make(optimizer),
        run_dir=run_dir,
        callbacks=callbacks,
    )
    trainer.fit(trained.drawn(), epochs)
    return trainer


def test_a_schedule_that_is_shorter_than_the_run(tmp_path: Path) -> None:
    with pytest.raises(unisono.ConfigurationError, match=r"OneCycleLR ends after total_steps=4, and this run has 8 steps"):
        run(tmp_path, lambda optimizer: OneCycleLR(optimizer, 0.1, total_steps=4), 2)
    run(tmp_path, lambda optimizer: OneCycleLR(optimizer, 0.1, total_steps=4), 1)


def test_a_run_that_goes_on_with_another_schedule(tmp_path: Path) -> None:
    def cosine(steps: int) -> Callable[[Any], Any]:
        return lambda optimizer: CosineAnnealingLR(optimizer, steps)

    with pytest.raises(Killed):
        run(tmp_path, cosine(8), 2, [Dies(6)])
    with pytest.raises(unisono.ConfigurationError, match=r"schedule\.T_max: 8 there, 16 here\. Choose another run_dir"):
        run(tmp_path, cosine(16), 4)
    assert run(tmp_path, cosine(8), 2).position.step == 8


def test_a_list_of_schedulers(tmp_path: Path) -> None:
    with pytest.raises(unisono.ConfigurationError, match=r"scheduler is a list.*ChainedScheduler"):
        run(tmp_path, lambda optimizer: [CosineAnnealingLR(optimizer, 8)], 1)
