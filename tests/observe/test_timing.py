from __future__ import annotations

import time

import pytest

from unisono.observe.timing import StepClock


class Clock:
    """Time that a test moves."""

    now = 50.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def time_s() -> Clock:
    return Clock()


@pytest.fixture
def clock(time_s: Clock) -> StepClock:
    return StepClock(clock=time_s)


def test_a_lap_gives_the_seconds_of_each_phase_and_of_the_step(clock: StepClock, time_s: Clock) -> None:
    with clock.phase("data"):
        time_s.now += 1
    for _ in range(2):
        with clock.phase("compute"):
            time_s.now += 2
        time_s.now += 0.25
    assert clock.lap() == {"data": 1, "compute": 4, "communication": 0, "waiting": 0, "step": 5.5}


def test_a_lap_begins_at_zero(clock: StepClock, time_s: Clock) -> None:
    with clock.phase("data"):
        time_s.now += 1
    clock.lap()
    assert set(clock.lap().values()) == {0.0}


def test_a_nested_phase_is_not_counted_twice(clock: StepClock, time_s: Clock) -> None:
    with clock.phase("communication"):
        time_s.now += 1
        with clock.phase("waiting"):
            time_s.now += 4
        time_s.now += 2
    lap = clock.lap()
    assert (lap["communication"], lap["waiting"], lap["step"]) == (3, 4, 7)


def test_a_phase_over_the_end_of_a_lap_is_split_there(clock: StepClock, time_s: Clock) -> None:
    clock.start("compute")
    time_s.now += 1
    first = clock.lap()
    time_s.now += 2
    clock.stop()
    assert (first["compute"], clock.lap()["compute"]) == (1, 2)


def test_a_phase_ends_when_its_body_raises(clock: StepClock, time_s: Clock) -> None:
    with pytest.raises(ValueError, match="body"), clock.phase("data"):
        time_s.now += 1
        raise ValueError("body")
    time_s.now += 1
    assert clock.lap()["data"] == 1


def test_a_pause_counts_for_nothing(clock: StepClock, time_s: Clock) -> None:
    time_s.now += 1
    with clock.phase("compute"):
        time_s.now += 1
        with clock.pause():
            time_s.now += 100
            with clock.pause(), clock.phase("data"):
                time_s.now += 100
            time_s.now += 100
        time_s.now += 1
    lap = clock.lap(samples=30)
    assert (lap["compute"], lap["data"], lap["step"]) == (2, 0, 3)
    assert clock.rate == pytest.approx(10)


def test_the_rate_of_a_steady_run_is_right_from_the_first_step(clock: StepClock, time_s: Clock) -> None:
    assert clock.rate == 0
    for _ in range(20):
        time_s.now += 0.1
        clock.lap(samples=64)
        assert clock.rate == pytest.approx(640)


def test_the_rate_follows_a_change_and_forgets_the_past(clock: StepClock, time_s: Clock) -> None:
    for step_s in [0.1] * 100 + [0.2] * 10:
        time_s.now += step_s
        clock.lap(samples=100)
    assert 500 < clock.rate < 1000
    for _ in range(200):
        time_s.now += 0.2
        clock.lap(samples=100)
    assert clock.rate == pytest.approx(500, rel=0.01)


def test_the_rate_weighs_a_long_step_by_its_length(clock: StepClock, time_s: Clock) -> None:
    for step_s in (0.01, 0.03):
        time_s.now += step_s
        clock.lap(samples=1)
    assert clock.rate == pytest.approx(50, rel=0.01)


def test_the_waiting_share_is_the_part_of_time_spent_waiting(clock: StepClock, time_s: Clock) -> None:
    assert clock.waiting_share == 0
    for _ in range(5):
        time_s.now += 0.3
        with clock.phase("waiting"):
            time_s.now += 0.1
        clock.lap()
    assert clock.waiting_share == pytest.approx(0.25)


def test_a_phase_costs_next_to_nothing() -> None:
    clock = StepClock()
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        for _ in range(2000):
            with clock.phase("compute"):
                pass
        best = min(best, (time.perf_counter() - began) / 2000)
    assert best < 10e-6
