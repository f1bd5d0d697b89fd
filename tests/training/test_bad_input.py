"""Bad input is refused with the right error, by every worker, with values and advice, and nothing is lost."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, IterableDataset

import unisono
from tests.training.small_run import (
    BATCH_SIZE,
    EPOCHS,
    MICROBATCHES,
    SAMPLES,
    Augmented,
    Net,
    loss,
    make_trainer,
    memory_url,
    read_lines,
    train,
)
from unisono.checkpoint.store import Store
from unisono.collective import Collective
from unisono.errors import ConfigurationError, DataError, UnisonoError, WorkerFailure
from unisono.testing import run_threads

WORKERS = pytest.mark.parametrize("workers", [1, 3])


def everybodys_errors(workers: int, work: Callable[[Collective], Any]) -> list[UnisonoError]:
    """The error of each worker. None may hang, and none may get away."""
    errors: dict[int, UnisonoError] = {}

    def attempt(collective: Collective) -> None:
        with pytest.raises(UnisonoError) as error:
            work(collective)
        errors[collective.rank] = error.value

    run_threads(workers, attempt, timeout_s=20)
    return [errors[rank] for rank in range(workers)]


def all_refuse(workers: int, kind: type[UnisonoError], pieces: Sequence[str], work: Callable[[Collective], Any]) -> str:
    """Each worker raises ``kind``, by itself, with a message that holds all pieces; the first one's message."""
    errors = everybodys_errors(workers, work)
    assert [type(error) for error in errors] == [kind] * workers, errors
    assert [(piece, str(error)) for error in errors for piece in pieces if piece not in str(error)] == []
    return str(errors[0])


# ---------------------------------------------------------------------- settings


def test_more_workers_than_microbatches() -> None:
    all_refuse(5, ConfigurationError, ["5 workers but only 4 microbatches", "at most 4 workers"], make_trainer)


