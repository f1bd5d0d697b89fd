"""A Keras model and its optimizer on the TensorFlow or the JAX backend, behind the seam of ``replica/base.py``.

What a microbatch computes is a pure function of weights, other variables, states of random generators, and data: compiled once
for each size of a microbatch. Every worker updates the whole model, in one program: whatever an optimizer does there, it does on
each worker with the same numbers. (Programs for parts of a model would round in other ways.)
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unisono.errors import CheckpointError, ConfigurationError
from unisono.layout import Allocate, Layout, ParameterSpec
from unisono.order import derive_seed
from unisono.replica.arrays import array_from, tensor_from, torch_dtype
from unisono.replica.base import LossPart, MetricFunction, Microbatch, Replica
from unisono.replica.keras_backends import Backend, JaxBackend, TensorFlowBackend
from unisono.replica.keras_buffers import KerasBuffers
from unisono.replica.keras_model import CompiledModel, Phase, changed_by_forward, compiled_loss, recording_scope, sum_and_count_of
from unisono.replica.loss import sum_and_count
from unisono.replica.mirror import Mirror
from unisono.replica.variable_names import variable_names
from unisono.sync.base import GradientSink

_SEEDS = 2**31 - 2
"""TensorFlow takes seeds modulo this number."""


class KerasReplica(Replica):
    """See the module.

    Args:
        model: A built ``keras.Model``.
        optimizer: A Keras optimizer; None: that with which the model is compiled.
        loss: ``loss(model, batch)``; None: that with which the model is compiled, of batches ``(x, y)`` or ``(x, y, weights)``.

    Raises:
        ConfigurationError: Model or optimizer cannot be trained exactly.
    """

    updates_whole = True
    buffers: KerasBuffers

    def __init__(self, model: Any, optimizer: Any = None, loss: MetricFunction | None = None) -> None:
        self.model = model
        self.optimizer, self.loss = _given_or_compiled(model, optimizer, loss)
        self._backend = _backend_of(model)
        self._backend.check_device()
        check_optimizer(self.optimizer)
        names = variable_names(model, [*model.trainable_variables, *model.non_trainable_variables])
        trained = len(model.trainable_variables)
        self.device = torch.device("cpu")
        self.layout = Layout(map(_spec, names, model.trainable_variables))
        by_name = dict(zip(names, model.trainable_variables, strict=False))
        self._variables = [by_name[name] for name in self.layout.names]
        fixed = dict(zip(names[trained:], model.non_trainable_variables, strict=True))
        self._seeds = [variable for variable in fixed.values() if variable.path.endswith("seed_generator_state")]
        kept = {name: variable for name, variable in fixed.items() if not any(variable is seed for seed in self._seeds)}
        self.buffers = KerasBuffers(list(kept), list(kept.values()))
        self._fixed = list(kept.values())
        self._weights = Mirror(self._variables, [tensor_from(variable) for variable in self._variables])
        _build(self.optimizer, self._variables)
        self._state = Mirror(self.optimizer.variables, [tensor_from(variable) for variable in self.optimizer.variables])
        self._config = _plain_config(self.optimizer)
        self._phase = Phase(model)
        self._leaf = self._backend.differentiate(self._loss_of)
        self._update = self._backend.update_of(self.optimizer, self._variables)
        self._measure = self._backend.compile(self._measured)
        self._forward = CompiledModel(model, self._backend.compile, self._scope)
        self._is_behind = True  # whether variables may not have the values of now

    # ------------------------------------------------------------------ the model

    def adopt(self, allocate: Allocate) -> list[Tensor]:
        flats = self.layout.flats(allocate)
        views = self.layout.views(flats)
        for view, tensor in zip(views, self._weights.tensors, strict=True):
            view.copy_(tensor)
        self._weights.tensors = views
        return flats

    def tensors(self) -> dict[str, Tensor]:
        return {**dict(zip(self.layout.names, self._weights.tensors, strict=True)), **self.buffers.named()}

    def model_state(self) -> dict[str, Tensor]:
        self._pull()
        return self.tensors()

    def load_model_state(self, state: Mapping[str, Any]) -> None:
        for name, tensor in self.tensors().items():
            tensor.copy_(state[name])
        self._push(whole=True)

    def check_unchanged(self) -> None:
        if set(map(id, self.model.trainable_variables)) != set(map(id, self._variables)):
            raise ConfigurationError(
                "the model now trains other variables than when the Trainer was made: make a new Trainer after freezing, "
                "unfreezing or replacing layers"
            )

    def kinds(self) -> dict[str, str | None]:
        rate = self._config["learning_rate"]
        schedule = json.loads(rate)["class_name"] if isinstance(rate, str) else None
        return {"optimizer": type(self.optimizer).__name__, "scheduler": schedule}

    def rest(self) -> None:
        self._push(whole=True)

    def fingerprint(self, threads: int) -> dict[str, str | int]:
        import keras

        used, variable = self._backend.threads()
        if used != threads:
            warnings.warn(
                f"{keras.backend.backend()} computes with {used} thread{'s'[: used != 1]}, while this worker has {threads}, and "
                f"bits depend on it: use `unisono run`, or set {variable}={threads} before Python starts",
                stacklevel=3,
            )
        settings = {name: os.environ[name] for name in ("XLA_FLAGS", "TF_ENABLE_ONEDNN_OPTS") if name in os.environ}
        versions = {"keras": keras.__version__, **self._backend.versions()}
        return {**versions, "keras_backend": keras.backend.backend(), "mode": self._backend.mode, variable: used, **settings}

    # ------------------------------------------------------------------ a step

    def begin_step(self) -> None:
        self._pull()

    def end_step(self) -> None:
        self._push(whole=self._is_behind)
        self._is_behind = False

    def gradients(self, microbatches: Sequence[Microbatch], seeds: Sequence[int], sink: GradientSink) -> list[LossPart]:
        parts: list[LossPart] = []
        weights, fixed = self._weights.values(), self.buffers.inputs()
        for microbatch, seed in zip(microbatches, seeds, strict=True):
            self.seed(seed)
            inputs = fixed, self._states(seed), self._batch(microbatch.data), np.float32(len(microbatch.indices))
            total, (count, changed), found = self._leaf(weights, *inputs)
            if all(gradient is None for gradient in found):
                raise ConfigurationError(
                    "the loss does not depend on any trainable variable: return it as computed from the model's output"
                )
            self.buffers.put({int(index): value for index, value in changed.items()})
            parts.append(LossPart(tensor_from(total), _checked_count(count)))
            sink.add(microbatch.number, [None if gradient is None else tensor_from(gradient) for gradient in found])
        return parts

    def update(self, slots: Sequence[int], gradients: Sequence[Tensor]) -> None:
        from keras import ops

        given: list[Any] = [None] * len(self._variables)
        for slot, gradient in zip(slots, gradients, strict=True):
            given[slot] = ops.convert_to_tensor(array_from(gradient))
        weights, state = self._update(self._weights.values(), self._state.values(), given)
        self._weights.take(weights)
        self._state.take(state)

    def learning_rates(self) -> tuple[float, ...]:
        return (float(np.asarray(self.optimizer.learning_rate)),)

    def skip_update(self) -> None:
        self._push(whole=True)

    def _pull(self) -> None:
        for mirror in (self._weights, self._state):
            mirror.pull()
        self.buffers.pull()

    def _push(self, *, whole: bool) -> None:
        if whole:
            self._weights.push()
            self._state.push()
        self.buffers.push(whole=whole)

    # ------------------------------------------------------------------ what is compiled

    def _loss_of(self, weights: Any, fixed: Any, states: Any, batch: Any, samples: Any) -> tuple[Any, tuple[Any, dict[str, Any]]]:
        with self._scope(weights, fixed, states) as scope:
            total, count = sum_and_count_of(self._phase.train(self.loss, batch), samples)
            return total, (count, changed_by_forward(scope, self.model, self._fixed, self._seeds))

    def _measured(self, weights: Any, fixed: Any, states: Any, batch: Any, samples: Any) -> tuple[Any, Any]:
        with self._scope(weights, fixed, states):
            return sum_and_count_of(self._phase.evaluate(self.loss, batch), samples)

    def _scope(self, weights: Any, fixed: Any, states: Any) -> Any:
        """In it the model's variables have these values, and keep what they are given."""
        self._phase.clear()
        variables = [*self._variables, *self._fixed, *self._seeds]
        return recording_scope(zip(variables, [*weights, *fixed, *states], strict=True))

    def _states(self, seed: int) -> list[Any]:
        """What the model's random generators start from, under a microbatch's seed."""
        return [
            np.array([derive_seed("generator", seed, number) % _SEEDS, 0], dtype=variable.dtype)
            for number, variable in enumerate(self._seeds)
        ]

    def _batch(self, data: Any) -> Any:
        """A collated microbatch, as the framework's tensors."""
        from keras import ops, tree

        return tree.map_structure(
            lambda part: (
                ops.convert_to_tensor(array_from(part) if isinstance(part, Tensor) else part)
                if isinstance(part, (Tensor, np.ndarray))
                else part
            ),
            data,
        )

    # ------------------------------------------------------------------ evaluation

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        self._pull()
        yield

    def evaluate(self, metrics: Mapping[str, MetricFunction], data: Any, samples: int, seed: int) -> Tensor:
        batch = self._batch(data)
        values = self._weights.values(), self.buffers.inputs(), self._states(seed)
        rows: list[list[float]] = []
        for name, metric in metrics.items():
            self.seed(seed)
            if metric is self.loss:
                returned = self._measure(*values, batch, np.float32(samples))
            else:
                with self._scope(*values), self._forward.given(*values):
                    returned = self._phase.evaluate(metric, batch, self._forward)
            value, count = sum_and_count(self.outputs(returned), samples, what=f"metric {name!r}")
            rows.append([float(value), count])
        return torch.tensor(rows, dtype=torch.float64)

    def outputs(self, returned: Any) -> Any:
        from keras import ops, tree

        return tree.map_structure(
            lambda part: tensor_from(part) if ops.is_tensor(part) or isinstance(part, np.ndarray) else part, returned
        )

    # ------------------------------------------------------------------ the optimizer's state

    def whole_state(self) -> dict[str, Any]:
        self._state.pull()
        return {"variables": list(self._state.tensors)}

    def set_whole_state(self, state: Any) -> None:
        given: list[Tensor] = state["variables"]
        if [value.shape for value in given] != [tensor.shape for tensor in self._state.tensors]:
            raise CheckpointError(
                f"{type(self.optimizer).__name__} has {len(self._state.tensors)} variables, and is given {len(given)}, or others "
                "in size: make the optimizer as it was made for this run, or choose another run_dir"
            )
        for tensor, value in zip(self._state.tensors, given, strict=True):
            tensor.copy_(value)
        self._state.push()

    def slot_state(self, slot: int) -> Mapping[str, Any]:
        return {}  # an optimizer's variables are told as a whole

    def place_state(self, slot: int, key: str, value: Any) -> None:
        raise NotImplementedError

    def set_slot_state(self, slot: int, state: Mapping[str, Any], *, strides: bool = True) -> None:
        raise NotImplementedError

    def clear_state(self, slots: Collection[int] | None = None) -> None:
        pass

    def hyperparameters(self) -> list[dict[str, Any]]:
        return [{**self._config, "learning_rate": self.learning_rates()[0]} if self._has_own_rate else dict(self._config)]

    def set_hyperparameters(self, groups: Sequence[Mapping[str, Any]], *, exactly: bool = False) -> None:
        if self._has_own_rate and groups[0]["learning_rate"] != self.learning_rates()[0]:
            self.optimizer.learning_rate = groups[0]["learning_rate"]
            self._state.pull()

    @property
    def _has_own_rate(self) -> bool:
        """Whether the learning rate is a variable, rather than a schedule's."""
        return not isinstance(self._config["learning_rate"], str)


