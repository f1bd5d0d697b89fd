"""A loss that sees the whole batch trains as in a plain loop over whole batches, on any number of workers."""

from __future__ import annotations

import functools
import re
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from tests.fault_injection import Death, Lives, run_lives
from tests.memory import empty_memory
from tests.moments import moments
from tests.training.hard_problem import digest
from unisono import ConfigurationError, DataError, Exact, Trainer, WholeBatchLoss
from unisono.collective import Collective
from unisono.elastic.link import Link
from unisono.testing import run_threads

SAMPLES, BATCH, MICROBATCHES, EPOCHS = 41, 16, 5, 2  # three steps an epoch, the last of nine samples
WORKERS = (1, 2, 3, 5)
Found = dict[str, str]


def data(dtype: torch.dtype = torch.float32) -> TensorDataset:
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(SAMPLES, 6, generator=generator)
    return TensorDataset(inputs.to(dtype), torch.randint(0, 4, (SAMPLES,), generator=generator))


class Encoder(nn.Module):
    """What data parallelism makes hard: BatchNorm, dropout, a table."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 12)
        self.norm = nn.BatchNorm1d(12)
        self.dropout = nn.Dropout(0.3)
        self.last = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.last(self.dropout(F.relu(self.norm(self.first(x)))))
        return found


def plain_encoder() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 5))


class Contrast(nn.Module):
    """InfoNCE between two views, with a temperature, after statistics over the whole batch."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(0.3))
        self.norm = nn.BatchNorm1d(5)

    def forward(self, one: Tensor, other: Tensor, labels: Tensor) -> tuple[Tensor, int]:
        near = F.normalize(self.norm(one)) @ F.normalize(self.norm(other)).T / self.temperature
        same = labels[:, None] == labels[None, :]
        positive = near.masked_fill(~same, -torch.inf).logsumexp(dim=1)
        return (near.logsumexp(dim=1) - positive).sum(), len(one)


class DrawingContrast(Contrast):
    """It draws random numbers as well."""

    def forward(self, one: Tensor, other: Tensor, labels: Tensor) -> tuple[Tensor, int]:
        return super().forward(F.dropout(one, 0.1, self.training), other, labels)


