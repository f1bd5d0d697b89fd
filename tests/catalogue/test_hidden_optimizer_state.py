"""What an optimizer keeps besides a state for each parameter goes on, with a stop, on other workers, and through a death."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import unisono
from tests.catalogue.optimizers import NAMES, REFUSED, WRAPPERS, MuonAndAdamW, by_dimensions, other
from tests.catalogue.trained import Death, Net, drawn, in_lives, in_threads, loss
from unisono.collective import Collective
from unisono.errors import CheckpointError, ConfigurationError
from unisono.testing import run_threads

Make = Callable[[nn.Module], Optimizer]
CASES: dict[str, Make] = {
    # keys of optimizer.state that are no parameters
    "madgrad": other("madgrad"),
    "spam": other("spam"),
    # more entries in state_dict()
    "ranger21": other("ranger21"),
    "stablespam": other("stablespam"),
    "magma": other("magma"),
    # coupled, random, with settings that count
    "prodigy": other("prodigy"),
    "dadaptadam": other("dadaptadam"),
    "kron": other("kron"),
    "dash": other("dash"),
    # queues, and numbers as keys
    "adashift": other("adashift"),
    "aggmo": other("aggmo"),
    **{make.__name__: make for make in WRAPPERS},
}


@pytest.mark.parametrize("name", CASES)
def test_a_run_goes_on_with_other_workers_as_if_it_had_not_stopped(name: str, tmp_path: Path) -> None:
    straight = in_threads(1, CASES[name], epochs=3)
    for workers, epochs in ((2, 1), (3, 2)):
        in_threads(workers, CASES[name], epochs=epochs, run_dir=tmp_path)
    assert in_threads(1, CASES[name], epochs=3, run_dir=tmp_path) == straight


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("death", [Death(24), Death(33, told=True, told_to=0)], ids=["unheard", "heard by one"])
def test_a_death_changes_nothing_and_who_comes_later_goes_on_alike(name: str, death: Death) -> None:
    lives = in_lives(2, CASES[name], {1: death}, joiners=1, epochs=4)
    assert set(lives.results) == {0, 2}
    assert set(lives.results.values()) == {in_threads(1, CASES[name], epochs=4)}


class Hides(torch.optim.SGD):
    """Keeps a step count and a mean where no state_dict() shows them."""

    def __init__(self, model: nn.Module, **_: Any) -> None:
        super().__init__(model.parameters(), lr=0.1)
        self.steps = 0
        self.means: dict[Tensor, Tensor] = {}

    def step(self, closure: Any = None) -> Any:
        self.steps += 1
        for parameter in self.param_groups[0]["params"]:
            mean = self.means.setdefault(parameter, torch.zeros_like(parameter))
            parameter.grad.add_(mean.lerp_(parameter.grad, 0.1), alpha=1 / self.steps)
        return super().step(closure)


class HidesAnother(MuonAndAdamW):
    """Forgets to save what it holds."""

    state_dict = Optimizer.state_dict  # type: ignore[assignment]
    load_state_dict = Optimizer.load_state_dict  # type: ignore[assignment]


class TakesHalf(MuonAndAdamW):
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.parts[0].load_state_dict(state_dict["parts"][0])


@pytest.mark.parametrize(("make", "what"), [(Hides, "steps, means"), (HidesAnother, r"parts\[0\]"), (TakesHalf, r"parts\[1\]")])
def test_state_that_is_not_in_the_state_dict_is_refused_after_the_first_step(make: Make, what: str, tmp_path: Path) -> None:
    steps: list[int] = []

    class Notes(unisono.Callback):
        def on_step(self, trainer: unisono.Trainer, result: unisono.StepResult) -> None:
            steps.append(result.step)

    with pytest.raises(ConfigurationError, match=rf"state_dict\(\) does not hold.*: {what}"):
        in_threads(2, make, run_dir=tmp_path, callbacks=[Notes()])
    assert steps == []
    assert in_threads(1, make) == in_threads(3, make), "where nothing has to be carried it may be trained"


class WithAnObject(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        found = super().step(closure)
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["note"] = {1, 2}
        return found


class Special(Tensor):
    pass


class WithATensorOfItsOwn(torch.optim.SGD):
    """As the low-bit optimizers of torchao."""

    def step(self, closure: Any = None) -> Any:
        found = super().step(closure)
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["moment"] = torch.zeros(3).as_subclass(Special)
        return found


@pytest.mark.parametrize(
    ("kind", "what"), [(WithAnObject, "builtins.set"), (WithATensorOfItsOwn, "Special, a tensor that would")]
)
def test_state_that_cannot_be_saved_is_refused_at_the_first_step(kind: Any, what: str, tmp_path: Path) -> None:
    def make(model: nn.Module) -> Optimizer:
        optimizer: Optimizer = kind(model.parameters(), lr=0.1, momentum=0.9)
        return optimizer

    def work(collective: Collective) -> int:
        torch.manual_seed(0)
        model = Net()
        trainer = unisono.Trainer(
            model, make(model), loss, batch_size=12, microbatches=4, run_dir=tmp_path, collective=collective
        )
        with pytest.raises(CheckpointError, match=what):
            trainer.fit(drawn(), 3)
        return trainer.position.step

    assert run_threads(2, work) == [0, 0]


class DrawsByItself(torch.optim.SGD):
    """Has a generator of each kind."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model.parameters(), lr=0.1, momentum=0.9)
        self.mine = {"torch": torch.Generator().manual_seed(1), "random": random.Random(2)}
        self.others = [np.random.default_rng(3), np.random.RandomState(4)]

    def step(self, closure: Any = None) -> Any:
        for parameter in self.param_groups[0]["params"]:
            drawn = float(torch.rand((), generator=self.mine["torch"])) + self.mine["random"].random()  # type: ignore[arg-type, union-attr]
            parameter.grad.mul_(drawn + self.others[0].random() + self.others[1].rand())
        return super().step(closure)


