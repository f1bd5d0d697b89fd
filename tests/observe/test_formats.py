from __future__ import annotations

import math

import pytest

from unisono.observe import formats


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0.0000"), (0.1234, "0.1234"), (-2.5, "-2.5000"), (4012.5, "4012.50"), (3.1e-5, "3.100e-05"),
        (2e7, "2.000e+07"), (math.nan, "nan"), (math.inf, "inf"), (-math.inf, "-inf"),
    ],
)  # fmt: skip
def test_a_number_is_short_at_any_size(value: float, text: str) -> None:
    assert formats.number(value) == text


@pytest.mark.parametrize(
    ("elapsed", "text"),
    [(0, "0:00"), (12.4, "0:12"), (59.6, "1:00"), (3723, "1:02:03"), (2 * 86400 + 3723, "2d 01:02:03"), (-1, "0:00")],
)
def test_a_duration_reads_like_a_clock(elapsed: float, text: str) -> None:
    assert formats.duration(elapsed) == text


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (999, "999 B"), (38912, "38.9 kB"), (999_960, "1.0 MB"), (5e15, "5,000.0 TB")]
)
def test_a_size_has_the_unit_that_fits(size: float, text: str) -> None:
    assert formats.data_size(size) == text


def test_rates_shares_and_counts_read_well() -> None:
    assert (formats.rate(18400.4), formats.rate(3.251)) == ("18,400", "3.25")
    assert (formats.percent(0.041), formats.percent(1.0001), formats.percent(-1e-9)) == ("4%", "100%", "0%")
    assert (formats.count(1, "worker"), formats.count(4, "worker")) == ("1 worker", "4 workers")
    assert (formats.seconds(2.456), formats.seconds(75)) == ("2.46 s", "1:15")
