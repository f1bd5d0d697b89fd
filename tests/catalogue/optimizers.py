"""The optimizers of pytorch-optimizer, schedulefree and of one's own, made for a small model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytorch_optimizer as others
import schedulefree
import torch
from torch import nn
from torch.optim import Optimizer

_MUONS = {"adago", "adamuon", "distributedmuon", "muon", "muonclip", "normuon"}
_OF_A_MODEL = {"adalomo", "adammini", "lomo"}
_NEEDED: dict[str, dict[str, Any]] = {"bsam": {"num_data": 46}, "ranger21": {"num_iterations": 100}}
NAMES: list[str] = sorted(others.get_supported_optimizers())
REFUSED = {
    "adahessian": "does not require grad",
    "adalomo": "changed in place by forward or backward",
    "alig": "closure",
    "bsam": "closure",
    "demo": "einops|process group",
    "distributedmuon": "process group",
    "lbfgs": "closure",
    "lomo": "changed in place by forward or backward",
    "sophiah": "does not require grad",
    "spectralsphere": "2D",
}
"""Those that train nothing here, and what the error says: it is the optimizer's own, or says why unisono cannot use it."""


def other(name: str, **settings: Any) -> Callable[[nn.Module], Optimizer]:
    """One of pytorch-optimizer, at a learning rate at which it couples parameters if it ever does."""

    def make(model: nn.Module) -> Optimizer:
        given = {"lr": 1.0 if name.startswith(("prodigy", "dadapt")) else 1e-2, **_NEEDED.get(name, {}), **settings}
        kind = others.load_optimizer(name)
        if name in _OF_A_MODEL:
            found: Optimizer = kind(model, **given)
        elif name in _MUONS:
            found = kind(by_dimensions(model), **given)
        else:
            found = kind(model.parameters(), **given)
        return found

    return make


def by_dimensions(model: nn.Module) -> list[dict[str, Any]]:
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    rest = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    return [{"params": matrices, "use_muon": True}, {"params": rest, "use_muon": False}]


def lookahead(model: nn.Module) -> Optimizer:
    return others.Lookahead(torch.optim.AdamW(model.parameters(), lr=1e-2), k=3)


def schedule_free_wrapper(model: nn.Module) -> Optimizer:
    return others.ScheduleFreeWrapper(torch.optim.AdamW(model.parameters(), lr=1e-2))


def trac(model: nn.Module) -> Optimizer:
    return others.TRAC(torch.optim.AdamW(model.parameters(), lr=1e-2))


def ortho_grad(model: nn.Module) -> Optimizer:
    return others.OrthoGrad(torch.optim.AdamW(model.parameters(), lr=1e-2))


def schedule_free_adamw(model: nn.Module) -> Optimizer:
    return schedulefree.AdamWScheduleFree(model.parameters(), lr=1e-2, warmup_steps=2)


def schedule_free_sgd(model: nn.Module) -> Optimizer:
    return schedulefree.SGDScheduleFree(model.parameters(), lr=1e-1)


def schedule_free_radam(model: nn.Module) -> Optimizer:
    return schedulefree.RAdamScheduleFree(model.parameters(), lr=1e-2)


class MuonAndAdamW(Optimizer):
    """As people write it: one optimizer that holds two."""

    def __init__(self, model: nn.Module) -> None:
        matrices, rest = by_dimensions(model)
        self.parts = [torch.optim.Muon(matrices["params"], lr=2e-2), torch.optim.AdamW(rest["params"], lr=1e-2)]
        super().__init__(model.parameters(), {})
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self.parts for group in part.param_groups]


WRAPPERS: list[Callable[[nn.Module], Optimizer]] = [lookahead, schedule_free_wrapper, trac, ortho_grad, MuonAndAdamW]
SCHEDULE_FREE: list[Callable[[nn.Module], Optimizer]] = [schedule_free_adamw, schedule_free_sgd, schedule_free_radam]