def check_optimizer(optimizer: Any) -> None:
    """*local*.

    Raises:
        ConfigurationError: It is no Keras optimizer, or one with which training would not be exact.
    """
    import keras

    if not isinstance(optimizer, keras.optimizers.Optimizer):
        raise ConfigurationError(
            f"a Keras model is trained with a Keras optimizer, such as keras.optimizers.AdamW(1e-3), not with a "
            f"{type(optimizer).__name__}"
        )
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        raise ConfigurationError(
            'LossScaleOptimizer is for float16, whose loss must be scaled: not supported. Use the policy "mixed_bfloat16"'
        )
    if optimizer.use_ema:
        raise ConfigurationError(
            "use_ema=True keeps other weights to use than those that are trained: not supported. Leave it away, and average "
            "weights in a callback"
        )


def _given_or_compiled(model: Any, optimizer: Any, loss: MetricFunction | None) -> tuple[Any, MetricFunction]:
    if not model.built or not model.variables:
        raise ConfigurationError(
            "the model has no variables yet: give it an Input, call model.build(shape), or call it once on some samples, before "
            "Trainer(...)"
        )
    if not model.trainable_variables:
        raise ConfigurationError("the model has no trainable variable: nothing to train (is trainable False everywhere?)")
    if model.compiled:
        optimizer = model.optimizer if optimizer is None else optimizer
        loss = compiled_loss if loss is None else loss
    for name, given in {"optimizer": optimizer, "loss": loss}.items():
        if given is None:
            raise ConfigurationError(f"{name} is None, and the model is not compiled: pass it, or call model.compile(...) before")
    assert loss is not None
    return optimizer, loss


