from __future__ import annotations

import numpy as np
import pytest

from unisono.report.series import Stretches, smoothed


def test_long_columns_become_means_of_stretches() -> None:
    stretches = Stretches(10, points=4)
    column = np.array([1.0, 2, 3, 4, np.nan, 6, np.inf, np.nan, np.nan, 10])
    assert (stretches.count, stretches.lines_each) == (4, 3)
    assert stretches.mean(column).tolist()[:2] == [2.0, 5.0]
    assert [stretches.low(column)[1], stretches.high(column)[1]] == [4.0, 6.0]
    assert np.isnan(stretches.mean(column)[2])
    assert stretches.last(column).tolist()[-1] == 10.0


def test_a_smoothed_line_neither_lags_nor_bends_at_its_ends() -> None:
    straight = np.linspace(0, 1, 301)
    assert np.abs(smoothed(straight)[20:-20] - straight[20:-20]).max() < 1e-12
    assert smoothed(np.array([1.0, np.nan, 1.0])).tolist() == pytest.approx([1.0, 1.0, 1.0])
    assert np.isnan(smoothed(np.full(5, np.nan))).all()
