"""Guards that do more the more time they have keep within their share, and always do something."""

from __future__ import annotations

from unisono.system.budget import Credit, Dose


def test_what_was_earned_can_be_spent_once() -> None:
    credit = Credit(0.01)
    credit.earn(2.0)
    assert credit.affords(0.02)
    credit.spend(0.015)
    assert not credit.affords(0.01)
    assert credit.affords(0.004)


def test_what_is_missing_is_what_must_pass() -> None:
    credit = Credit(0.01)
    credit.earn(2.0)
    assert credit.missing(0.02) == 0.0
    credit.earn(credit.missing(0.05))
    assert credit.affords(0.05)


def test_what_had_to_be_done_leaves_no_debt() -> None:
    credit = Credit(0.01)
    credit.spend(5.0)
    credit.earn(1.0)
    assert credit.affords(0.01)


def doses(cost_s: float, step_s: float, *, share: float = 0.01, most: int = 16, times: int = 20) -> list[int]:
    """The amounts of so many times, each part of which takes ``cost_s``."""
    now = [0.0]
    dose = Dose(share, most, clock=lambda: now[0])
    found = []
    for _ in range(times):
        dose.adjust()
        found.append(dose.amount)
        began_s = dose.begin()
        now[0] += dose.amount * cost_s
        dose.end(began_s)
        now[0] += step_s - dose.amount * cost_s
    return found


def test_the_dose_grows_while_there_is_time() -> None:
    assert doses(cost_s=1e-6, step_s=0.1)[-1] == 16


def test_the_dose_stays_within_its_share() -> None:
    assert doses(cost_s=1e-4, step_s=0.1)[-10:] == [8] * 10  # 1 ms is the share: 8 take 0.8 of it


def test_there_is_always_a_dose_of_one() -> None:
    assert doses(cost_s=0.01, step_s=0.1) == [1] * 20
