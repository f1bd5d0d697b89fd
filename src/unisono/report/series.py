"""Long columns made short enough to draw: means over equal stretches of the run. *Local.*"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Column = NDArray[np.float64]
_JSON_SCALARS = {int, str, bool, type(None)}
POINTS = 600
"""A line has at most so many points: more than a page has pixels for would only make it heavy."""


class Stretches:
    """A division of a log's lines into stretches of equal length, the same for all columns of a run.

    Args:
        lines: Lines of the log.
        points: There are at most so many stretches.
    """

    def __init__(self, lines: int, *, points: int = POINTS) -> None:
        self.lines_each = max(1, -(-lines // points))
        """Lines in a stretch; the last may have fewer."""
        self.count = -(-lines // self.lines_each)
        """How many stretches."""
        self._ends = np.minimum(np.arange(1, self.count + 1) * self.lines_each, lines) - 1

    def mean(self, column: Column) -> Column:
        """Mean of each stretch, without NaN; NaN where there is nothing else. float64 ``[count]``."""
        return self._over(np.nanmean, column)

    def low(self, column: Column) -> Column:
        """The least value of each stretch."""
        return self._over(np.nanmin, column)

    def high(self, column: Column) -> Column:
        """The greatest value of each stretch."""
        return self._over(np.nanmax, column)

    def last(self, column: Column) -> Column:
        """The last value of each stretch, for what only grows: steps, seconds."""
        ended: Column = column[self._ends]
        return ended

    def _over(self, function: Callable[..., Any], column: Column) -> Column:
        padded = np.full(self.count * self.lines_each, np.nan)
        padded[: len(column)] = np.where(np.isfinite(column), column, np.nan)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # stretches of NaN alone stay NaN
            result: Column = function(padded.reshape(self.count, self.lines_each), axis=1)
        return result


def smoothed(column: Column) -> Column:
    """A mean over each value's neighbours, weighted by a bell curve as wide as a fiftieth of the column. float64, same length."""
    width = max(1.0, len(column) / 50)
    reach = min(int(3 * width), max(len(column) - 1, 0))
    bell = np.exp(-0.5 * (np.arange(-reach, reach + 1) / width) ** 2)
    known = np.isfinite(column)
    around = slice(reach, reach + len(column))  # not mode="same": the bell may be longer than the column
    weights = np.convolve(known.astype(np.float64), bell)[around]
    sums = np.convolve(np.where(known, column, 0.0), bell)[around]
    with np.errstate(invalid="ignore", divide="ignore"):
        mean: Column = np.where(weights > 0, sums / weights, np.nan)
    return mean


def scale_for(values: Column) -> dict[str, Any]:
    """Plotly's axis: logarithmic where values span more than a power of ten, else linear."""
    positive = values[np.isfinite(values)]
    if len(positive) and positive.min() > 0 and positive.max() / positive.min() > 10:
        return {"type": "log", "dtick": 1, "minor": {"dtick": "D1", "showgrid": False}}
    return {"type": "linear"}


def course_of(values: Column) -> Column:
    """A column smoothed as the eye sees it: on a logarithmic axis the logarithms."""
    if scale_for(values)["type"] == "linear":
        return smoothed(values)
    return np.exp(smoothed(np.log(values)))


def plain(column: Column) -> list[float | None]:
    """For JSON: six significant digits, and None for what is no number."""
    return [float(f"{value:.6g}") if np.isfinite(value) else None for value in column.tolist()]


def plain_steps(column: Column) -> list[int | float]:
    """For JSON: steps in full, seconds to the millisecond."""
    return [int(value) if value == int(value) else round(value, 3) for value in column.tolist()]


def as_json(value: Any) -> Any:
    """As JSON has it: arrays and tensors become lists, NumPy's scalars Python's, and what is no finite number None."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): as_json(item) for key, item in value.items()}
    if isinstance(value, list):  # long columns at the speed of C: a live page is made again every second
        kinds = set(map(type, value))
        if kinds <= _JSON_SCALARS or (kinds == {float} and all(map(math.isfinite, value))):
            return value
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [as_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, (str, int, float)) or value is None else str(value)
