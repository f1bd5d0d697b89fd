"""Strict JSON for numbers that may be infinite or not a number.

JSON has no NaN and no infinity, and many readers refuse the ``NaN`` that Python writes by default. Here they are the
strings ``"nan"``, ``"inf"`` and ``"-inf"``: valid JSON for every reader, and ``float(...)`` turns them back.
"""

from __future__ import annotations

import json
import math
from typing import Any

Scalar = int | float | str
"""What one field of a metrics line may be."""

_NOT_FINITE = ("nan", "inf", "-inf")


def encode(value: Any) -> Any:
    """Return ``value`` (a scalar, or mappings and lists of scalars) with every float that is not finite as a string. *Local*."""
    if isinstance(value, dict):
        return {key: encode(item) for key, item in value.items()}
    if isinstance(value, list):
        return [encode(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    return value


def decode(value: Any) -> Any:
    """Undo ``encode``. *Local*.

    A string that was exactly ``"nan"``, ``"inf"`` or ``"-inf"`` before it was written comes back as a float.
    """
    if isinstance(value, dict):
        return {key: decode(item) for key, item in value.items()}
    if isinstance(value, list):
        return [decode(item) for item in value]
    return float(value) if isinstance(value, str) and value in _NOT_FINITE else value


def dumps(value: dict[str, Any], *, indent: int | None = None) -> str:
    """Write ``value`` as strict JSON in ASCII, on one line unless ``indent`` is given. *Local*."""
    return json.dumps(encode(value), allow_nan=False, indent=indent)
