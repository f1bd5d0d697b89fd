"""Keras models: the weights of a run, read back."""

from __future__ import annotations

import os
from typing import Any

from safetensors.torch import load_file

from unisono.errors import ConfigurationError
from unisono.replica.arrays import array_from
from unisono.replica.variable_names import variable_names


def load_weights(model: Any, path: str | os.PathLike[str]) -> None:
    """*local*. Gives a built Keras model the weights of a run directory's ``model.safetensors`` (or ``best.safetensors``).

    The file holds every variable by its path, with numbers of unnamed layers that are counted within the model.

    Raises:
        ConfigurationError: The file is of another model.
    """
    variables = [variable for variable in model.variables if not variable.path.endswith("seed_generator_state")]
    ordered = [*model.trainable_variables, *model.non_trainable_variables]
    names = dict(zip(map(id, ordered), variable_names(model, ordered), strict=True))
    found = load_file(path)
    mine = {names[id(variable)]: variable for variable in variables}
    unlike = [name for name in {*mine, *found} if name not in mine or name not in found or mine[name].shape != found[name].shape]
    if unlike:
        raise ConfigurationError(
            f"{os.fspath(path)} is of another model: {min(unlike)!r} and {len(unlike) - 1} more are "
            "not in both, or differ in shape"
        )
    for name, variable in mine.items():
        variable.assign(array_from(found[name]))