@WORKERS
@pytest.mark.parametrize(
    ("settings", "pieces"),
    [
        ({"batch_size": 3}, ["batch_size 3 is smaller than microbatches 4", "Raise batch_size or lower microbatches"]),
        ({"microbatches": 0}, ["microbatches must be 1 or more, got 0"]),
        (
            {"precision": "fp16"},
            ['precision must be "fp32" or "bf16", got \'fp16\'', "would need its loss scaled"],
        ),
        ({"max_grad_norm": 0.0}, ["max_grad_norm must be positive, got 0.0"]),
        ({"max_grad_norm": float("nan")}, ["max_grad_norm must be positive, got nan"]),
        ({"checkpoint_every": 0}, ["checkpoint_every must be 1 or more steps, got 0"]),
        ({"keep": 0, "run_dir": "memory://refused"}, ["keep=0", "1 or more"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_setting_out_of_range(workers: int, settings: dict[str, Any], pieces: list[str]) -> None:
    all_refuse(workers, ConfigurationError, pieces, lambda c: make_trainer(c, **settings))


@pytest.mark.parametrize(
    ("make", "pieces"),
    [
        (lambda: unisono.Loader(num_workers=-1), "num_workers must be 0 or more, got -1"),
        (lambda: unisono.Loader(prefetch_factor=0), "prefetch_factor must be 1 or more, got 0"),
        (lambda: unisono.Exact(bucket_mib=0), "bucket_mib must be positive, got 0"),
    ],
)
def test_a_setting_of_a_part_out_of_range(make: Callable[[], Any], pieces: str) -> None:
    with pytest.raises(ConfigurationError, match=pieces):
        make()


@WORKERS
@pytest.mark.parametrize("epochs", [0, -2])
def test_no_epochs(workers: int, epochs: int) -> None:
    pieces = [f"epochs must be 1 or more, got {epochs}"]
    all_refuse(workers, ConfigurationError, pieces, lambda c: make_trainer(c).fit(Augmented(), epochs))
    all_refuse(workers, ConfigurationError, pieces, lambda c: list(make_trainer(c).batches(Augmented(), epochs)))


@WORKERS
@pytest.mark.parametrize(
    ("order", "pieces"),
    [("shuffel", ["shuffel"]), ([0, 1, SAMPLES], [str(SAMPLES)]), ([], []), (7, ["the order is 7: use 'shuffle'"])],
    ids=str,
)
def test_an_order_that_is_none(workers: int, order: Any, pieces: list[str]) -> None:
    all_refuse(workers, ConfigurationError, pieces, lambda c: make_trainer(c).fit(Augmented(), 1, order=order))


# ---------------------------------------------------------------------- workers that do not agree


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        (lambda rank: {"seed": rank}, "seed"),
        (lambda rank: {"batch_size": 12 + 4 * (rank == 1)}, "batch_size"),
        (lambda rank: {"lr": 0.1 * (1 + rank)}, "parameter_groups"),
        (lambda rank: {"width": 7 + rank}, "parameters"),
        (lambda rank: {"checkpoint_every": 2 + rank}, "checkpoint_every"),
        (lambda rank: {"run_dir": None if rank else memory_url()}, "run_dir"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_workers_with_different_settings(settings: Callable[[int], dict[str, Any]], name: str) -> None:
    pieces = [f"worker 1 has {name} = ", "worker 0 has", "the same script with the same settings"]
    all_refuse(3, ConfigurationError, pieces, lambda c: make_trainer(c, **settings(c.rank)))


@pytest.mark.parametrize("other", ["one more", "another shape"])
def test_models_of_different_structure(other: str) -> None:
    def work(collective: Collective) -> None:
        torch.manual_seed(0)
        model = Net()
        if collective.rank == 2 and other == "one more":
            model.register_buffer("extra", torch.zeros(3))
        else:
            model.register_buffer("scale", torch.ones(1 + (collective.rank == 2)))
        make(model, collective=collective)

    all_refuse(3, ConfigurationError, ["the model of worker 2 has other parameters or buffers", "build the same model"], work)


def test_a_shard_of_the_data_in_place_of_the_whole() -> None:
    pieces = ["worker 1 has samples = 31, worker 0 has 32", "the whole data (unisono itself divides it)"]
    all_refuse(3, ConfigurationError, pieces, lambda c: make_trainer(c).fit(Augmented(SAMPLES - c.rank), 1))
    all_refuse(3, ConfigurationError, pieces, lambda c: make_trainer(c).evaluate(Augmented(SAMPLES - c.rank)))


def test_another_number_of_epochs_on_each_worker() -> None:
    pieces = ["worker 1 has epochs = 2, worker 0 has 1"]
    all_refuse(3, ConfigurationError, pieces, lambda c: make_trainer(c).fit(Augmented(), 1 + c.rank))


def test_models_of_different_values_become_that_of_worker_0_with_a_warning() -> None:
    def work(collective: Collective) -> tuple[bytes, bytes]:
        torch.manual_seed(collective.rank)
        model = Net()
        own = model.last.weight.detach().numpy().tobytes()
        make(model, collective=collective)
        return own, model.last.weight.detach().numpy().tobytes()

    message = r"models differ at the start.*on workers \[1, 2\]\): worker 0's values are taken. Seed"
    with pytest.warns(UserWarning, match=message) as warned:
        weights = run_threads(3, work)
    assert len(warned) == 1
    assert len({own for own, _ in weights}) == 3
    assert {taken for _, taken in weights} == {weights[0][0]}


# ---------------------------------------------------------------------- model and optimizer


def make(
    model: Any,
    optimizer: Callable[[Iterator[nn.Parameter]], Any] = lambda parameters: torch.optim.SGD(parameters, 0.1),
    loss: Callable[[Any, Any], Any] = loss,
    **settings: Any,
) -> unisono.Trainer:
    sizes = {"batch_size": BATCH_SIZE, "microbatches": MICROBATCHES}
    return unisono.Trainer(model, optimizer(model.parameters()), loss, **{**sizes, **settings})


def refused(pieces: str, model: Any = None, **settings: Any) -> None:
    with pytest.raises(ConfigurationError, match=pieces):
        make(Net() if model is None else model, **settings)


def test_a_model_on_two_devices() -> None:
    model = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 3, device="meta"))
    refused(r"on two devices \('0.bias' on cpu, '1.bias' on meta\).*model\.to\(device\)", model)


def test_a_model_without_values() -> None:
    refused(r"'weight' is on the meta device.*to_empty", nn.Linear(5, 3, device="meta"))


def test_a_model_that_is_none() -> None:
    class Function:
        def parameters(self) -> list[nn.Parameter]:
            return [nn.Parameter(torch.ones(1))]

    refused("model is a Function, not a torch.nn.Module", Function())


def test_a_model_with_nothing_to_train() -> None:
    refused("no trainable parameter: nothing to train", nn.Linear(5, 3).requires_grad_(False))


def test_a_synchronised_batch_norm() -> None:
    refused("module '1' is a SyncBatchNorm.*use BatchNorm", nn.Sequential(nn.Linear(5, 3), nn.SyncBatchNorm(3)))


def test_a_wrapped_model() -> None:
    refused(r"wrapped in DataParallel: pass the bare module, model\.module", nn.DataParallel(Net()))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(nn.Linear(5, 3))
        refused(r"wrapped in DistributedDataParallel: pass the bare module, model\.module", wrapped)
    finally:
        dist.destroy_process_group()


def test_an_optimizer_that_lacks_trainable_parameters() -> None:
    model = Net()
    refused(
        r"lacks 4 trainable parameters: norm.weight, norm.bias, tied.weight, tied.bias. Pass model.parameters\(\), or freeze",
        model,
        optimizer=lambda p: torch.optim.SGD([*model.first.parameters(), *model.last.parameters()], 0.1),
    )


def test_an_optimizer_of_another_model() -> None:
    refused(
        "holds no parameter of the model: it was made from another model",
        optimizer=lambda p: torch.optim.SGD(Net().parameters(), 0.1),
    )


def test_an_optimizer_that_holds_foreign_parameters() -> None:
    refused(
        r"holds 1 parameter that the model does not have: group 1, shape \(4, 2\).*from this very model",
        optimizer=lambda p: torch.optim.SGD([{"params": p}, {"params": [nn.Parameter(torch.zeros(4, 2))]}], 0.1),
    )


def test_an_optimizer_with_a_closure() -> None:
    class Searching(torch.optim.SGD):
        def step(self, closure: Callable[[], float]) -> None:  # type: ignore[override]
            closure()

    refused("LBFGS evaluates the loss several times a step.*use an optimizer that needs no closure", optimizer=torch.optim.LBFGS)
    refused("Searching evaluates the loss several times a step", optimizer=Searching)


def test_an_optimizer_for_sparse_gradients_only() -> None:
    refused("SparseAdam needs sparse gradients.*use Adam", optimizer=lambda p: torch.optim.SparseAdam(list(p)))


def test_an_optimizer_that_is_none() -> None:
    refused(r"optimizer is a list: give one.*Several become one by a class", optimizer=list)


# ---------------------------------------------------------------------- changes after the trainer was made


def unfreeze(model: Net) -> None:
    model.frozen.requires_grad_(True)


def replace(model: Net) -> None:
    model.last.weight = nn.Parameter(torch.zeros(3, 7))


def assign(model: Net) -> None:
    model.last.weight.data = torch.zeros(3, 7)


@WORKERS
@pytest.mark.parametrize(
    ("change", "pieces"),
    [
        (Net.double, ["'first.weight' was moved to other memory", "change the model before Trainer(...)"]),
        (assign, ["'last.weight' was moved to other memory", "change values in place"]),
        (unfreeze, ["now requires a gradient", "make a new Trainer after unfreezing"]),
    ],
    ids=["cast", "assigned", "unfrozen"],
)
def test_a_model_that_changes_under_the_trainer(workers: int, change: Callable[[Net], Any], pieces: list[str]) -> None:
    def between_steps(collective: Collective) -> None:
        torch.manual_seed(0)
        model = Net()
        trainer = make(model, collective=collective)
        for batch in trainer.batches(Augmented(), EPOCHS):
            if trainer.step(batch).step == 2:
                change(model)

    def before_training(collective: Collective) -> None:
        torch.manual_seed(0)
        model = Net()
        trainer = make(model, collective=collective)
        change(model)
        trainer.fit(Augmented(), EPOCHS)

    all_refuse(workers, ConfigurationError, pieces, between_steps)
    all_refuse(workers, ConfigurationError, pieces, before_training)


def test_a_parameter_that_is_replaced_or_unfrozen_outside_the_optimizer() -> None:
    for change, found in ((replace, "'last.weight' is another object"), (unfreeze, "'frozen.weight' now requires a gradient")):
        model = Net()
        trainer = make(model, lambda p: torch.optim.SGD([x for x in p if x.requires_grad], 0.1))
        change(model)
        with pytest.raises(ConfigurationError, match=rf"{found}.* make a new Trainer"):
            trainer.fit(Augmented(), EPOCHS)


def test_a_batch_of_ones_own_making() -> None:
    trainer = make_trainer()
    with pytest.raises(ConfigurationError, match=r"the batches that trainer.batches\(...\) yields, not a tuple"):
        trainer.step((torch.zeros(12, 5), torch.zeros(12)))  # type: ignore[arg-type]


@WORKERS
def test_a_batch_out_of_turn(workers: int) -> None:
    def twice(collective: Collective) -> None:
        trainer = make_trainer(collective)
        for batch in trainer.batches(Augmented(), EPOCHS):
            trainer.step(batch)
            trainer.step(batch)

    def skipping(collective: Collective) -> None:
        trainer = make_trainer(collective)
        batches = trainer.batches(Augmented(), EPOCHS)
        next(batches)
        trainer.step(next(batches))

    pieces = ["Step each batch once, in order"]
    all_refuse(workers, ConfigurationError, ["batch 0 of epoch 0 comes out of turn: the next one is batch 1", *pieces], twice)
    all_refuse(workers, ConfigurationError, ["batch 1 of epoch 0 comes out of turn: the next one is batch 0", *pieces], skipping)


# ---------------------------------------------------------------------- the loss function


@WORKERS
@pytest.mark.parametrize(
    ("returned", "pieces"),
    [
        (lambda x: x, ["a tensor of shape (3,)"]),
        (lambda x: x[:, None] * x, ["a tensor of shape (3, 3)"]),
        (lambda x: None, ["a NoneType"]),
        (lambda x: x.sum().item(), ["a float"]),
        (lambda x: {"loss": x.sum()}, ["a dict"]),
        (lambda x: (x.sum(), 3, x), ["3 values"]),
        (lambda x: (x.sum(),), ["1 values"]),
        (lambda x: (x, 3), ["a tensor of shape (3,)"]),
        (lambda x: (x.sum().item(), 3), ["a float"]),
        (lambda x: (x.sum(), x), ["a count of shape (3,)"]),
        (lambda x: (x.sum(), None), ["a count of type NoneType"]),
        (lambda x: (x.sum(), "three"), ["a count of type str"]),
    ],
)
def test_a_loss_that_is_neither_a_scalar_nor_a_pair(workers: int, returned: Callable[[Tensor], Any], pieces: list[str]) -> None:
    def bad(model: Any, batch: Any) -> Any:
        return returned(model(batch[0])[:, 0])

    def work(collective: Collective) -> None:
        torch.manual_seed(0)
        make(Net(), loss=bad, collective=collective).fit(Augmented(), 1)

    message = all_refuse(workers, ConfigurationError, ["the loss function returned", *pieces], work)
    assert 'F.cross_entropy(output, target, reduction="sum"), len(target)' in message


@WORKERS
@pytest.mark.parametrize("count", [-1, float("nan"), float("inf")])
def test_a_count_that_counts_nothing(workers: int, count: float) -> None:
    def work(collective: Collective) -> None:
        torch.manual_seed(0)
        make(Net(), loss=lambda model, batch: (model(batch[0]).sum(), count), collective=collective).fit(Augmented(), 1)

    all_refuse(workers, ConfigurationError, [f"count is {float(count)}", "finite and not negative"], work)


@WORKERS
@pytest.mark.parametrize("keeps_graph", [False, True])
def test_a_loss_that_calls_backward(workers: int, keeps_graph: bool) -> None:
    def trains_by_itself(model: nn.Module, batch: Any) -> tuple[Tensor, int]:
        total, count = loss(model, batch)
        total.backward(retain_graph=keeps_graph)
        return total, count

    def work(collective: Collective) -> None:
        torch.manual_seed(0)
        make(Net(), loss=trains_by_itself, collective=collective).fit(Augmented(), 1)

    all_refuse(workers, ConfigurationError, ["the loss function calls backward()", "return the loss"], work)


@WORKERS
def test_a_loss_that_no_parameter_can_change(workers: int) -> None:
    def work(collective: Collective) -> None:
        torch.manual_seed(0)
        make(Net(), loss=lambda model, batch: model(batch[0]).sum().detach(), collective=collective).fit(Augmented(), 1)

    all_refuse(workers, ConfigurationError, ["does not depend on any trainable parameter", "without .detach()"], work)


# ---------------------------------------------------------------------- numbers that are none

SPOILED = 17
"""The sample that goes wrong in the second epoch: before, optimizer and statistics get something that they could lose."""


class Numbered(Augmented):
    """Each sample knows its number, so that a loss can go wrong on one of them."""

    def __getitem__(self, index: int) -> Any:
        return *super().__getitem__(index), index


class Sloped(torch.autograd.Function):
    """Changes nothing in forward; in backward multiplies the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slope: float) -> Tensor:
        ctx.slope = slope
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * ctx.slope, None


class SpoiledLoss:
    """Once armed, ``value`` times too large with ``slope`` times the gradient, in the microbatch of the spoiled sample."""

    def __init__(self, *, value: float = 1.0, slope: float = 1.0, count: float = 1.0) -> None:
        self.value, self.slope, self.count = value, slope, count
        self.armed = False

    def __call__(self, model: Any, batch: Any) -> tuple[Tensor, float]:
        inputs, targets, indices = batch
        total = F.cross_entropy(model(inputs), targets, reduction="sum")
        if self.armed and SPOILED in indices:
            total = Sloped.apply(total * self.value, self.slope)  # type: ignore[no-untyped-call]
        return total, len(targets) * (self.count if self.armed else 1.0)


def place_of(sample: int) -> tuple[int, int, str]:
    """Step and microbatch in which ``sample`` is trained in the second epoch, and the samples of that microbatch."""
    trainer = make_trainer()
    for batch in trainer.batches(Augmented(), EPOCHS):
        trainer.step(batch)
        for part in batch.parts:
            if batch.epoch == 1 and sample in part.indices:
                return trainer.position.step, part.number, ", ".join(map(str, part.indices))
    raise AssertionError


def everything(trainer: unisono.Trainer) -> dict[str, bytes]:
    """Weights, buffers and optimizer state of a worker."""
    tensors: dict[str, Tensor] = {**dict(trainer.model.named_parameters()), **dict(trainer.model.named_buffers())}
    for name, parameter in trainer.model.named_parameters():
        tensors |= {f"{name}/{key}": value for key, value in trainer.optimizer.state.get(parameter, {}).items()}
    return {name: tensor.detach().contiguous().numpy().tobytes() for name, tensor in tensors.items()}


def spoiled_run(collective: Collective, spoiled: SpoiledLoss, **settings: Any) -> None:
    """Trains until the loss goes wrong, and sees that the step before still stands."""
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    trainer = make(model, lambda parameters: optimizer, spoiled, scheduler=scheduler, collective=collective, **settings)
    before: tuple[Any, ...] = ()
    try:
        for batch in trainer.batches(Numbered(), EPOCHS):
            spoiled.armed = batch.epoch == 1
            before = (everything(trainer), trainer.position.step, scheduler.last_epoch)
            trainer.step(batch)
    except DataError:
        assert (everything(trainer), trainer.position.step, scheduler.last_epoch) == before
        assert all(parameter.grad is None for parameter in model.parameters())
        raise


@WORKERS
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_loss_that_is_not_finite(workers: int, value: float) -> None:
    step, microbatch, samples = place_of(SPOILED)
    pieces = [
        f"step {step}: the loss of microbatch {microbatch} is {value} (samples {samples}). Nothing was updated",
        "lower the learning rate",
    ]
    all_refuse(workers, DataError, pieces, lambda c: spoiled_run(c, SpoiledLoss(value=value)))


@WORKERS
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("slope", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_though_the_loss_is(workers: int, slope: float, overlap: bool) -> None:
    step, microbatch, samples = place_of(SPOILED)
    pieces = [
        f"step {step}: the gradient of first.weight, first.bias, norm.weight and others is not finite",
        f"it comes from microbatch {microbatch} (samples {samples}). Nothing was updated",
    ]
    sync = unisono.Exact(overlap=overlap, bucket_mib=1e-4)
    all_refuse(workers, DataError, pieces, lambda c: spoiled_run(c, SpoiledLoss(slope=slope), sync=sync))


@WORKERS
def test_a_count_of_zero_over_a_whole_batch(workers: int) -> None:
    pieces = ["step 4: the count over the whole batch of 12 samples is 0", "Nothing was updated", "masked out"]
    all_refuse(workers, DataError, pieces, lambda c: spoiled_run(c, SpoiledLoss(count=0.0)))


def test_a_count_of_zero_in_one_microbatch_is_fine() -> None:
    def masked(model: Any, batch: Any) -> tuple[Tensor, Tensor]:
        inputs, targets, indices = batch
        mask = indices % 5 != 0 if SPOILED not in indices else torch.zeros(len(indices))
        return (F.cross_entropy(model(inputs), targets, reduction="none") * mask).sum(), mask.sum()

    def work(collective: Collective) -> bytes:
        torch.manual_seed(0)
        model = Net()
        make(model, loss=masked, collective=collective).fit(Numbered(), EPOCHS)
        return model.last.weight.detach().numpy().tobytes()

    [alone] = run_threads(1, work)
    assert run_threads(3, work) == [alone] * 3


class Constant(nn.Module):
    """One weight, and a gradient that the test chooses."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))


def constant_run(collective: Collective, slope: float) -> float:
    model = Constant()
    trainer = make(model, loss=lambda m, b: (Sloped.apply(m.weight.sum(), slope), len(b[0])), collective=collective)  # type: ignore[no-untyped-call]
    result = next(iter(trainer.step(batch) for batch in trainer.batches(Augmented(), 1)))
    return result.gradient_norm


@WORKERS
def test_an_overflow_in_the_sum_only(workers: int) -> None:
    pieces = ["step 1: the gradient of weight is not finite", "from the sum over microbatches (each alone is finite)"]
    all_refuse(workers, DataError, pieces, lambda c: constant_run(c, 2e38))


@WORKERS
def test_gradients_whose_squares_overflow_are_fine(workers: int) -> None:
    norms = run_threads(workers, lambda c: constant_run(c, 3e30))
    assert norms == pytest.approx([2**0.5 * 4 * 3e30 / 12] * workers)


class Poisoned(Augmented):
    """One sample is not a number."""

    def __getitem__(self, index: int) -> Any:
        inputs, target = super().__getitem__(index)
        return inputs * float("nan") if index == SPOILED else inputs, target


def test_after_a_bad_number_the_run_goes_on_from_its_checkpoint_once_the_data_is_repaired() -> None:
    url, undisturbed = memory_url(), train(1, memory_url())

    def work(collective: Collective) -> None:
        make_trainer(collective, run_dir=url, checkpoint_every=2).fit(Poisoned(), EPOCHS)

    message = all_refuse(3, DataError, [" is nan (samples ", str(SPOILED)], work)
    found = re.match(r"step (\d+): ", message)
    assert found
    # The log shows how it came to this.
    assert [line["step"] for line in read_lines(Store(url))] == list(range(1, int(found[1])))
    assert train(2, url, checkpoint_every=2) == undisturbed


# ---------------------------------------------------------------------- samples and datasets


class Breaks(Augmented):
    """One sample cannot be read."""

    def __getitem__(self, index: int) -> Any:
        if index == SPOILED:
            raise OSError("the file is truncated")
        return super().__getitem__(index)


@pytest.mark.parametrize("loader_workers", [0, 1])
def test_a_sample_that_cannot_be_read(loader_workers: int) -> None:
    with pytest.raises(DataError) as error:
        make_trainer(loader=unisono.Loader(num_workers=loader_workers)).fit(Breaks(), EPOCHS)
    assert error.value.index == SPOILED
    assert f"sample {SPOILED} could not be read: OSError: the file is truncated" in str(error.value)
    assert "in __getitem__" in str(error.value)


def test_a_sample_that_one_worker_cannot_read_stops_all() -> None:
    errors = everybodys_errors(3, lambda c: make_trainer(c).fit(Breaks(), EPOCHS))
    [own] = [error for error in errors if isinstance(error, DataError)]
    assert own.index == SPOILED
    assert sum(isinstance(error, WorkerFailure) for error in errors) == 2
    with pytest.raises(DataError, match="sample 17 could not be read"):  # the cause, not its consequences
        run_threads(3, lambda c: make_trainer(c).fit(Breaks(), EPOCHS))


def test_samples_that_make_no_microbatch() -> None:
    class Ragged(Augmented):
        def __getitem__(self, index: int) -> Any:
            inputs, target = super().__getitem__(index)
            return inputs[index == SPOILED :], target

    with pytest.raises(DataError, match=r"samples .*17.* could not be collated into a microbatch: RuntimeError: stack expects"):
        make_trainer().fit(Ragged(), EPOCHS)


def test_a_sample_that_cannot_be_read_in_evaluation() -> None:
    errors = everybodys_errors(2, lambda c: make_trainer(c).evaluate(Breaks()))
    assert [error.index for error in errors if isinstance(error, DataError)] == [SPOILED]


class Endless(Dataset[Any]):
    def __getitem__(self, index: int) -> Any:
        return torch.zeros(5), 0


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(())


@WORKERS
@pytest.mark.parametrize(
    ("dataset", "pieces"),
    [
        (Endless(), ["Endless has no length", "give it __len__"]),
        (iter([1, 2]), ["list_iterator is not a map-style dataset"]),
        (Augmented(0), ["Augmented is empty", "nothing to train on"]),
        ([], ["list is empty"]),
    ],
    ids=["no length", "iterator", "empty", "empty list"],
)
def test_a_dataset_that_cannot_be_trained_on(workers: int, dataset: Any, pieces: list[str]) -> None:
    all_refuse(workers, ConfigurationError, pieces, lambda c: make_trainer(c).fit(dataset, 1))
    all_refuse(workers, ConfigurationError, pieces, lambda c: make_trainer(c).batches(dataset, 1))
    all_refuse(workers, ConfigurationError, pieces, lambda c: make_trainer(c).evaluate(dataset))


# ---------------------------------------------------------------------- evaluation


@WORKERS
def test_streams_are_not_evaluated(workers: int) -> None:
    pieces = ["Stream is not a map-style dataset", "read by number", "__getitem__ and __len__", "fit and batches also take"]
    all_refuse(workers, ConfigurationError, pieces, lambda c: make_trainer(c).evaluate(Stream()))


@WORKERS
def test_no_metrics(workers: int) -> None:
    all_refuse(workers, ConfigurationError, ["no metric to evaluate"], lambda c: make_trainer(c).evaluate(Augmented(), {}))


@WORKERS
def test_a_metric_whose_count_is_zero_everywhere(workers: int) -> None:
    pieces = ["count of metric 'none' is 0.0 over the whole dataset"]
    metrics = {"none": lambda model, batch: (model(batch[0]).sum(), 0)}
    all_refuse(workers, DataError, pieces, lambda c: make_trainer(c).evaluate(Augmented(), metrics))


@WORKERS
def test_a_metric_that_is_neither_a_scalar_nor_a_pair(workers: int) -> None:
    pieces = ["the metric 'wide' function returned a tensor of shape ("]
    metrics = {"wide": lambda model, batch: model(batch[0])}
    all_refuse(workers, ConfigurationError, pieces, lambda c: make_trainer(c).evaluate(Augmented(), metrics))
