"""Every optimizer of PyTorch's own test database: equal to the plain loop, bit-equal for any number of workers and resumes."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR, ReduceLROnPlateau
from torch.testing._internal.common_optimizers import optim_db

import unisono
from tests.reference.harness import (
    Outcome,
    Samples,
    Setup,
    assert_close,
    assert_optimizers_close,
    assert_same_bits,
    assert_same_tensors,
    in_unison,
    outcome,
    plainly,
)
from unisono.collective import Collective
from unisono.testing import run_threads

REFUSED = {"LBFGS", "SparseAdam"}
FITTING = {info.optim_cls.__name__: info for info in optim_db if info.optim_cls.__name__ not in REFUSED}
RUN = {"batch_size": 10, "microbatches": 5}
RICHEST: dict[str, dict[str, Any]] = {
    # Settings with the most state, where the database's last ones are not.
    "Adam": {"amsgrad": True, "weight_decay": 0.1},
    "AdamW": {"amsgrad": True, "weight_decay": 0.1},
    "Muon": {"momentum": 0.8, "weight_decay": 0.2},
}


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    number: int
    settings: dict[str, Any]
    flag: str

    @property
    def id(self) -> str:
        return f"{self.name}-{self.number}-{self.flag or 'loop'}"


def cases() -> list[Case]:
    """All settings of the database, as a loop over parameters, and foreach and fused where the optimizer has them."""
    found: list[Case] = []
    for name, info in FITTING.items():
        # "differentiable" is left out: it updates leaves in place under autograd, which PyTorch forbids in real training.
        flags = [
            flag for flag in info.supported_impls if flag == "foreach" or (flag == "fused" and "cpu" in info.supports_fused_on)
        ]
        for number, given in enumerate(info.optim_inputs_func(device="cpu")):
            tensor_rate = isinstance(given.kwargs.get("lr"), Tensor)
            for flag in ("", *flags):
                if flag == "foreach" and tensor_rate:
                    continue  # PyTorch refuses it unless capturable, which is for CUDA
                settings = {**given.kwargs, **dict.fromkeys(flags, False)}
                found.append(Case(name, number, settings | ({flag: True} if flag else {}), flag))
    return found


CASES = cases()


class Net(nn.Module):
    """Matrices alone, as Muon asks for, or with vectors too."""

    def __init__(self, *, vectors: bool) -> None:
        super().__init__()
        self.first = nn.Linear(6, 9, bias=vectors)
        self.second = nn.Linear(9, 5, bias=vectors)
        self.out = nn.Linear(5, 3, bias=vectors)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.out(torch.tanh(self.second(torch.tanh(self.first(inputs)))))


def loss(model: Any, batch: Any) -> tuple[Tensor, int]:
    inputs, labels = batch
    return F.cross_entropy(model(inputs), labels, reduction="sum"), len(labels)


def data() -> Samples:
    generator = torch.Generator().manual_seed(1)
    return Samples(torch.randn(28, 6, generator=generator, dtype=torch.float64), torch.randint(0, 3, (28,), generator=generator))


def setup(name: str, settings: dict[str, Any], *, scheduler: str = "") -> Setup:
    torch.manual_seed(2)
    model = Net(vectors=name != "Muon").double()
    optimizer = FITTING[name].optim_cls(model.parameters(), **copy.deepcopy(settings))
    schedulers = {"": lambda _: None, "cosine": lambda o: CosineAnnealingLR(o, 6), "plateau": _eager_plateau}
    return Setup(model, optimizer, loss, schedulers[scheduler](optimizer))


def _eager_plateau(optimizer: torch.optim.Optimizer) -> ReduceLROnPlateau:
    return ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=0.5)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_optimizer_trains_as_in_the_plain_loop_and_bit_equal_for_any_number_of_workers(case: Case) -> None:
    def make() -> Setup:
        return setup(case.name, case.settings)

    workers = (1, 2, 3, 5) if case.flag == "" else (1, 3)
    first, *others = (in_unison(size, make, data(), **RUN, epochs=2) for size in workers)
    for size, other in zip(workers[1:], others, strict=True):
        assert_same_bits(first, other, f"{size} workers")
    plain = plainly(make, data(), batch_size=RUN["batch_size"], epochs=2)
    assert_close(first, plain, 1e-10)
    assert_optimizers_close(first, plain, 1e-10)


def test_every_optimizer_of_the_database_is_in_the_matrix_or_refused() -> None:
    assert {case.name for case in CASES} | REFUSED == {info.optim_cls.__name__ for info in optim_db}
    assert {case.flag for case in CASES} == {"", "foreach", "fused"}


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_optimizers_whose_update_cannot_be_shared_out_are_refused(name: str) -> None:
    model = Net(vectors=True)
    info = next(info for info in optim_db if info.optim_cls.__name__ == name)
    for given in info.optim_inputs_func(device="cpu"):
        optimizer = info.optim_cls(model.parameters(), **given.kwargs)
        with pytest.raises(unisono.ConfigurationError, match=name):
            unisono.Trainer(model, optimizer, loss, batch_size=10, microbatches=2)


def _groups(name: str) -> Setup:
    """Three groups with settings of their own: one slow, one with weight decay, one frozen but for its matrix."""
    torch.manual_seed(2)
    model = Net(vectors=name != "Muon").double()
    kind = FITTING[name].optim_cls
    rate = kind([nn.Parameter(torch.zeros(2, 2))]).param_groups[0]["lr"]
    groups: list[dict[str, Any]] = [
        {"params": list(model.out.parameters()), "lr": rate / 10},
        {"params": list(model.first.parameters())} | ({"weight_decay": 0.2} if name not in ("Rprop",) else {}),
        {"params": list(model.second.parameters()), "lr": rate / 2},
    ]
    if model.second.bias is not None:
        model.second.bias.requires_grad_(False)
    optimizer = kind(groups)
    return Setup(model, optimizer, loss, CosineAnnealingLR(optimizer, 6))


@pytest.mark.parametrize("name", FITTING)
def test_parameter_groups_keep_their_own_settings(name: str) -> None:
    runs = [in_unison(size, lambda: _groups(name), data(), **RUN, epochs=2) for size in (1, 2, 3)]
    for run in runs[1:]:
        assert_same_bits(runs[0], run)
    plain = plainly(lambda: _groups(name), data(), batch_size=RUN["batch_size"], epochs=2)
    assert_close(runs[0], plain, 1e-10)
    assert_optimizers_close(runs[0], plain, 1e-10)


def _resumed(make: Any, run_dir: Path, workers: int, *, epochs: int) -> Outcome:
    """Trains the run in ``run_dir`` up to ``epochs`` epochs of three steps; the losses are those of this start only."""

    def work(collective: Collective) -> Outcome:
        made: Setup = make()
        trainer = unisono.Trainer(
            made.model,
            made.optimizer,
            made.loss,
            **RUN,
            scheduler=made.scheduler,
            run_dir=run_dir,
            collective=collective,
        )
        results = [trainer.step(batch) for batch in trainer.batches(data(), epochs)]
        return outcome(
            made.model, made.optimizer, [result.loss for result in results], [result.gradient_norm for result in results]
        )

    outcomes = run_threads(workers, work)
    state = {name: value for other in outcomes for name, value in other.optimizer.items()}
    for other in outcomes[1:]:
        assert_same_tensors(other.state, outcomes[0].state, "another worker")
    return dataclasses.replace(outcomes[0], optimizer=state)


@pytest.mark.parametrize("scheduler", ["cosine", "plateau"])
@pytest.mark.parametrize("name", FITTING)
def test_three_steps_and_three_more_on_other_workers_equal_six(name: str, scheduler: str, tmp_path: Path) -> None:
    settings = RICHEST.get(name, FITTING[name].optim_inputs_func(device="cpu")[-1].kwargs)

    def make() -> Setup:
        return setup(name, settings, scheduler=scheduler)

    whole = in_unison(1, make, data(), **RUN, epochs=2)
    assert len(whole.losses) == 6
    first = _resumed(make, tmp_path, 2, epochs=1)
    rest = _resumed(make, tmp_path, 3, epochs=2)
    joined = dataclasses.replace(rest, losses=first.losses + rest.losses, norms=first.norms + rest.norms)
    assert_same_bits(whole, joined, "resumed")


@pytest.mark.parametrize("flag", ["foreach", "fused"])
@pytest.mark.parametrize("name", ["Adam", "AdamW", "Adagrad", "SGD"])
def test_foreach_and_fused_state_survives_a_change_of_workers(name: str, flag: str, tmp_path: Path) -> None:
    settings = {flag: True} | ({"momentum": 0.9} if name == "SGD" else {})

    def make() -> Setup:
        return setup(name, settings)

    whole = in_unison(1, make, data(), **RUN, epochs=2)
    first = _resumed(make, tmp_path, 3, epochs=1)
    rest = _resumed(make, tmp_path, 2, epochs=2)
    joined = dataclasses.replace(rest, losses=first.losses + rest.losses, norms=first.norms + rest.norms)
    assert_same_bits(whole, joined, "resumed")
