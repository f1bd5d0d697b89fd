from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from unisono.errors import ConfigurationError
from unisono.report import charts


def test_charts_take_arrays_and_tensors() -> None:
    matrix = charts.confusion_matrix(["a", "b"], np.eye(2, dtype=np.int64))
    assert matrix.data[0]["customdata"] == [[1, 0], [0, 1]]
    curves = charts.curves("x", "y", {"one": (torch.arange(3.0), np.arange(3, dtype=np.float32))})  # type: ignore[arg-type]
    assert (curves.data[0]["x"], curves.data[0]["y"]) == ([0.0, 1.0, 2.0], [0.0, 1.0, 2.0])


def test_lines_of_others_lie_below_this_runs_own_and_are_muted() -> None:
    ours, other = charts.curves("x", "y", {"this run": ([0.0], [1.0]), "other": ([0.0], [1.0])}).data
    assert ours["zorder"] > other["zorder"]
    assert (ours["line"]["color"], other["line"]["color"]) == ("--blue", "--orange-muted")


@pytest.mark.parametrize(("higher_is_better", "order"), [(True, ["b", "c", "a"]), (False, ["a", "c", "b"])])
def test_bars_begin_with_the_best(higher_is_better: bool, order: list[str]) -> None:
    (bars,) = charts.comparison_bars("m", {"a": 1.0, "b": 3.0, "c": 2.0}, "c", higher_is_better=higher_is_better).data
    assert bars["y"] == order
    assert bars["marker"]["color"][1] == "--blue"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: charts.confusion_matrix(["a", "b"], [[1, 2]]), "lengths differ"),
        (lambda: charts.confusion_matrix(["a", "b"], [[1, 2], [3]]), "lengths differ .*row 1 1"),
        (lambda: charts.confusion_matrix(["a"], [["many"]]), "'many'"),  # type: ignore[list-item]
        (lambda: charts.curves("x", "y", {"one": ([1.0], [1.0, 2.0])}), "x of 'one' 1, y of 'one' 2"),
        (lambda: charts.curves("x", "y", {"one": ([[1.0]], [1.0])}), r"x of 'one' is \[\[1.0\]\]"),  # type: ignore[list-item]
        (lambda: charts.forecast([1.0], [1.0], [0.0]), "both low and high"),
        (lambda: charts.forecast([1.0, 2.0], [1.0]), "x 2, predicted 1"),
        (lambda: charts.comparison_bars("m", {"a": 1.0}, "b"), "there are: a"),
    ],
)
def test_a_chart_whose_parts_do_not_fit_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make()