def _backend_of(model: Any) -> Backend:
    import keras

    if keras.backend.backend() == "jax":
        return JaxBackend(eager=model.run_eagerly)
    return TensorFlowBackend(eager=model.run_eagerly, xla=model.compiled and model.jit_compile is True)


def _spec(name: str, variable: Any) -> ParameterSpec:
    shape = tuple(variable.shape)
    return ParameterSpec(
        name, shape, torch.empty(shape, device="meta").stride(), torch_dtype(variable.dtype), torch.device("cpu")
    )


def _build(optimizer: Any, variables: Sequence[Any]) -> None:
    if not optimizer.built:
        optimizer.build(variables)
    elif list(map(id, optimizer._trainable_variables)) != list(map(id, variables)):
        raise ConfigurationError(
            f"the {type(optimizer).__name__} was built for other variables than the model trains now: make a new optimizer after "
            "freezing or unfreezing layers"
        )


def _plain_config(optimizer: Any) -> dict[str, Any]:
    """The optimizer's settings, as plain values; what is no plain value, such as a schedule, as text."""
    plain = (bool, int, float, type(None))
    found = {name: value for name, value in optimizer.get_config().items() if name != "name"}
    return {
        name: value if isinstance(value, plain) else json.dumps(value, default=str, sort_keys=True)
        for name, value in found.items()
    }


def _checked_count(count: Any) -> float:
    number = float(np.asarray(count))
    if not 0 <= number < np.inf:
        raise ConfigurationError(f"the loss's count is {number}: it must be finite and not negative")
    return number
