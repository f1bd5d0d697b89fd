"""How a Keras model is called in training and in evaluation, and what losses may return. Everything here is *local*."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from unisono.errors import ConfigurationError


class Phase:
    """Calls functions of a model so that it is in training or in evaluation mode, without their saying so: as inside a layer that
    was called with ``training``. A call that says so itself is left as it is.

    Args:
        model: The model.
    """

    def __init__(self, model: Any) -> None:
        import keras

        class Call(keras.layers.Layer):  # type: ignore[misc]
            """Any function, as a layer: Keras hands ``training`` on to what is called inside of one."""

            built = True

            def call(self, function: Any = None, training: bool | None = None) -> Any:
                return function()

        self._model = model
        self._call = Call(autocast=False, dtype="float32")

    def train(self, function: Callable[[Any, Any], Any], batch: Any) -> Any:
        """What ``function(model, batch)`` returns in training mode."""
        return self._call(function=lambda: function(self._model, batch), training=True)

    def evaluate(self, function: Callable[[Any, Any], Any], batch: Any, model: Any = None) -> Any:
        """The same in evaluation mode, of ``model`` if it is given."""
        return self._call(function=lambda: function(model or self._model, batch), training=False)

    def clear(self) -> None:
        """Forgets losses that layers have added: as Keras does before each step."""
        self._model._clear_losses()


class CompiledModel:
    """A model whose call, as a whole, is compiled; all else of it is the model itself. It is given to metrics.

    Args:
        model: The model.
        compile: Compiles a function of tensors.
        scope: In which the model's variables have given values.
    """

    def __init__(
        self, model: Any, compile: Callable[[Callable[..., Any]], Callable[..., Any]], scope: Callable[..., Any]
    ) -> None:
        self._model = model
        self._values: tuple[Any, ...] = ()
        self._programs: dict[bool, Callable[..., Any]] = {}
        self._compile, self._scope = compile, scope

    @contextlib.contextmanager
    def given(self, *values: Any) -> Iterator[None]:
        """While the body runs the model's variables have these values."""
        self._values = values
        try:
            yield
        finally:
            self._values = ()

    def __call__(self, *args: Any, training: bool = False, **kwargs: Any) -> Any:
        if training not in self._programs:
            self._programs[training] = self._compile(self._program(training))
        return self._programs[training](self._values, args, kwargs)

    def _program(self, training: bool) -> Callable[..., Any]:
        def call(values: Any, args: Any, kwargs: Any) -> Any:
            with self._scope(*values):
                return self._model(*args, training=training, **kwargs)

        return call

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def compiled_loss(model: Any, batch: Any) -> Any:
    """The loss with which a model was compiled, added losses and regularizers included: a mean over samples.

    Raises:
        ConfigurationError: The batch is no ``(x, y)`` or ``(x, y, sample_weight)``.
    """
    if not isinstance(batch, (tuple, list)) or len(batch) not in (2, 3):
        raise ConfigurationError(
            "the loss with which a model was compiled is of batches (x, y) or (x, y, sample_weight): let the dataset return such "
            "samples, or pass a loss of your own"
        )
    x, y, *weights = batch
    return model.compute_loss(x, y, model(x), *weights)


def sum_and_count_of(returned: Any, samples: Any) -> tuple[Any, Any]:
    """The ``(sum, count)`` that a loss has returned, as float32 tensors; a lone scalar is a mean over ``samples``.

    Raises:
        ConfigurationError: It is neither a scalar nor such a pair.
    """
    from keras import ops

    pair = isinstance(returned, (tuple, list))
    value, count = returned if pair and len(returned) == 2 else (returned, samples)
    if not ops.is_tensor(value) or tuple(value.shape) or tuple(getattr(count, "shape", ())):
        got = f"a tensor of shape {tuple(value.shape)}" if ops.is_tensor(value) else f"a {type(value).__name__}"
        raise ConfigurationError(
            f"the loss function returned {got}. Return the pair (sum over the microbatch as a scalar tensor, count to divide "
            "by), for example (keras.ops.sum(losses), losses.shape[0]), or one scalar: the mean over the samples"
        )
    if not pair:
        value = value * ops.cast(samples, value.dtype)
    return ops.cast(value, "float32"), ops.cast(count, "float32")


def recording_scope(mapping: Iterable[tuple[Any, Any]]) -> Any:
    """A ``keras.StatelessScope`` in which variables have the values of ``mapping``. Its ``assigned`` are those given others."""
    import keras

    class Recording(keras.StatelessScope):  # type: ignore[misc]
        """See the function."""

        def __init__(self) -> None:
            super().__init__(mapping, collect_losses=True)
            self.assigned: dict[int, Any] = {}

        def add_update(self, update: tuple[Any, Any]) -> None:
            self.assigned[id(update[0])] = update[0]
            super().add_update(update)

    return Recording()


def changed_by_forward(scope: Any, model: Any, fixed: Sequence[Any], seeds: Sequence[Any]) -> dict[str, Any]:
    """What forward has given those of the variables ``fixed`` that it has changed in a ``recording_scope``, by index.

    Raises:
        ConfigurationError: It has changed others.
    """
    assigned = dict(scope.assigned)
    found = {str(i): scope.get_current_value(v) for i, v in enumerate(fixed) if assigned.pop(id(v), None) is not None}
    for known in (*seeds, *model.metrics_variables):  # what metrics count while they train is not read
        assigned.pop(id(known), None)
    for variable in assigned.values():
        if variable.trainable:
            raise ConfigurationError(
                f"variable {variable.path!r} is changed by forward and trained, too, so it would depend on which microbatches a "
                "worker computes: make it with trainable=False, or change it in a callback"
            )
        raise ConfigurationError(
            f"forward changes the variable {variable.path!r}, which is not the model's. If it is a random generator's, give "
            "keras.random functions seed=self.seed_generator, a keras.random.SeedGenerator that is an attribute of the layer"
        )
    return found
