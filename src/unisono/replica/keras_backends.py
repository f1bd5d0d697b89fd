"""What differs between Keras' backends: how a function is compiled and differentiated, and how an optimizer's step is made one.

Everything here is *local*. Neither module is imported before a model of that backend exists.
"""

from __future__ import annotations

import abc
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from unisono.errors import ConfigurationError
from unisono.replica.framework_threads import intra_op_threads, xla_threads

Leaf = Callable[..., tuple[Any, Any, list[Any]]]
"""``leaf(weights, *inputs)``: a scalar, what comes with it, and the scalar's gradient for each of the weights, None if it does
not depend on it."""
Update = Callable[[Sequence[Any], Sequence[Any], Sequence[Any]], tuple[Sequence[Any], Sequence[Any]]]
"""``update(weights, state, gradients)``: the weights and the optimizer's state after a step."""


class Backend(abc.ABC):
    """A backend of Keras.

    Attributes:
        mode: How functions run: "graph", "xla", "jit" or "eager". Each rounds differently.
    """

    mode: str

    @abc.abstractmethod
    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """One program for each combination of shapes; the arguments are nests of tensors."""

    @abc.abstractmethod
    def differentiate(self, function: Callable[..., tuple[Any, Any]]) -> Leaf:
        """``function(weights, *inputs)`` returns a scalar and what comes with it. Compiled."""

    @abc.abstractmethod
    def update_of(self, optimizer: Any, variables: Sequence[Any]) -> Update:
        """The optimizer's step on all ``variables``, compiled, which leaves them and the optimizer's with what it returns."""

    @abc.abstractmethod
    def check_device(self) -> None:
        """Whether computations run on the CPU.

        Raises:
            ConfigurationError: They do not.
        """

    @abc.abstractmethod
    def threads(self) -> tuple[int, str]:
        """Threads of one operation, and the environment variable that says so."""

    @abc.abstractmethod
    def versions(self) -> Mapping[str, str]:
        """Of what computes, by name."""


class TensorFlowBackend(Backend):
    """TensorFlow: ``tf.GradientTape`` under ``tf.function``.

    Args:
        eager: Whether operations run one by one instead.
        xla: Whether XLA compiles them.
    """

    def __init__(self, *, eager: bool, xla: bool) -> None:
        self.mode = "eager" if eager else "xla" if xla else "graph"

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        import tensorflow as tf

        if self.mode == "eager":
            return function
        compiled: Callable[..., Any] = tf.function(function, jit_compile=self.mode == "xla", autograph=False)
        return compiled

    def differentiate(self, function: Callable[..., tuple[Any, Any]]) -> Leaf:
        import tensorflow as tf

        def leaf(weights: list[Any], *inputs: Any) -> tuple[Any, Any, list[Any]]:
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                tape.watch(weights)
                scalar, more = function(weights, *inputs)
            found = tape.gradient(scalar, weights)
            # The gradient of an embedding is a list of rows.
            return scalar, more, [None if gradient is None else tf.convert_to_tensor(gradient) for gradient in found]

        return self.compile(leaf)

    def update_of(self, optimizer: Any, variables: Sequence[Any]) -> Update:
        import tensorflow as tf

        # Keras' optimizers change variables here, inside of what is compiled; their stateless_apply() is for other backends.
        def update(weights: Any, state: Any, gradients: Any) -> tuple[list[Any], list[Any]]:
            for variable, value in zip([*variables, *optimizer.variables], [*weights, *state], strict=True):
                variable.assign(value)
            there = [(gradient, v) for gradient, v in zip(gradients, variables, strict=True) if gradient is not None]
            optimizer.apply([gradient for gradient, _ in there], [variable for _, variable in there])
            return [tf.identity(v.value) for v in variables], [tf.identity(v.value) for v in optimizer.variables]

        compiled: Update = self.compile(update)
        return compiled

    def check_device(self) -> None:
        import tensorflow as tf

        _check_cpu(
            "TensorFlow", [device.device_type for device in tf.config.list_logical_devices() if device.device_type != "CPU"]
        )

    def threads(self) -> tuple[int, str]:
        import tensorflow as tf

        set_by_call: int = tf.config.threading.get_intra_op_parallelism_threads()
        return set_by_call or intra_op_threads(os.environ), "TF_NUM_INTRAOP_THREADS"

    def versions(self) -> Mapping[str, str]:
        import tensorflow as tf

        return {"tensorflow": tf.__version__}


class JaxBackend(Backend):
    """JAX: ``jax.value_and_grad`` under ``jax.jit``.

    Args:
        eager: Whether operations run one by one instead.
    """

    def __init__(self, *, eager: bool = False) -> None:
        self.mode = "eager" if eager else "jit"

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        import jax

        compiled: Callable[..., Any] = function if self.mode == "eager" else jax.jit(function)
        return compiled

    def differentiate(self, function: Callable[..., tuple[Any, Any]]) -> Leaf:
        import jax

        both = jax.value_and_grad(function, has_aux=True)

        def leaf(weights: list[Any], *inputs: Any) -> tuple[Any, Any, list[Any]]:
            (scalar, more), found = both(weights, *inputs)
            return scalar, more, found

        return self.compile(leaf)

    def update_of(self, optimizer: Any, variables: Sequence[Any]) -> Update:
        def update(weights: Any, state: Any, gradients: Any) -> tuple[Any, Any]:
            found: tuple[Any, Any] = optimizer.stateless_apply(state, gradients, weights)
            return found

        compiled = self.compile(update)

        def placed(weights: Any, state: Any, gradients: Any) -> tuple[Any, Any]:
            weights, state = compiled(weights, state, gradients)
            for variable, value in zip([*variables, *optimizer.variables], [*weights, *state], strict=True):
                variable.assign(value)
            return weights, state

        return placed

    def check_device(self) -> None:
        import jax

        _check_cpu("JAX", [device.platform for device in jax.devices() if device.platform != "cpu"])

    def threads(self) -> tuple[int, str]:
        return xla_threads(os.environ), "NPROC"

    def versions(self) -> Mapping[str, str]:
        import jax
        import jaxlib

        return {"jax": jax.__version__, "jaxlib": jaxlib.__version__}


def _check_cpu(name: str, others: Sequence[str]) -> None:
    if others:
        raise ConfigurationError(
            f"{name} computes on {others[0]}, where nobody has shown that sums have the same bits: hide it "
            "(CUDA_VISIBLE_DEVICES='', JAX_PLATFORMS=cpu) and train on CPUs"
        )