def two_views(model: Any, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
    inputs, labels = batch
    return model(inputs + 0.1 * torch.randn_like(inputs)), model(inputs * 1.1), labels


def still_views(model: Any, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
    inputs, labels = batch
    return model(inputs), model(inputs * 1.1), labels


def make(
    collective: Collective | Link | None = None,
    *,
    net: Callable[[], nn.Module] = Encoder,
    embed: Any = two_views,
    contrast: Callable[[], Any] = DrawingContrast,
    dtype: torch.dtype = torch.float32,
    microbatches: int = MICROBATCHES,
    plain: bool = False,
    **settings: Any,
) -> Trainer:
    torch.manual_seed(7)
    model, over = net().to(dtype), contrast()
    own = list(over.to(dtype).parameters()) if isinstance(over, nn.Module) else []
    parameters = [*model.parameters(), *own]
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9) if plain else torch.optim.AdamW(parameters, lr=0.02)
    loss = WholeBatchLoss(embed, over)
    return Trainer(model, optimizer, loss, batch_size=BATCH, microbatches=microbatches, collective=collective, **settings)


def state(trainer: Trainer) -> Found:
    found = trainer._local.replica.model_state()
    return {name: digest(value) for name, value in found.items()}


def train(collective: Collective | Link | None = None, epochs: int = EPOCHS, **settings: Any) -> Found:
    trainer = make(collective, **settings)
    dataset = data(settings.get("dtype", torch.float32))
    trainer.fit(dataset, epochs)
    measured = trainer.evaluate(dataset)
    return {**state(trainer), "measured": repr(measured), "position": repr(trainer.position)}


def alike(work: Callable[[Collective], Any], workers: tuple[int, ...] = WORKERS) -> Any:
    """What all workers return, for every number of them."""
    first = None
    for size in workers:
        seen: set[int] = set()

        def one(collective: Collective, size: int = size, seen: set[int] = seen) -> Any:
            assert collective.size == size
            seen.add(collective.rank)
            return work(collective)

        for found in run_threads(size, one):
            first = found if first is None else first
            assert found == first, size
        assert len(seen) == size
    return first


# ---------------------------------------------------------------------- equal to what it should be


def plain_loop(steps: int) -> tuple[dict[str, Tensor], list[float]]:
    """What everyone would write for one device."""
    torch.manual_seed(7)
    model, over = plain_encoder().double(), Contrast().double()
    optimizer = torch.optim.SGD([*model.parameters(), *over.parameters()], lr=0.1, momentum=0.9)
    inputs, labels = data(torch.float64).tensors
    losses = []
    for step in range(steps):
        lo = step % 3 * BATCH
        total, count = over(*still_views(model, (inputs[lo : lo + BATCH], labels[lo : lo + BATCH])))
        optimizer.zero_grad()
        (total / count).backward()
        optimizer.step()
        losses.append(total.item() / count)
    own = {f"whole_batch_loss.{name}": value for name, value in over.state_dict().items()}
    return {**model.state_dict(), **own}, losses


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("replicate_kib", [0.0, 256.0], ids=["owners", "everywhere"])
def test_it_is_a_plain_loop_over_whole_batches(workers: int, replicate_kib: float) -> None:
    expected, losses = plain_loop(6)

    def work(collective: Collective) -> tuple[dict[str, Tensor], list[float]]:
        sync = Exact(replicate_kib=replicate_kib)
        trainer = make(
            collective, net=plain_encoder, embed=still_views, contrast=Contrast, dtype=torch.float64, plain=True, sync=sync
        )
        batches = trainer.batches(data(torch.float64), 2, order="sequential")
        seen = [trainer.step(batch).loss for batch in batches]
        return {name: value.clone() for name, value in trainer._local.replica.model_state().items()}, seen

    for found, seen in run_threads(workers, work):
        assert found.keys() == expected.keys()
        assert seen == pytest.approx(losses, rel=1e-10)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("settings", [{}, {"precision": "bf16"}, {"max_grad_norm": 0.1, "sync": Exact(overlap=True)}], ids=str)
def test_the_digest_is_the_same_on_any_number_of_workers(settings: dict[str, Any]) -> None:
    found = alike(lambda collective: train(collective, **settings))
    assert found["whole_batch_loss.temperature"] != digest(torch.tensor(0.3))
    assert found["norm.running_mean"] != digest(torch.zeros(12))


def test_statistics_of_the_loss_itself_move_once_a_step() -> None:
    def work(collective: Collective) -> tuple[int, int]:
        trainer = make(collective)
        trainer.fit(data(), 1)
        moved = trainer._local.replica.model_state()
        return int(moved["norm.num_batches_tracked"]), int(moved["whole_batch_loss.norm.num_batches_tracked"])

    assert alike(work) == (3 * 2, 3 * 2)  # two views a step each


def test_a_parameter_of_the_model_that_the_loss_uses_gets_its_gradient_once() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = plain_encoder()
            self.scale = nn.Parameter(torch.tensor(3.0))

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.encoder(x)
            return found

    def gradients(collective: Collective | None) -> dict[str, Tensor]:
        torch.manual_seed(7)
        model = Scaled().double()

        def contrast(one: Tensor, other: Tensor, labels: Tensor) -> Tensor:
            return F.cross_entropy(model.scale * F.normalize(one) @ F.normalize(other).T, torch.arange(len(one)))

        inputs, labels = data(torch.float64).tensors
        if collective is None:
            contrast(*still_views(model, (inputs[:BATCH], labels[:BATCH]))).backward()  # type: ignore[no-untyped-call]
            return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        loss = WholeBatchLoss(still_views, contrast)
        trainer = Trainer(model, optimizer, loss, batch_size=BATCH, microbatches=MICROBATCHES, collective=collective)
        trainer.step(next(trainer.batches(data(torch.float64), 1, order="sequential")))
        return {name: before[name] - parameter.detach() for name, parameter in model.named_parameters()}

    expected = gradients(None)
    assert expected["scale"] != 0
    for workers in WORKERS:
        for found in run_threads(workers, gradients):
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("workers", WORKERS)
def test_an_evaluation_sees_whole_batches_too(workers: int) -> None:
    def retrieved(one: Tensor, other: Tensor, labels: Tensor) -> tuple[Tensor, int]:
        return ((one @ other.T).argmax(dim=1) == torch.arange(len(one))).sum(), len(one)

    def work(collective: Collective) -> dict[str, float]:
        trainer = make(collective, net=plain_encoder, embed=still_views, dtype=torch.float64)
        metrics = {"first": WholeBatchLoss(still_views, retrieved), "loss": trainer._local.replica.loss, "one": lambda *_: 1.0}
        assert trainer.evaluate(data(torch.float64))["loss"] == trainer.evaluate(data(torch.float64), metrics)["loss"]
        return trainer.evaluate(data(torch.float64), metrics, batch_size=3)

    torch.manual_seed(7)
    model, over = plain_encoder().double().eval(), Contrast().double().eval()
    inputs, labels = data(torch.float64).tensors
    losses, hits = 0.0, 0
    for lo in range(0, SAMPLES, BATCH):
        rows = still_views(model, (inputs[lo : lo + BATCH], labels[lo : lo + BATCH]))
        losses, hits = losses + over(*rows)[0].item(), hits + int(retrieved(*rows)[0])
    for found in run_threads(workers, work):
        assert list(found) == ["first", "loss", "one"]
        assert found == pytest.approx({"first": hits / SAMPLES, "loss": losses / SAMPLES, "one": 1.0}, rel=1e-10)


# ---------------------------------------------------------------------- whatever happens


@functools.cache
def undisturbed(epochs: int = EPOCHS) -> Found:
    return train(epochs=epochs)


def live(deaths: dict[int, Death], *, workers: int = 3, joiners: int = 0, **settings: Any) -> Lives:
    run_dir = f"memory://whole-{uuid.uuid4().hex}"
    try:
        work = functools.partial(train, run_dir=run_dir, checkpoint_every=2, sync=Exact(replicate_kib=0), **settings)
        return run_lives(workers, work, deaths, joiners=joiners)
    finally:
        empty_memory()


@pytest.mark.parametrize("told", [False, True], ids=["unheard", "heard"])
def test_a_worker_may_be_lost_at_any_call_to_the_others(told: bool) -> None:
    calls = live({}).calls[1]
    assert calls > 40

    for call in moments(1 + 2 * told, calls + 1, every=17 if told else 29):
        lives = live({1: Death(call, told)})
        assert {0, 2} <= set(lives.results), call
        for found in lives.results.values():
            assert found == undisturbed(), call


def test_workers_that_come_later_take_part() -> None:
    lives = live({}, workers=2, joiners=1, epochs=8)
    assert sorted(lives.results) == [0, 1, 2]
    assert lives.calls[2] > 10, "it did not come in time"
    assert lives.results[0] == lives.results[1] == undisturbed(8)
    assert lives.results[2] == {**undisturbed(8), "position": lives.results[2]["position"]}


@pytest.mark.parametrize(("before", "after"), [(1, 3), (5, 2), (3, 1)])
def test_a_run_goes_on_with_the_temperature_that_it_had(before: int, after: int, tmp_path: Any) -> None:
    def begin(collective: Collective) -> None:
        trainer = make(collective, run_dir=tmp_path)
        for batch in trainer.batches(data(), EPOCHS):
            if trainer.step(batch).step == 4:
                break
        trainer.save()

    run_threads(before, begin)
    for found in run_threads(after, lambda collective: train(collective, run_dir=tmp_path)):
        assert {**found, "position": ""} == {**undisturbed(), "position": ""}


# ---------------------------------------------------------------------- what it costs


def test_the_graph_of_one_microbatch_is_in_memory_at_a_time() -> None:
    alive, most = set[int](), 0

    class Saved:
        def __init__(self, tensor: Tensor) -> None:
            nonlocal most
            self.tensor = tensor.detach()
            alive.add(id(self))
            most = max(most, len(alive))

        def __del__(self) -> None:
            alive.discard(id(self))

    def embed(model: Any, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
            return still_views(model, batch)

    def peak(microbatches: int) -> int:
        nonlocal most
        most = 0
        make(net=plain_encoder, embed=embed, microbatches=microbatches).fit(data(), 1)
        assert not alive
        return most

    assert 0 < peak(8) == peak(2) == peak(1)


@pytest.mark.parametrize(("workers", "times"), [(1, 10), (2, 10), (5, 5)])
def test_a_worker_with_a_single_microbatch_computes_it_once(workers: int, times: int) -> None:
    calls: list[int] = []

    def embed(model: Any, batch: Any) -> Any:
        calls.append(len(batch[0]))
        return still_views(model, batch)

    def work(collective: Collective) -> None:
        trainer = make(collective, net=plain_encoder, embed=embed, contrast=lambda: lambda one, other, _: (one @ other.T).mean())
        trainer.step(next(trainer.batches(data(), 1)))

    run_threads(workers, work)
    assert len(calls) == times


# ---------------------------------------------------------------------- wrong use


def mistake(embed: Any = two_views, contrast: Callable[[], Any] = Contrast, net: Callable[[], nn.Module] = Encoder) -> None:
    trainer = make(embed=embed, contrast=contrast, net=net)
    trainer.step(next(trainer.batches(data(), 1)))


@pytest.mark.parametrize(
    ("embed", "message"),
    [
        (
            lambda model, batch: model(batch[0]).mean(),
            r"embed returned a tensor of shape \(\) for 4 samples: return a tensor with",
        ),
        (lambda model, batch: (model(batch[0]), model(batch[0])[:3]), r"a tensor of shape \(3, 5\) for 4 samples"),
        (lambda model, batch: (model(batch[0]), 3), "embed returned a int"),
        (lambda model, batch: (), "embed returned a NoneType"),
    ],
    ids=["scalar", "fewer", "number", "nothing"],
)
def test_rows_that_do_not_match_the_samples_are_refused(embed: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        mistake(embed)


def test_rows_of_another_kind_in_another_microbatch_are_refused_on_all_workers() -> None:
    def embed(model: Any, batch: Any) -> Tensor:
        found: Tensor = model(batch[0])
        return found[:, :4] if len(batch[0]) == 3 else found

    for workers in (1, 2, 5):
        with pytest.raises(
            ConfigurationError, match=r"microbatch 1 are of another kind.*float32 \[4\] with a gradient, not float32 \[5\]"
        ):
            run_threads(workers, lambda collective: make(collective, embed=embed).fit(data(), 1))


def test_an_embedding_that_keeps_state_between_calls_is_refused() -> None:
    calls: list[int] = []

    def embed(model: Any, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        calls.append(1)
        one, other, labels = two_views(model, batch)
        return one * len(calls), other, labels

    with pytest.raises(ConfigurationError, match="other rows when it was called a second time"):
        mistake(embed)


def test_an_embedding_that_writes_to_weights_behind_pytorchs_back_is_refused() -> None:
    def embed(model: Any, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        found = two_views(model, batch)
        model.last.bias.data.add_(0.1)
        return found

    with pytest.raises(ConfigurationError, match=r"'last.bias' is changed through .data|other rows"):
        mistake(embed)


def test_a_loss_that_does_not_depend_on_the_rows_is_refused() -> None:
    def cut_off(*rows: Tensor) -> tuple[Tensor, int]:
        return rows[0].detach().sum(), 3

    with pytest.raises(ConfigurationError, match="depends neither on the rows that embed has returned"):
        mistake(contrast=lambda: cut_off)


def test_parameters_of_the_loss_that_the_optimizer_lacks_are_named() -> None:
    model = plain_encoder()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ConfigurationError, match=r"lacks 3 trainable parameters: whole_batch_loss\.temperature"):
        Trainer(model, optimizer, WholeBatchLoss(still_views, Contrast()), batch_size=4, microbatches=2)


@pytest.mark.parametrize("workers", WORKERS)
def test_the_microbatch_whose_rows_are_not_finite_is_named(workers: int) -> None:
    dataset = data()
    dataset.tensors[0][9] = torch.nan  # microbatch 2 of 4 + 3 + 3 + 3 + 3

    def work(collective: Collective) -> None:
        make(collective).fit(dataset, 1, order="sequential")

    with pytest.raises(DataError, match=r"step 1: the loss of microbatch 2 is nan \(samples 7, 8, 9\)"):
        run_threads(workers, work)


def test_the_code_in_the_guide_trains_alike() -> None:
    guide = (Path(__file__).parents[2] / "docs" / "guide.md").read_text()
    code = re.search(r"### A loss over the whole batch.*?```python\n(.*?)```", guide, re.DOTALL)
    assert code is not None

    def work(collective: Collective) -> Found:
        torch.manual_seed(0)
        names = {"torch": torch, "nn": nn, "F": F, "model": plain_encoder(), "augment": lambda x: x + 0.1 * torch.randn_like(x)}
        with_workers = functools.partial(Trainer, collective=collective)
        names["unisono"] = type("unisono", (), {"Trainer": with_workers, "WholeBatchLoss": WholeBatchLoss})
        exec(code[1], names)
        trainer = names["trainer"]
        trainer.fit(TensorDataset(torch.randn(520, 6, generator=torch.Generator().manual_seed(1)), torch.zeros(520)), epochs=1)
        return state(trainer)

    assert alike(work, (1, 3))["whole_batch_loss.log_scale"] != digest(torch.tensor(2.0))
