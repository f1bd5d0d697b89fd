"""A ``torch.nn.Module``, its ``torch.optim.Optimizer`` and its scheduler, behind the seam of ``replica/base.py``."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.hooks import RemovableHandle

from unisono.collective.talk import Talk
from unisono.errors import ConfigurationError
from unisono.layout import Allocate
from unisono.replica import optimizer as optimizers
from unisono.replica.base import LossFunction, LossPart, MetricFunction, Microbatch, Replica
from unisono.replica.first_loss import check_leaves, warn_of_mean
from unisono.replica.loss import sum_and_count, to_device
from unisono.replica.model_guard import ModelGuard
from unisono.replica.model_modes import ModelModes
from unisono.replica.one_pass import OnePass
from unisono.replica.optimizer_modes import Modes
from unisono.replica.optimizer_state import Twin, generators, load_whole_state, seed_generator, whole_state
from unisono.replica.parameters import adopt, check_model, in_slot_order, layout_of, named_parameters, plain_name, trainable
from unisono.replica.tables import Tables
from unisono.replica.torch_buffers import TorchBuffers
from unisono.sync.base import GradientSink

Precision = Literal["fp32", "bf16"]


class TorchReplica(Replica):
    """See the module.

    Args:
        model: The bare model; moved to ``device``.
        optimizer: Over its parameters.
        loss: See ``LossFunction``.
        scheduler: Over the optimizer; None: learning rates stay.
        precision: "fp32" leaves dtypes alone; "bf16" runs the loss under autocast to bfloat16.

    Raises:
        ConfigurationError: Model or optimizer cannot be trained exactly.
    """

    optimizer: Optimizer
    buffers: TorchBuffers

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        loss: LossFunction,
        *,
        scheduler: Any = None,
        device: torch.device,
        precision: Precision = "fp32",
    ) -> None:
        check_model(model)
        optimizers.check_optimizer(optimizer, trainable(model), model)
        optimizers.check_scheduler(scheduler)
        model.to(device)
        self.model = model
        self._whole = model  # all that is trained; a subclass may show a part of it as the model
        self._model_modes = ModelModes(model)
        self.loss = loss
        self.device = device
        self.optimizer = optimizer
        self.scheduler = scheduler
        named = trainable(model)
        self.layout = layout_of(named)
        self.buffers = TorchBuffers(model)
        self.parameters = in_slot_order(self.layout, named)
        self._tables = Tables(model)
        self.sparse = self._tables.slots(self.parameters)
        self._autocast = precision == "bf16"
        self._all = named_parameters(model)
        self._held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self._groups = {id(p): number for number, group in enumerate(optimizer.param_groups) for p in group["params"]}
        self._guard = ModelGuard(model, optimizer)
        self._addresses = [parameter.data_ptr() for parameter in self.parameters]
        self.updates_apart = optimizers.updates_apart(optimizer)
        if not optimizers.is_known(optimizer):
            self.wants_rows = self._tables.asked(self.parameters)
        self._modes = Modes(optimizer)
        self.has_modes = self._modes.exist
        self._generators: list[Any] | None = None
        self._has_updated = False
        self._is_first, self._warns = True, False
        self._hooks: list[RemovableHandle] = []
        self._one_pass = OnePass(
            model,
            self.parameters,
            self._tables,
            separate=self._backward,
            run_loss=self._run_loss,
            place=self._place,
            restore=self.buffers.restore,
        )
        self._early: GradientSink | None = None  # takes the gradients of the backward that runs

    # ------------------------------------------------------------------ the model

    def adopt(self, allocate: Allocate) -> list[Tensor]:
        flats = adopt(self.layout, self.parameters, allocate)
        self._addresses = [parameter.data_ptr() for parameter in self.parameters]
        self._one_pass.moved()
        return flats

    def tensors(self) -> dict[str, Tensor]:
        return {**dict(named_parameters(self._whole)), **self.buffers.named()}

    def frozen(self) -> dict[str, Tensor]:
        # Those in a format of their own (quantized, say) are as the script made them: their bytes are their own affair.
        return {
            name: parameter
            for name, parameter in self._guard.frozen
            if type(parameter.data) is Tensor
            and parameter.layout is torch.strided
            and parameter.numel()
            and not parameter.is_meta
        }

    def model_state(self) -> dict[str, Any]:
        return {plain_name(name): value for name, value in self._whole.state_dict().items()}

    def load_model_state(self, state: Mapping[str, Any]) -> None:
        names = {plain_name(name): name for name in self._whole.state_dict()}
        # Those of a compiled model, in files of earlier versions, are not plain.
        self._whole.load_state_dict({names.get(plain_name(name), name): value for name, value in state.items()})

    def final_state(self) -> dict[str, Any]:
        if not self.has_modes:
            return self.model_state()
        with self._modes.evaluating():
            return {name: value.clone() if isinstance(value, Tensor) else value for name, value in self.model_state().items()}

    def rest(self) -> None:
        self._modes.rest()

    def train(self) -> bool:
        return self._modes.train()

    def check_unchanged(self) -> None:
        self._guard.check_parts()

    def edits(self) -> list[int]:
        return [parameter._version for parameter in self.parameters]

    def kinds(self) -> dict[str, Any]:
        scheduler = None if self.scheduler is None else type(self.scheduler).__name__
        schedule = optimizers.schedule_settings(self.scheduler)
        return {"optimizer": type(self.optimizer).__name__, "scheduler": scheduler, "schedule": schedule}

    def training(self) -> contextlib.AbstractContextManager[bool]:
        return self._model_modes.training()

    @property
    def is_resting(self) -> bool:
        return not self.model.training

    def changed_modes(self) -> dict[str, bool]:
        return self._model_modes.changed()

    def change_modes(self, changed: Mapping[str, bool]) -> None:
        self._model_modes.change(changed)

    # ------------------------------------------------------------------ a step

    def begin_step(self) -> None:
        addresses = [parameter.data_ptr() for parameter in self.parameters]
        if addresses != self._addresses:
            moved = next(index for index, address in enumerate(addresses) if address != self._addresses[index])
            raise ConfigurationError(
                f"parameter {self.layout.names[moved]!r} was moved to other memory after the Trainer was made "
                "(model.to(), .half(), or an assignment to .data): change the model before Trainer(...), and change "
                "values in place"
            )
        self._guard.check_parts()
        self._modes.train()
        for parameter in self._held:
            parameter.grad = None  # what a backward of the user's own may have left behind

    def gradients(self, microbatches: Sequence[Microbatch], seeds: Sequence[int], sink: GradientSink) -> list[LossPart]:
        before = self._guard.values()
        try:
            parts = self._one_pass.compute(microbatches, seeds, sink)
        except BaseException:
            self._early = None
            for parameter in self.parameters:
                parameter.grad = None
            raise
        self.buffers.check_known()
        self._guard.check_values(before)
        return parts

    def _take_gradients(self) -> list[Tensor | None]:
        gradients = [parameter.grad for parameter in self.parameters]
        for parameter in self.parameters:
            parameter.grad = None
        return gradients

    def _place(self, data: Any) -> Any:
        return to_device(data, self.device)

    def _run_loss(self, batch: Any, samples: int, seed: int) -> tuple[Tensor, float]:
        self.seed(seed)
        with self._precision():
            returned = self.loss(self.model, batch)
        found = sum_and_count(returned, samples, what="loss")
        if self._warns:
            warn_of_mean(returned, samples)
        return found

    def _backward(self, microbatch: Microbatch, seed: int, sink: GradientSink) -> LossPart:
        versions = [parameter._version for _, parameter in self._all]
        before = self._known_gradients() if self._is_first else []
        talk = Talk() if self._is_first else None
        self._warns = self._is_first and microbatch.number == 0  # one worker has it
        with self._tables.switched():
            total, count = self._run_loss(self._place(microbatch.data), len(microbatch.indices), seed)
            if talk is not None:
                talk.check()
                self._warns = False
                self._check_no_backward(before)
                check_leaves(total, [parameter for _, parameter in self._all])
            if sink.takes_early(microbatch.number):
                self._install_hooks()
                self._early = sink
            if total.requires_grad:
                total.backward()  # type: ignore[no-untyped-call]
            self._early = None
        if count and not total.requires_grad:
            raise ConfigurationError(
                "the loss does not depend on any trainable parameter: return it as computed from the model's output, "
                "without .detach(), .item() or torch.no_grad()"
            )
        self._check_parameters(versions)
        # Nothing here holds on to gradients: the next microbatch computes in the memory that they leave.
        sink.add(microbatch.number, self._take_gradients())
        return LossPart(total.detach(), count)

    def _known_gradients(self) -> list[tuple[int, int] | None]:
        """What tells whether a gradient has changed: identity and version."""
        gradients = [parameter.grad for _, parameter in self._all]
        return [None if gradient is None else (id(gradient), gradient._version) for gradient in gradients]

    def _check_no_backward(self, before: Sequence[tuple[int, int] | None]) -> None:
        self._is_first = False
        if self._known_gradients() != before:
            raise ConfigurationError(
                "the loss function calls backward(), and every gradient would count twice: return the loss (its sum over the "
                "microbatch, and the count); the trainer calls backward() and steps the optimizer"
            )

    def _check_parameters(self, versions: list[int]) -> None:
        for (name, parameter), version in zip(self._all, versions, strict=True):
            if parameter._version != version:
                raise ConfigurationError(
                    f"parameter {name!r} is changed in place by forward or backward, so it would depend on which microbatches a "
                    "worker computes. Embedding(max_norm=...) does this, as do optimizers that update in backward (LOMO), and "
                    "statistics that a model keeps in frozen parameters: make these buffers, and change weights between steps, "
                    "on every worker, in a callback"
                )

    def _install_hooks(self) -> None:
        if self._hooks:
            return
        for slot, parameter in enumerate(self.parameters):
            self._hooks.append(parameter.register_post_accumulate_grad_hook(self._hook(slot)))  # type: ignore[no-untyped-call]

    def _hook(self, slot: int) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            if self._early is not None and parameter.grad is not None:
                gradient, parameter.grad = parameter.grad, None
                self._early.early(slot, gradient)

        return hook

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        """The context in which forward runs."""
        if self._autocast:
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return contextlib.nullcontext()

    def seed_update(self, seed: int) -> None:
        if self.updates_apart:
            return  # it draws nothing
        self.seed(seed)
        if self._generators is None:
            self._generators = generators(self.optimizer)
        for number, generator in enumerate(self._generators):
            seed_generator(generator, seed ^ (number + 1))

    def update(self, slots: Sequence[int], gradients: Sequence[Tensor]) -> None:
        if self.updates_apart and optimizers.calls_hooks(self.optimizer):
            raise ConfigurationError(
                f"a hook was registered on the step of {type(self.optimizer).__name__} after the Trainer was made, and may mix "
                "parameters that different workers update: register it before Trainer(...)"
            )
        for slot, gradient in zip(slots, gradients, strict=True):
            self.parameters[slot].grad = gradient
        try:
            self.optimizer.step()
        except Exception as error:
            if self._has_updated or optimizers.is_known(self.optimizer):
                raise
            hint = ". If it wants dense gradients, make the tables with sparse=False" if self.wants_rows else ""
            raise ConfigurationError(
                f"the first update failed: {type(self.optimizer).__name__}.step() raised {type(error).__name__}: {error} "
                "(unisono calls step() without a closure, with gradients that no further backward can go through)" + hint
            ) from error
        finally:
            for slot in slots:
                self.parameters[slot].grad = None
        self._has_updated = True

    def learning_rates(self) -> tuple[float, ...]:
        rates = (group.get("lr") for group in self.optimizer.param_groups)
        return tuple(float(rate) for rate in rates if rate is not None)  # None: the optimizer finds one itself

    # ------------------------------------------------------------------ evaluation

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        # Not inference_mode: what a model caches in it could never be used in training.
        with self._model_modes.evaluating(), torch.no_grad(), self._modes.evaluating():
            yield

    def evaluate(self, metrics: Mapping[str, MetricFunction], data: Any, samples: int, seed: int) -> Tensor:
        batch = to_device(data, self.device)
        rows: list[Tensor] = []
        for name, metric in metrics.items():
            self.seed(seed)
            with self._precision():
                value, count = sum_and_count(metric(self.model, batch), samples, what=f"metric {name!r}")
            rows.append(torch.stack([value.detach().double(), torch.full_like(value, count, dtype=torch.float64)]).cpu())
        return torch.stack(rows)

    # ------------------------------------------------------------------ the optimizer's state

    def slot_state(self, slot: int) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self.optimizer.state.get(self.parameters[slot], _NO_STATE)
        return found

    def place_state(self, slot: int, key: str, value: Any) -> None:
        self.optimizer.state[self.parameters[slot]][key] = value

    def set_slot_state(self, slot: int, state: Mapping[str, Any], *, strides: bool = True) -> None:
        parameter = self.parameters[slot]
        group = self.optimizer.param_groups[self._groups[id(parameter)]]
        self.optimizer.state[parameter] = {
            key: optimizers.placed(value, parameter, key, group, strides=strides) for key, value in state.items()
        }

    def whole_state(self) -> dict[str, Any] | None:
        return None if optimizers.is_known(self.optimizer) else whole_state(self.optimizer, self.parameters)

    def set_whole_state(self, state: Any) -> None:
        load_whole_state(self.optimizer, state)

    @contextlib.contextmanager
    def proving(self) -> Iterator[None]:
        if optimizers.is_known(self.optimizer):
            yield
            return
        twin = Twin(self.optimizer)
        yield
        twin.check()

    def clear_state(self, slots: Collection[int] | None = None) -> None:
        if slots is None:
            self.optimizer.state.clear()
            return
        for slot in slots:
            self.optimizer.state.pop(self.parameters[slot], None)

    def hyperparameters(self) -> list[dict[str, Any]]:
        return optimizers.hyperparameters(self.optimizer)

    def set_hyperparameters(self, groups: Sequence[Mapping[str, Any]], *, exactly: bool = False) -> None:
        optimizers.set_hyperparameters(self.optimizer, groups, exactly=exactly)

    def groups(self) -> Sequence[Mapping[str, Any]]:
        return self._guard.groups()

    # ------------------------------------------------------------------ the schedule

    def advance_schedule(self, loss: float) -> None:
        if isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step(loss)
        elif self.scheduler is not None:
            self.scheduler.step()

    def check_schedule(self, steps: int) -> None:
        optimizers.check_schedule(self.scheduler, steps)

    def schedule_state(self) -> Any:
        return None if self.scheduler is None else self.scheduler.state_dict()

    def set_schedule_state(self, state: Any) -> None:
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state)

    def skip_update(self) -> None:
        vars(self.optimizer)["_opt_called"] = True  # PyTorch's schedulers warn if nobody has stepped it


_NO_STATE: Mapping[str, Any] = {}