def test_generators_of_an_optimizers_own_are_seeded_too(tmp_path: Path) -> None:
    straight = in_threads(1, DrawsByItself, epochs=2)
    in_threads(3, DrawsByItself, epochs=1, run_dir=tmp_path)
    assert in_threads(2, DrawsByItself, epochs=2, run_dir=tmp_path) == straight
    assert set(in_lives(3, DrawsByItself, {1: Death(30)}).results.values()) == {straight}


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_state_of_other_dtypes_is_not_rounded_on_its_way(workers: int, tmp_path: Path) -> None:
    """PyTorch would cast it to the parameter's dtype."""

    class Fine(MuonAndAdamW):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            held = [(part, p) for part in self.parts for group in part.param_groups for p in group["params"]]
            fine = [part.state[p].get("fine", 0) + p.grad.double() / 3 for part, p in held]
            for (_, parameter), value in zip(held, fine, strict=True):
                parameter.grad.copy_(value)
            super().step(closure)
            for (part, parameter), value in zip(held, fine, strict=True):
                part.state[parameter]["fine"] = value

    straight = in_threads(1, Fine, epochs=2)
    in_threads(2, Fine, epochs=1, run_dir=tmp_path)
    assert in_threads(workers, Fine, epochs=2, run_dir=tmp_path) == straight


def test_such_state_cannot_be_divided(tmp_path: Path) -> None:
    sync = unisono.Exact(replicate_kib=0, shard_update=True)
    with pytest.raises(ConfigurationError, match="keeps more than a state for each parameter"):
        in_threads(2, MuonAndAdamW, run_dir=tmp_path, sync=sync)


def test_workers_that_differ_in_it_at_the_start_take_worker_0s(tmp_path: Path) -> None:
    def work(collective: Collective) -> list[float]:
        torch.manual_seed(0)
        model = Net()
        optimizer = MuonAndAdamW(model)
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 1.0 + collective.rank)
        weights = {name: value.clone() for name, value in model.state_dict().items()}
        optimizer.step()
        model.load_state_dict(weights)
        trainer = unisono.Trainer(model, optimizer, loss, batch_size=12, microbatches=4, collective=collective)
        trainer.fit(drawn(), 1)
        return [float(value.sum()) for part in optimizer.parts for state in part.state.values() for value in state.values()]

    results = run_threads(3, work)
    assert results[0] == results[1] == results[2]


def test_an_error_of_the_first_update_says_how_step_was_called() -> None:
    with pytest.raises(ConfigurationError, match=r"AliG.step\(\) raised NoClosureError.*without a closure"):
        in_threads(2, other("alig"))


def test_the_recipe_of_the_guide_for_several_optimizers(tmp_path: Path) -> None:
    guide = (Path(__file__).parents[2] / "docs" / "guide.md").read_text()
    code = re.search(r"### Several optimizers.*?```python\n(.*?)\noptimizer = ", guide, re.DOTALL)
    assert code is not None
    names: dict[str, Any] = {"torch": torch}
    exec(code[1], names)

    def make(model: nn.Module) -> Optimizer:
        matrices, rest = (group["params"] for group in by_dimensions(model))
        found: Optimizer = names["Several"](torch.optim.Muon(matrices, lr=0.02), torch.optim.AdamW(rest, lr=1e-2))
        return found

    straight = in_threads(1, make, epochs=2)
    in_threads(2, make, epochs=1, run_dir=tmp_path)
    assert in_threads(3, make, epochs=2, run_dir=tmp_path) == straight
    assert set(in_lives(3, make, {0: Death(30)}).results.values()) == {straight}


NOT_CARRIED = {
    "conda": "projector: its type is",
    "scalableshampoo": "pre_conditioner: its type is",
    "emofact": "does not hold.*prev_loss",
    "sara": "does not hold.*_mask_indices",
}


@pytest.mark.parametrize("name", NOT_CARRIED)
def test_what_pytorch_optimizer_does_not_let_go_on_is_refused_where_it_would_have_to(name: str, tmp_path: Path) -> None:
    assert in_threads(1, other(name), epochs=1) == in_threads(2, other(name), epochs=1)
    with pytest.raises(unisono.UnisonoError, match=NOT_CARRIED[name]):
        in_threads(2, other(name), run_dir=tmp_path)
    with pytest.raises(unisono.UnisonoError, match=NOT_CARRIED[name]):
        in_lives(2, other(name), {})


@pytest.mark.parametrize("name", sorted(set(NAMES) - set(REFUSED) - set(NOT_CARRIED)))
def test_all_others_of_pytorch_optimizer_go_on_after_a_stop(name: str, tmp_path: Path) -> None:
    straight = in_threads(1, other(name), epochs=2)
    in_threads(2, other(name), epochs=1, run_dir=tmp_path)
    assert in_threads(3, other(name), epochs=2, run_dir=tmp_path) == straight
