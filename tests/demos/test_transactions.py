"""Simulated payments: the three kinds of fraud are there as described, and history knows nothing that comes later."""

from __future__ import annotations

import numpy as np
import pytest

from unisono.demos._tables import Table
from unisono.demos._transactions import DAY_S, LABEL_DELAY_DAYS, simulate, with_history


@pytest.fixture(scope="module")
def payments() -> Table:
    return simulate(customers=300, terminals=500, days=40, seed=3)


def test_the_same_seed_gives_the_same_payments_in_order_of_time(payments: Table) -> None:
    again = simulate(customers=300, terminals=500, days=40, seed=3)
    for name in payments.columns:
        np.testing.assert_array_equal(payments.numbers(name), again.numbers(name))
    assert (np.diff(payments.numbers("time")) >= 0).all()
    assert not np.array_equal(simulate(300, 500, 40, seed=4).numbers("amount")[:50], payments.numbers("amount")[:50])


def test_the_three_kinds_of_fraud_are_as_described(payments: Table) -> None:
    scenario, amount, fraud = (payments.numbers(name) for name in ("scenario", "amount", "fraud"))
    assert set(np.unique(scenario)) == {0, 1, 2, 3}
    np.testing.assert_array_equal(fraud, scenario > 0)
    assert amount[scenario == 1].min() > 220
    assert amount[scenario == 3].mean() > 3 * amount[scenario == 0].mean()
    assert amount[scenario == 0].max() <= 220
    terminal, day = payments.numbers("terminal"), payments.numbers("time") // DAY_S
    cheat = terminal[scenario == 2][0]
    days = day[(terminal == cheat) & (scenario == 2)]
    honest = day[(terminal == cheat) & (scenario == 0)]
    assert not ((honest > days.min()) & (honest < days.min() + 27)).any()


def test_history_is_what_a_plain_loop_counts(payments: Table) -> None:
    history = with_history(payments)
    time, amount, fraud = (payments.numbers(name) for name in ("time", "amount", "fraud"))
    for row in np.random.default_rng(0).integers(0, len(payments), 60):
        for days in (1, 7, 30):
            same = payments.numbers("customer") == payments.numbers("customer")[row]
            mine = same & (time <= time[row]) & (time >= time[row] - days * DAY_S)
            assert history.numbers(f"customer's payments, {days} d")[row] == mine.sum()
            assert history.numbers(f"customer's mean amount, {days} d")[row] == pytest.approx(amount[mine].mean())
            known_until = time[row] - LABEL_DELAY_DAYS * DAY_S
            same = payments.numbers("terminal") == payments.numbers("terminal")[row]
            mine = same & (time < known_until) & (time >= known_until - days * DAY_S)
            assert history.numbers(f"terminal's payments, {days} d")[row] == mine.sum()
            assert history.numbers(f"terminal's risk, {days} d")[row] == pytest.approx(fraud[mine].mean() if mine.any() else 0)


def test_history_does_not_know_what_comes_later(payments: Table) -> None:
    cut = len(payments) // 2
    whole, part = with_history(payments), with_history(payments.take(slice(0, cut)))
    for name in part.columns:
        if name not in ("hour", "weekday"):
            np.testing.assert_allclose(whole.numbers(name)[:cut], part.numbers(name), atol=1e-6)
