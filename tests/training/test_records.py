"""Whatever a run leaves behind is whole and right after any death: log, checkpoints, weights and summary."""

from __future__ import annotations

import functools
import json
import uuid
from collections.abc import Sequence
from typing import Any

import pytest

from tests.fault_injection import Death, run_lives
from tests.memory import empty_memory
from tests.moments import moments
from tests.training.small_run import Augmented, EachEpoch, elastic_trainer, read_lines
from unisono.checkpoint.checkpoints import Checkpoints
from unisono.checkpoint.format import digest
from unisono.checkpoint.store import Store
from unisono.elastic.link import Link


def url_of(run: str) -> str:
    return f"memory://records-{run}"


def train(
    link: Link | None,
    *,
    run: str,
    calls: Sequence[int] = (2,),
    evaluates: bool = True,
    **settings: Any,
) -> None:
    """A script: calls to ``fit``, then an evaluation."""
    data = Augmented()
    callbacks = [EachEpoch()] if evaluates else []
    trainer = elastic_trainer(
        link, replicate_kib=0.0, run_dir=url_of(run), callbacks=callbacks, **{"checkpoint_every": 2, **settings}
    )
    for epochs in calls:
        trainer.fit(data, epochs)
    if evaluates:
        trainer.evaluate(data)


def left_by(run: str) -> dict[str, Any]:
    """What a run has left, without times, and without what tells of the workers that were lost."""
    store = Store(url_of(run))
    lines = [line for line in read_lines(store) if line.get("event") not in ("generation", "straggler")]
    checkpoints = Checkpoints(store, keep=100)
    newest = checkpoints.newest()
    assert newest is not None
    assert not checkpoints.damaged
    summary = json.loads(store.read("summary.json"))
    return {
        "lines": [{key: value for key, value in line.items() if not key.startswith("microbatches")} for line in lines],
        "newest": newest.step,
        "model": digest(store.read("model.safetensors")),
        "summary": {key: summary[key] for key in ("steps", "epochs", "samples", "weights_sha256", "loss", "metrics", "finished")},
    }


def undisturbed(**settings: Any) -> dict[str, Any]:
    run = uuid.uuid4().hex
    train(None, run=run, **settings)
    return left_by(run)


def survive(deaths: dict[int, Death], *, workers: int = 3, **settings: Any) -> tuple[dict[str, Any], dict[int, int]]:
    """What a run with these deaths leaves, and how many calls each worker made to the others."""
    run = uuid.uuid4().hex
    empty_memory()
    lives = run_lives(workers, functools.partial(train, run=run, **settings), deaths)
    return left_by(run), dict(lives.calls)


@pytest.mark.parametrize("told_to", [None, 1], ids=["all hear", "one hears"])
def test_a_run_whose_main_worker_dies_at_the_end_leaves_weights_and_summary(told_to: int | None) -> None:
    expected = undisturbed(evaluates=False)
    calls = survive({}, evaluates=False)[1][0]
    for call in moments(calls - 16, calls + 1, every=2):
        assert survive({0: Death(call, told=True, told_to=told_to)}, evaluates=False)[0] == expected, call


def test_the_log_has_each_step_and_evaluation_once_and_in_order_whenever_its_writer_dies(monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {"calls": [1, 2], "checkpoint_every": 100}  # a checkpoint's end is at no certain call
    expected = undisturbed(**settings)
    for flush_every_s in (0.0, 1.0):  # what the others know may be in the file already, or not
        monkeypatch.setattr("unisono.observe.metrics._FLUSH_EVERY_S", flush_every_s)
        calls = survive({}, **settings)[1][0]
        # Around an evaluation in a call, and around the last one, after which nobody would miss its writer.
        for call in [*moments(48, 72, every=3), *moments(calls - 8, calls + 1, every=2)]:
            assert survive({0: Death(call, told=True)}, **settings)[0] == expected, call


@pytest.mark.parametrize("told", [False, True], ids=["unheard", "heard"])
def test_a_checkpoint_is_taken_again_soon_if_the_one_who_completes_it_dies(told: bool) -> None:
    for call in moments(62, 80, every=2):
        run = uuid.uuid4().hex
        work = functools.partial(train, run=run, calls=[4], evaluates=False, checkpoint_every=5, keep=100)
        run_lives(3, work, {0: Death(call, told)})
        found = [int(name.removeprefix("step-")) for name in Store(url_of(run)).list("checkpoints")]
        whole = [step for step in found if Store(url_of(run)).exists(f"checkpoints/step-{step}/checkpoint.json")]
        assert any(5 <= step < 9 for step in whole), (call, whole)
