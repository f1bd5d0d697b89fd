from __future__ import annotations

import gc
import itertools
import json
import uuid
from typing import Any

import pytest

from tests.training.small_run import Augmented, make_trainer, train
from unisono.checkpoint.store import Store
from unisono.collective import Collective
from unisono.errors import ConfigurationError
from unisono.observe.timing import PHASES
from unisono.testing import run_threads
from unisono.training.trace import ENVIRONMENT, Trace, chrome_trace, from_environment


@pytest.fixture
def url() -> str:
    return f"memory://{uuid.uuid4().hex}/run"


def spans(trace: dict[str, Any], rank: int, thread: int) -> list[dict[str, Any]]:
    found = [event for event in trace["traceEvents"] if event["ph"] == "X" and (event["pid"], event["tid"]) == (rank, thread)]
    return sorted(found, key=lambda event: float(event["ts"]))


def test_a_trace_holds_the_phases_of_its_steps_on_every_worker(url: str) -> None:
    train(3, url, callbacks=[lambda: Trace(steps=3, skip=2)])
    trace = json.loads(Store(url).read("trace/trace.json"))
    for rank in range(3):
        steps, phases = spans(trace, rank, 0), spans(trace, rank, 1)
        assert [event["name"] for event in steps] == ["step 3", "step 4", "step 5"]
        assert {event["name"] for event in phases} >= {"compute", "communication", "waiting"}
        assert {event["name"] for event in phases} <= {*PHASES, "callbacks and evaluation"}
        assert {3, 4, 5} <= {event["args"]["step"] for event in phases}
        for one, following in itertools.pairwise(phases):
            assert one["ts"] + one["dur"] <= following["ts"] + 1  # microseconds: nothing overlaps
        inside = sum(event["dur"] for event in phases if event["args"]["step"] < 6)
        assert 0 < inside <= sum(event["dur"] for event in steps) * 1.01


def test_tracing_changes_no_bit_and_gives_the_clock_back(url: str) -> None:
    places: list[tuple[object, object]] = []

    def work(collective: Collective) -> None:
        trainer = make_trainer(collective, run_dir=url, callbacks=[Trace(steps=2, skip=1)])
        before = trainer.clock.shown
        trainer.fit(Augmented(), 1)
        places.append((before, trainer.clock.shown))

    run_threads(2, work)
    assert all(before is after for before, after in places)
    plain = f"{url}-plain"
    train(1, plain, epochs=1)
    assert Store(url).read("model.safetensors") == Store(plain).read("model.safetensors")


def test_a_run_that_ends_within_the_trace_leaves_what_was_seen(url: str) -> None:
    train(1, url, epochs=1, callbacks=[lambda: Trace(steps=50, skip=1)])  # three steps
    gc.collect()  # what an interpreter's end does
    trace = json.loads(Store(url).read("trace/trace.json"))
    assert [event["name"] for event in spans(trace, 0, 0)] == ["step 2", "step 3"]
    assert Store(url).list("trace") == ["trace.json"]


def test_the_profiler_sees_the_same_steps(url: str) -> None:
    train(1, url, epochs=1, callbacks=[lambda: Trace(steps=1, skip=1, profile=True)])
    names = {event.get("name") for event in json.loads(Store(url).read("trace/profile-0.json"))["traceEvents"]}
    assert "aten::linear" in names


def test_the_command_asks_for_it_through_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert from_environment({}) == ()
    (trace,) = from_environment({ENVIRONMENT: "profile"})
    assert isinstance(trace, Trace)
    with pytest.raises(ConfigurationError, match="UNISONO_TRACE is 'yes'"):
        from_environment({ENVIRONMENT: "yes"})
    monkeypatch.setenv(ENVIRONMENT, "phases")
    trainer = make_trainer()
    assert [type(callback) for callback in trainer.callbacks] == [Trace]


def test_workers_start_at_a_common_zero() -> None:
    workers = [{"rank": rank, "host": "a", "pid": 7, "events": [["compute", 1000.0 + rank, 5.0, 1]]} for rank in range(2)]
    events = chrome_trace(workers)["traceEvents"]
    assert [event["ts"] for event in events if event["ph"] == "X"] == [0.0, 1.0]


@pytest.mark.parametrize("given", [{"steps": 0}, {"skip": 0}])
def test_numbers_that_make_no_sense_are_refused(given: dict[str, int]) -> None:
    with pytest.raises(ConfigurationError, match="of 1 or more"):
        Trace(**given)
