"""Training and evaluation mode of a ``torch.nn.Module``: what is put into which, and back; and what is frozen. *Local.*"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

from torch import nn

from unisono.replica.parameters import named_parameters, plain_name


class ModelModes:
    """See the module.

    A module that is in evaluation mode inside a model in training mode (a frozen BatchNorm) was put there on purpose, and stays
    so. A whole model in evaluation mode, as ``from_pretrained`` returns it, is not.

    Args:
        model: As it is given to the trainer.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._kept = _in_evaluation(model) if model.training else set()
        self._begun: dict[str, bool] | None = None  # the flags with which training began
        self._due: dict[str, bool] = {}

    @contextlib.contextmanager
    def training(self) -> Iterator[bool]:
        """While the body runs the model is in training mode; says whether it was not. Afterwards each module is as it was."""
        found = [(module, module.training) for module in self._model.modules()]
        was_resting = not self._model.training
        if was_resting:
            self._model.train()
            for name, module in self._model.named_modules():
                if name in self._kept:
                    module.training = False
        self._begun = self._flags()
        for name, module in self._model.named_modules():
            module.training = self._due.get(plain_name(name), module.training)
        for name, parameter in named_parameters(self._model):
            parameter.requires_grad_(self._due.get(name, parameter.requires_grad))
        self._due = {}
        try:
            yield was_resting
        finally:
            self._begun = None
            for module, training in found:
                module.training = training

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """While the body runs the model is in evaluation mode. Afterwards each module is as it was."""
        found = [(module, module.training) for module in self._model.modules()]
        self._model.eval()
        try:
            yield
        finally:
            for module, training in found:
                module.training = training

    def changed(self) -> dict[str, bool]:
        """The modules that someone has put into another mode since training began, by name: whether it is training mode. And the
        parameters that someone has frozen: whether they require a gradient."""
        begun = self._begun
        return {} if begun is None else {name: flag for name, flag in self._flags().items() if begun.get(name) is not flag}

    def change(self, changed: Mapping[str, bool]) -> None:
        """What ``changed`` gave, of this run at another time or place: it is done when training begins."""
        self._due = {plain_name(name): flag for name, flag in changed.items()}

    def _flags(self) -> dict[str, bool]:
        modes = {plain_name(name): module.training for name, module in self._model.named_modules()}
        return modes | {name: parameter.requires_grad for name, parameter in named_parameters(self._model)}


def _in_evaluation(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if not module.training}
