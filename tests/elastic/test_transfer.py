"""State for workers that need it, and for no others."""

from __future__ import annotations

import pickle

import pytest
import torch

from unisono.checkpoint import message
from unisono.collective import Collective
from unisono.elastic import transfer as module
from unisono.elastic.held_state import Outcome
from unisono.elastic.outside import Outsider
from unisono.elastic.recovery_plan import RecoveryPlan, WorkerReport
from unisono.elastic.transfer import StateTransfer
from unisono.errors import CheckpointError, ConfigurationError
from unisono.testing import run_threads


def given(numel: int = 1000) -> StateTransfer:
    return StateTransfer(
        outcome=Outcome(result={"loss": 0.5}, leavers=["0.1"], groups=[{"lr": 0.1, "betas": (0.9, 0.999)}]),
        buffers=[torch.ones(3)],
        weights=[torch.arange(float(numel))],
        state={0: {"momentum": torch.ones(2, 3).t(), "step": 4}},
        groups=[{"lr": 0.1, "growth": float("inf")}],
        scheduler=None,
        replay_log={"steps": [], "buffers": [], "allowed": True},
        frozen={},
        run={},
    )


def test_only_those_who_need_it_receive_it() -> None:
    def work(collective: Collective) -> tuple[int, StateTransfer | None]:
        before = collective.bytes_sent
        found = StateTransfer.deliver(given() if collective.rank == 2 else None, collective, source=2, receivers={0, 3})
        return collective.bytes_sent - before, found

    results = run_threads(4, work)
    size = len(message.to_bytes(vars(given()), module._TYPES))
    assert [found is not None for _, found in results] == [True, False, False, True]
    assert results[2][0] - results[1][0] == 2 * size
    for found in (results[0][1], results[3][1]):
        assert found is not None
        assert found.outcome == given().outcome
        assert found.groups == given().groups
        assert found.state is not None
        assert found.state[0]["momentum"].stride() == (1, 3)


def test_a_pickle_from_the_network_is_refused_and_not_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "to_bytes", lambda state, types: pickle.dumps({"weights": [1.0]}))

    def work(collective: Collective) -> str:
        if collective.rank == 0:
            StateTransfer.deliver(given(), collective, source=0, receivers={1})
            return ""
        with pytest.raises(CheckpointError) as caught:
            StateTransfer.deliver(None, collective, source=0, receivers={1})
        return str(caught.value)

    assert "not a unisono message" in run_threads(2, work)[1]


def test_state_that_only_a_pickle_could_hold_is_named() -> None:
    with pytest.raises(CheckpointError, match=r"scheduler\.when.*datetime"):
        import datetime

        held = {**vars(given()), "scheduler": {"when": datetime.date(2026, 1, 1)}}
        message.to_bytes(held, module._TYPES)


def test_a_worker_that_has_yet_to_join_is_told_so_when_it_communicates() -> None:
    outsider = Outsider()
    assert (outsider.rank, outsider.size) == (1, 2)
    for call in (outsider.barrier, lambda: outsider.broadcast(torch.ones(1)), lambda: outsider.all_gather_bytes(b"")):
        with pytest.raises(ConfigurationError, match="joins a run that is under way"):
            call()


def report(operations: int, reached: int, *, has_all: bool = False, has_part: bool = True) -> WorkerReport:
    return WorkerReport(
        trainer=1,
        operations=operations,
        confirmed=0,
        reached=reached,
        committed=reached,
        changing=False,
        has_all=has_all,
        has_part=has_part,
        may_share=True,
    )


def test_the_source_is_the_worker_that_has_come_furthest() -> None:
    plan = RecoveryPlan.of([report(4, 7), report(5, 8), report(5, 8, has_all=True), report(-1, 0, has_part=False)], trainer=1)
    assert plan.source == 2
    assert plan.behind == {0, 3}
    assert plan.unlike == [0, 1, 3]
