"""Names of a Keras model's variables that are the same wherever and whenever the model is built. Everything here is *local*."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any


def variable_names(model: Any, variables: Iterable[Any]) -> list[str]:
    """The variables' paths, as Keras would have made them if the model had been the first of its process.

    Keras numbers layers without a name over the whole process: the same model built twice has ``dense/kernel`` and
    ``dense_1/kernel``. These numbers begin anew here. Names that the user has given stay.
    """
    made = {layer.name: _made_name(layer) for layer in model._flatten_layers()}
    known: dict[str, str] = {}
    used: dict[str, int] = {}
    names: list[str] = []
    for variable in variables:
        parts: list[str] = []
        for part in variable.path.split("/"):
            stem = made.get(part)
            if stem is not None and part not in known:
                number = used[stem] = used.get(stem, -1) + 1
                known[part] = f"{stem}_{number}" if number else stem
            parts.append(known.get(part, part))
        names.append("/".join(parts))
    return _unique(names)


def _made_name(layer: Any) -> str | None:
    """What Keras makes names for a layer from, if it seems to have made this one."""
    stem = re.sub(r"\W+", "", type(layer).__name__)
    stem = re.sub("([a-z])([A-Z])", r"\1_\2", re.sub("(.)([A-Z][a-z]+)", r"\1_\2", stem)).lower()
    return stem if re.fullmatch(rf"{re.escape(stem)}(_\d+)?", layer.name) else None


def _unique(names: list[str]) -> list[str]:
    used: dict[str, int] = {}
    found: list[str] = []
    for name in names:
        number = used[name] = used.get(name, -1) + 1
        found.append(f"{name}#{number}" if number else name)
    return found
