"""Workers that are lost at any moment change nothing: those who are left go on, and end with the same bits."""

from __future__ import annotations

import functools
import itertools
import math
import random
import signal
import threading
import uuid
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import unisono
from tests.fault_injection import Death, Died, Lives, run_lives
from tests.memory import empty_memory
from tests.moments import moments
from tests.training.hard_problem import digest
from tests.training.small_run import BATCH_SIZE, MICROBATCHES, SAMPLES, Augmented, Net, elastic_trainer, loss
from unisono.elastic.link import Link
from unisono.elastic.membership import RestartFromCheckpoint
from unisono.errors import FingerprintMismatch

EPOCHS = 2
Found = dict[str, str]


def accuracy(model: nn.Module, batch: Any) -> tuple[Tensor, int]:
    inputs, targets = batch
    return (model(inputs).argmax(1) == targets).sum(), len(targets)


class Evaluates(unisono.Callback):
    edits_weights = False

    def __init__(self, data: Augmented) -> None:
        self.data = data
        self.seen: list[dict[str, float]] = []

    def on_epoch(self, trainer: unisono.Trainer, epoch: int) -> None:
        self.seen.append(trainer.evaluate(self.data, {"accuracy": accuracy}))


class DiesWhileUpdating(torch.optim.AdamW):
    """Ends its worker when it has updated some parameters of a step, and others not."""

    def __init__(self, *args: Any, at: int, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.at = at
        self.updates = itertools.count(1)

    def step(self, closure: Any = None) -> Any:
        if next(self.updates) == self.at:
            due = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
            for parameter in due[len(due) // 2 :]:
                parameter.grad = None
            super().step(closure)
            raise Died
        return super().step(closure)


def train(
    link: Link | None,
    *,
    run: str = "",
    epochs: int = EPOCHS,
    replicate_kib: float,
    own_loop: bool = False,
    busy: bool = False,
    dies_in_update: int = 0,
    callbacks: Sequence[unisono.Callback] = (),
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer] | None = None,
    calls: Sequence[int] = (),
    samples: int = SAMPLES,
    unusable: int | None = None,
) -> Found:
    torch.manual_seed(7)
    model, data = Net(), Augmented(samples)
    if unusable is not None:
        data.inputs[unusable] = math.inf
    optimizer: torch.optim.Optimizer = DiesWhileUpdating(model.parameters(), lr=0.01, at=dies_in_update)
    if make_optimizer is not None:
        optimizer = make_optimizer(model)
    watcher = Evaluates(data)
    trainer = unisono.Trainer(
        model,
        optimizer,
        loss,
        batch_size=BATCH_SIZE,
        microbatches=MICROBATCHES,
        scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=6),
        max_grad_norm=0.5,
        sync=unisono.Exact(replicate_kib=replicate_kib, shard_update=True),
        run_dir=f"memory://recovery-{run or uuid.uuid4().hex}",
        checkpoint_every=2,
        on_nonfinite="error" if unusable is None else "skip",
        callbacks=[watcher, *callbacks],
        collective=link,
    )
    results: list[unisono.StepResult] = []
    ledgers: Found = {}
    if own_loop:
        for batch in trainer.batches(data, epochs):
            results.append(trainer.step(batch))
            ledgers[f"ledger {trainer.position.step}"] = repr(trainer.position.ledger)
            if busy:  # what users do between two steps
                watcher.seen.append(trainer.evaluate(data, {"accuracy": accuracy}))
                optimizer.param_groups[0]["lr"] *= 0.97
                optimizer.param_groups[0]["initial_lr"] *= 0.97
    else:
        for done in [*calls, epochs]:
            trainer.fit(data, done)
    last = trainer.evaluate(data, {"accuracy": accuracy})
    found = {name: digest(value) for name, value in model.state_dict().items()}
    found |= {f"result {result.step}": repr(result) for result in results}
    return {**found, **ledgers, "seen": repr(watcher.seen), "last": repr(last), "position": repr(trainer.position)}


@functools.cache
def undisturbed(own_loop: bool = False, epochs: int = EPOCHS, busy: bool = False) -> Found:
    return train(None, replicate_kib=0, own_loop=own_loop, epochs=epochs, busy=busy)


def live(
    deaths: dict[int, Death], *, workers: int = 3, joiners: int = 0, machines: dict[int, str] | None = None, **settings: Any
) -> Lives:
    work = functools.partial(train, run=uuid.uuid4().hex, **settings)
    try:
        return run_lives(workers, work, deaths, joiners=joiners, machines=machines)
    finally:
        empty_memory()


@pytest.mark.parametrize("told", [False, True], ids=["unheard", "heard"])
@pytest.mark.parametrize("replicate_kib", [0.0, 4096.0], ids=["owners", "everywhere"])
@pytest.mark.parametrize("victim", [0, 2])
def test_a_worker_may_die_at_any_call_to_the_others(victim: int, replicate_kib: float, told: bool) -> None:
    calls = live({}, replicate_kib=replicate_kib).calls[victim]
    assert calls > 40

    for call in moments(1 + 2 * told, calls + 1, every=13):
        lives = live({victim: Death(call, told)}, replicate_kib=replicate_kib)
        # A checkpoint that is complete a step earlier or later makes a few calls more or less.
        died = {victim} if lives.calls[victim] >= call else set()
        assert sorted(lives.results) == sorted({0, 1, 2} - died), call
        for found in lives.results.values():
            assert found == undisturbed(), call


def test_two_may_die_the_second_while_the_others_still_recover() -> None:
    for call in moments(20, 110, every=13):
        lives = live({0: Death(40), 1: Death(call)}, workers=4, replicate_kib=0.0)
        assert {2, 3} <= set(lives.results)
        for found in lives.results.values():
            assert found == undisturbed(), call


@pytest.mark.parametrize("own_loop", [False, True], ids=["fit", "own loop"])
@pytest.mark.parametrize("update", [1, 2, 5, 6])
def test_an_update_that_is_half_done_is_undone(update: int, own_loop: bool) -> None:
    def work(link: Link) -> Found:
        victim = link.membership.me.uid == "thread 1"
        return train(link, run=run, replicate_kib=0.0, own_loop=own_loop, dies_in_update=update if victim else 0)

    run = uuid.uuid4().hex
    lives = run_lives(3, work, {})

    assert sorted(lives.results) == [0, 2]
    for found in lives.results.values():
        assert found == undisturbed(own_loop)


@pytest.mark.parametrize("replicate_kib", [0.0, 4096.0], ids=["owners", "everywhere"])
def test_workers_that_come_later_take_part_in_the_run_as_it_is(replicate_kib: float) -> None:
    lives = live({}, workers=2, joiners=2, replicate_kib=replicate_kib, epochs=8)

    assert sorted(lives.results) == [0, 1, 2, 3]
    expected = undisturbed(epochs=8)
    assert lives.results[0] == lives.results[1] == expected
    for late in (2, 3):
        # It saw the evaluations since it came; one that came too late has the weights only.
        same = {**expected, "seen": lives.results[late]["seen"], "position": lives.results[late]["position"]}
        assert lives.results[late] == same
    assert max(lives.calls[2], lives.calls[3]) > 10, "nobody came in time"


@pytest.mark.parametrize("replicate_kib", [0.0, 4096.0], ids=["owners", "everywhere"])
def test_newcomers_come_to_a_loop_of_ones_own_between_two_batches(replicate_kib: float) -> None:
    lives = live({}, workers=2, joiners=1, replicate_kib=replicate_kib, epochs=8, own_loop=True, busy=True)

    expected = undisturbed(own_loop=True, epochs=8, busy=True)
    assert lives.results[0] == lives.results[1] == expected
    late = lives.results[2]
    assert {name: late[name] for name in late if name.startswith(("result", "ledger"))}.items() <= expected.items()
    weights = {name: value for name, value in expected.items() if not name.startswith(("result", "ledger", "seen"))}
    assert weights.items() <= late.items()
    assert lives.calls[2] > 10, "it did not come in time"


@pytest.mark.parametrize(
    "other", [{"epochs": 7}, {"order": "sequential"}, {"drop_last": True}], ids=lambda other: next(iter(other))
)
def test_a_newcomer_with_other_arguments_is_turned_away_and_the_run_goes_on(other: dict[str, Any]) -> None:
    def work(link: Link) -> Found | str:
        arguments = {"epochs": 8, "order": "shuffle", "drop_last": False} | ({} if link.membership.is_founder else other)
        trainer = elastic_trainer(link)
        try:
            trainer.fit(Augmented(), **arguments)
        except FingerprintMismatch as error:
            return str(error)
        return {name: digest(value) for name, value in trainer.model.state_dict().items()}

    results = run_lives(2, work, {}, joiners=1).results
    alone = elastic_trainer(None)
    alone.fit(Augmented(), 8)
    expected = {name: digest(value) for name, value in alone.model.state_dict().items()}
    assert results[0] == results[1] == expected
    assert isinstance(results[2], str)
    assert "cannot join" in results[2]
    assert next(iter(other)) in results[2]


def arguments_of(monkeypatch: pytest.MonkeyPatch, workers: Sequence[Sequence[str]]) -> list[str]:
    """What becomes of two workers and one that comes later, with these arguments."""

    class Sys(threading.local):  # these workers are threads
        argv: Sequence[str]

    fake = Sys()
    monkeypatch.setattr("unisono.elastic.identity.sys", fake)

    def work(link: Link) -> str:
        fake.argv = ["train.py", *workers[link.membership.me.process.pid]]
        try:
            elastic_trainer(link).fit(Augmented(), 8)
        except FingerprintMismatch as error:
            return str(error)
        return ""

    results = run_lives(2, work, {}, joiners=1).results
    return [results[rank] for rank in range(3)]


def test_a_newcomer_with_other_arguments_of_the_script_is_turned_away(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = ["--dropout", "0.1"]
    *first, late = arguments_of(monkeypatch, [ours, ours, ["--dropout", "0.2"]])
    assert first == ["", ""]
    assert "'0.2', not '0.1'" in late
    assert "3 of them, not 2" in arguments_of(monkeypatch, [ours, ours, [*ours, "--amp"]])[2]


def test_a_newcomer_may_have_other_arguments_where_the_first_workers_had_too(monkeypatch: pytest.MonkeyPatch) -> None:
    assert arguments_of(monkeypatch, [["--data", place] for place in "abc"]) == ["", "", ""]
    assert arguments_of(monkeypatch, [[], ["--data", "b"], ["--lr", "0.1", "--amp"]]) == ["", "", ""]


class Scales(unisono.Callback):
    """Edits the weights, as an average of weights or a projection would."""

    def on_step(self, trainer: unisono.Trainer, result: unisono.StepResult) -> None:
        with torch.no_grad():
            for parameter in trainer.model.parameters():
                parameter.mul_(0.9)


@pytest.mark.parametrize("replicate_kib", [0.0, 4096.0], ids=["owners", "everywhere"])
def test_weights_that_a_callback_edits_are_edited_once_whoever_hears_of_a_death(replicate_kib: float) -> None:
    expected = train(None, replicate_kib=0.0, callbacks=[Scales()])
    calls = live({}, replicate_kib=replicate_kib, callbacks=[Scales()]).calls[2]
    tried = moments(12, calls + 1, every=7)
    ended = 0
    for call in tried:
        try:
            lives = live({2: Death(call, told=True, told_to=0)}, replicate_kib=replicate_kib, callbacks=[Scales()])
        except RestartFromCheckpoint:  # then all start again from the checkpoint
            continue
        ended += 1
        for found in lives.results.values():
            assert found == expected, call
    assert ended > len(tried) / 2


class CountsInGroups(torch.optim.SGD):
    """Its learning rate depends on what it counts in its parameter groups, as that of schedule-free optimizers."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["steps"] = group.get("steps", 0) + 1
            group["weight_decay"] = 0.1 / group["steps"]
        return super().step(closure)


class CountsInNumbers(torch.optim.SGD):
    """Its state holds plain numbers of each kind, on which the next step depends."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter]
                    state["steps"] = state.get("steps", 0) + 1
                    state["size"] = 0.5 * state.get("size", 1.0) + float(parameter.grad.abs().sum())
                    state["turns"] = not state.get("turns", False)
                    parameter.grad.mul_(1 / state["steps"] + state["size"] * (1e-3 if state["turns"] else -1e-3))
        return super().step(closure)


def numbers(model: nn.Module) -> torch.optim.Optimizer:
    return CountsInNumbers(model.parameters(), lr=0.01, momentum=0.9)


def groups(model: nn.Module) -> torch.optim.Optimizer:
    return CountsInGroups(model.parameters(), lr=0.01, momentum=0.9)


@pytest.mark.parametrize("replicate_kib", [0.0, 4096.0], ids=["owners", "everywhere"])
@pytest.mark.parametrize("make", [groups, numbers])
def test_whatever_an_optimizer_counts_in_a_death_does_not_count_twice(
    make: Callable[[nn.Module], torch.optim.Optimizer], replicate_kib: float
) -> None:
    expected = train(None, replicate_kib=0.0, make_optimizer=make)
    calls = live({}, replicate_kib=replicate_kib, make_optimizer=make).calls
    for call in moments(12, calls[2] + 1, every=7):
        workers = 2 + call % 2
        victim = call % workers
        deaths = {victim: Death(call, told=True, told_to=(victim + 1) % workers)}
        for found in live(deaths, workers=workers, replicate_kib=replicate_kib, make_optimizer=make).results.values():
            assert found == expected, call


def test_what_an_optimizer_counts_is_told_to_a_host_that_is_ahead() -> None:
    settings: dict[str, Any] = {"replicate_kib": 0.0, "make_optimizer": numbers, "epochs": 3}
    machines = {0: "a", 1: "b", 2: "b"}
    expected = train(None, **settings)
    calls = live({}, machines=machines, **settings).calls[2]
    for call in moments(40, calls + 1, every=11):
        for found in live({1 + call % 2: Death(call)}, machines=machines, **settings).results.values():
            assert found == expected, call


@pytest.mark.parametrize("machines", [None, {0: "a", 1: "a", 2: "b"}], ids=["one host", "two hosts"])
def test_who_comes_later_is_given_what_an_optimizer_counts(machines: dict[int, str] | None) -> None:
    settings: dict[str, Any] = {"replicate_kib": 0.0, "make_optimizer": numbers, "epochs": 8}
    expected = train(None, **settings)
    # One of the first goes, so that what it counted is for another one to go on with.
    lives = live({1: Death(60)}, workers=2, joiners=1, machines=machines, **settings)
    assert lives.results[0] == expected
    assert lives.calls[2] > 10, "it did not come in time"
    assert {**expected, **{key: lives.results[2][key] for key in ("seen", "position")}} == lives.results[2]


class RemembersInAList(torch.optim.SGD):
    """Its state holds what cannot be held in common."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    sizes = self.state[parameter].setdefault("sizes", [])
                    sizes.append(float(parameter.grad.abs().sum()))
                    parameter.grad.mul_(sizes[-1] / sum(sizes))
        return super().step(closure)


def lists(model: nn.Module) -> torch.optim.Optimizer:
    return RemembersInAList(model.parameters(), lr=0.01, momentum=0.9)


@pytest.mark.parametrize("replicate_kib", [0.0, 4096.0], ids=["owners", "everywhere"])
def test_state_that_cannot_be_held_in_common_is_never_wrong(replicate_kib: float) -> None:
    expected = train(None, replicate_kib=0.0, make_optimizer=lists)
    calls = live({}, replicate_kib=replicate_kib, make_optimizer=lists).calls
    ended = 0
    for call in moments(12, calls[2] + 1, every=13):
        deaths = {2: Death(call, told=True, told_to=0)}
        try:
            lives = live(deaths, replicate_kib=replicate_kib, make_optimizer=lists)
        except RestartFromCheckpoint:  # then all start again from the checkpoint
            continue
        ended += 1
        for found in lives.results.values():
            assert found == expected, call
    assert ended > 1


class ChangesItsState(torch.optim.SGD):
    """Its momentum is None in the first two steps, and then a new tensor in each: first of one element, later one for each; a
    number becomes a tensor; and a second tensor comes late, for some parameters."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for number, parameter in enumerate(group["params"]):
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                state["steps"] = state["steps"] + 1 if state else torch.ones(())
                steps = int(state["steps"])
                state["size"] = 0 if steps < 2 else 0.5 * state["size"] + parameter.grad.abs().sum()
                was = state.get("momentum")
                gradient = parameter.grad if steps >= 5 else parameter.grad.amax()
                state["momentum"] = None if steps < 3 else gradient + (0 if was is None else 0.9 * was)
                if steps >= 4 and number % 2:
                    state["late"] = state.get("late", 0) + parameter.grad
                for value in (state["momentum"], state.get("late")):
                    parameter.sub_(parameter.grad if value is None else value, alpha=group["lr"])
                parameter.mul_(1 - 1e-3 * state["size"])


@pytest.mark.parametrize("machines", [None, {0: "a", 1: "b", 2: "b"}], ids=["one host", "two hosts"])
def test_state_may_come_late_and_take_another_shape(machines: dict[int, str] | None) -> None:
    def make(model: nn.Module) -> torch.optim.Optimizer:
        return ChangesItsState(model.parameters(), lr=0.01)

    settings: dict[str, Any] = {"replicate_kib": 0.0, "make_optimizer": make, "epochs": 3}
    expected = train(None, **settings)
    calls = live({}, machines=machines, **settings).calls[2]
    tried = moments(30, calls + 1, every=11)
    ended = 0
    for call in tried:
        victim = call % 3
        try:
            lives = live({victim: Death(call, told=call % 2 == 0, told_to=(victim + 1) % 3)}, machines=machines, **settings)
        except RestartFromCheckpoint:  # a host of one worker may be lost with it
            continue
        ended += 1
        for found in lives.results.values():
            assert found == expected, call
    assert ended > len(tried) / 2


@pytest.mark.parametrize("own_loop", [False, True])
def test_state_that_came_in_the_last_step_of_a_loop_is_held_before_it_ends(own_loop: bool) -> None:
    settings: dict[str, Any] = {"replicate_kib": 0.0, "calls": [1], "own_loop": own_loop, "samples": BATCH_SIZE}
    expected = train(None, **settings)
    calls = live({}, **settings).calls[2]
    first = live({}, **settings, epochs=1).calls[2]
    for call in moments(first - 8, calls + 1, every=3):
        lives = live({2: Death(call)}, **settings)
        for found in lives.results.values():
            assert found == expected, call


def test_a_step_that_is_left_out_right_after_the_first_one_loses_no_state() -> None:
    for unusable in range(SAMPLES):
        settings: dict[str, Any] = {"replicate_kib": 0.0, "unusable": unusable, "own_loop": True}
        expected = train(None, **settings)
        if "skipped=True" in expected["result 2"]:
            break
    assert "skipped=False" in expected["result 1"]
    assert "skipped=True" in expected["result 2"]
    calls = live({}, **settings).calls[2]
    for call in moments(24, calls + 1, every=7):
        for found in live({2: Death(call)}, **{**settings, "own_loop": call % 2 == 0}).results.values():
            assert {**expected, **found} == expected, call


def test_one_that_was_behind_stays_right_when_the_one_that_helped_it_dies_too() -> None:
    for first in moments(44, 56, every=4):
        for call in moments(first + 7, first + 26, every=4):
            lives = live({2: Death(first, told=True, told_to=0), 0: Death(call)}, replicate_kib=0.0)
            assert 1 in lives.results
            for found in lives.results.values():
                assert found == undisturbed(), (first, call)


def test_one_may_die_while_steps_are_done_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unisono.elastic.shared_state._BYTES_PER_S", 1e-3)  # as for large models: copies are rare
    expected = train(None, replicate_kib=0.0, calls=[1], epochs=3)
    calls = live({}, workers=4, replicate_kib=0.0, calls=[1], epochs=3).calls[2]
    repeated = 0
    for first in range(70, calls, 31):
        for call in moments(first + 8, first + 34, every=7):
            deaths = {2: Death(first), 1: Death(call, told=call % 2 == 0, told_to=0)}
            try:
                lives = live(deaths, workers=4, replicate_kib=0.0, calls=[1], epochs=3)
            except RestartFromCheckpoint:
                continue
            repeated += 1
            for found in lives.results.values():
                assert found == expected, (first, call)
    assert repeated > 10


class DrawsAfterEvaluating(Evaluates):
    def on_epoch(self, trainer: unisono.Trainer, epoch: int) -> None:
        super().on_epoch(trainer, epoch)
        self.seen.append({"drawn": float(torch.rand(())) + float(np.random.rand()) + random.random()})


def evaluate_and_draw(link: Link | None) -> str:
    data = Augmented()
    watcher = DrawsAfterEvaluating(data)
    trainer = elastic_trainer(link, replicate_kib=0.0, callbacks=[watcher])
    trainer.fit(data, 2)
    return repr(watcher.seen)


def test_what_is_drawn_after_an_evaluation_is_the_same_for_those_who_were_given_its_result() -> None:
    expected = evaluate_and_draw(None)
    for call in moments(44, 58, every=2):
        for told_to in (0, 1):
            lives = run_lives(3, evaluate_and_draw, {2: Death(call, told=True, told_to=told_to)})
            assert lives.results == {0: expected, 1: expected}, (call, told_to)


class IsToldToLeave(unisono.Callback):
    edits_weights = False

    def on_step(self, trainer: unisono.Trainer, result: unisono.StepResult) -> None:
        if result.step == 2:
            assert trainer._loop.stop is not None
            trainer._loop.stop.requested = signal.SIGTERM


def ended(link: Link, **settings: Any) -> Found | int:
    """What those who were there first, and are told to leave, end with, and those who come later."""
    callbacks = [IsToldToLeave()] if link.membership.is_founder else []
    try:
        return train(link, replicate_kib=0.0, callbacks=callbacks, **settings)
    except SystemExit as end:
        return int(end.code or 0)


def test_when_all_are_told_to_leave_those_who_wait_to_join_take_over() -> None:
    work = functools.partial(ended, run=uuid.uuid4().hex, epochs=4)
    results = run_lives(2, work, {}, joiners=1).results
    expected = undisturbed(epochs=4)
    same = {**expected, "seen": results[2]["seen"]}
    assert results == {0: 0, 1: 0, 2: same}


def test_when_all_are_told_to_leave_and_nobody_waits_the_run_stops_and_can_be_resumed() -> None:
    run = uuid.uuid4().hex
    assert run_lives(2, functools.partial(ended, run=run), {}).results == {0: 143, 1: 143}
    found = train(None, run=run, replicate_kib=0.0)
    assert found == {**undisturbed(), "seen": found["seen"]}


def two_trainers(link: Link | None, replicate_kib: float) -> Found:
    data, found = Augmented(), {}
    for number in range(2):
        trainer = elastic_trainer(link, seed=number, replicate_kib=replicate_kib)
        trainer.fit(data, 1)
        found |= {f"{number} {name}": digest(value) for name, value in trainer.model.state_dict().items()}
    return found


@pytest.mark.parametrize(
    ("replicate_kib", "calls"),
    [(0.0, moments(42, 62, every=3)), (4096.0, moments(12, 26, every=2))],
    ids=["owners", "everywhere"],
)
def test_a_worker_may_die_when_some_have_come_to_the_next_trainer_and_others_have_not(replicate_kib: float, calls: range) -> None:
    work = functools.partial(two_trainers, replicate_kib=replicate_kib)
    expected = two_trainers(None, replicate_kib)
    for call in calls:
        for victim in (0, 2):
            lives = run_lives(3, work, {victim: Death(call, told=True)})
            assert lives.results == dict.fromkeys({0, 1, 2} - {victim}, expected), (call, victim)


class LooksAway(unisono.Callback):
    """Keeps the members in the first call until the one that waits to join does not look any more; lets nobody in there."""

    edits_weights = False

    def __init__(self, link: Link, asleep: list[bool]) -> None:
        self.link, self.asleep = link, asleep
        self.applicants = link.membership.applicants
        self.epoch = 0
        link.membership.applicants = lambda **settings: self.applicants(**settings) if self.epoch else []  # type: ignore[method-assign]

    def on_step(self, trainer: unisono.Trainer, result: unisono.StepResult) -> None:
        self.epoch = trainer.position.epoch
        for _ in range(300 if result.step <= 3 else 0):
            if not self.asleep:
                self.link.pause(0.01)


def comes_late(link: Link, asleep: list[bool]) -> Found:
    """Three calls; who joins waits in the first one, sleeps, and looks again when it is let in, in the second."""
    store, key, pause = link.membership.store, f"admitted/{link.membership.me.uid}", link.membership.pause

    def sleep(seconds: float) -> None:
        pause(seconds)
        if store.check(["applicant/0"]):
            asleep.append(True)
            for _ in range(4000):
                if not store.check([key]):
                    pause(0.001)

    callbacks = [LooksAway(link, asleep)] if link.membership.is_founder else []
    if not callbacks:
        link.membership.pause = sleep
    trainer = elastic_trainer(link, replicate_kib=0.0, callbacks=callbacks)
    for epochs in (1, 2, 3):
        trainer.fit(Augmented(), epochs)
    return {name: digest(value) for name, value in trainer.model.state_dict().items()}


def test_one_that_is_let_in_when_the_others_have_come_to_another_call_declines_and_asks_again() -> None:
    results = run_lives(2, functools.partial(comes_late, asleep=[]), {}, joiners=1, timeout_s=10.0).results
    assert sorted(results) == [0, 1, 2]
    assert results[0] == results[1] == results[2]


class Tells(unisono.Callback):
    edits_weights = False

    def __init__(self) -> None:
        self.step = 0

    def on_step(self, trainer: unisono.Trainer, result: unisono.StepResult) -> None:
        self.step = result.step


def test_one_may_come_in_the_last_step_of_a_call_as_in_any_other() -> None:
    ends_of_calls = 0
    for step in range(1, 11):
        first, joined_at = Tells(), []

        def work(link: Link, step: int = step, first: Tells = first, joined_at: list[int] = joined_at) -> Found:
            comes = not link.membership.is_founder
            while comes and first.step < step:
                link.pause(0.001)
            told = Tells() if comes else first
            trainer = elastic_trainer(link, replicate_kib=0.0, callbacks=[told])
            for epochs in range(1, 6):
                trainer.fit(Augmented(), epochs)
                if comes and link.generation is not None and not joined_at:
                    joined_at.append(trainer.position.step if told.step == 0 else 0)
            return {name: digest(value) for name, value in trainer.model.state_dict().items()}

        found = run_lives(2, work, {}, joiners=1).results
        assert joined_at, "it came too late"
        assert found[0] == found[1] == found[2]
        ends_of_calls += any(joined_at)
    assert ends_of_calls, "nobody came in the last step of a call"


@pytest.mark.parametrize("replicate_kib", [0.0, 4096.0], ids=["owners", "everywhere"])
def test_one_that_comes_may_die_at_any_moment(replicate_kib: float) -> None:
    for call in moments(1, 26, every=5):
        lives = live({2: Death(call)}, workers=2, joiners=1, replicate_kib=replicate_kib)
        assert {0, 1} <= set(lives.results), call
        assert lives.results[0] == lives.results[1] == undisturbed(), call


HOSTS = {0: "one", 1: "one", 2: "other", 3: "other"}


@pytest.mark.parametrize("victim", [0, 3])
@pytest.mark.parametrize("told", [False, True], ids=["unheard", "heard"])
def test_one_of_several_hosts_may_lose_a_worker(victim: int, told: bool) -> None:
    calls = live({}, workers=4, machines=HOSTS, replicate_kib=0.0).calls[victim]
    for call in moments(1 + 3 * told, calls + 1, every=23):
        lives = live({victim: Death(call, told)}, workers=4, machines=HOSTS, replicate_kib=0.0)
        died = {victim} if lives.calls[victim] >= call else set()
        assert sorted(lives.results) == sorted({0, 1, 2, 3} - died), call
        for found in lives.results.values():
            assert found == undisturbed(), call


@pytest.mark.parametrize("machines", [("a", "b", "c"), ("a", "b", "c", "d"), ("a", "a", "b", "c")], ids="".join)
@pytest.mark.parametrize("told", [False, True], ids=["unheard", "heard"])
def test_one_of_many_hosts_may_lose_a_worker_or_be_lost(machines: tuple[str, ...], told: bool) -> None:
    """Between three hosts and more, sums are made once and sent on."""
    where = dict(enumerate(machines))
    for victim in (0, len(machines) - 1):
        calls = live({}, workers=len(machines), machines=where, replicate_kib=0.0).calls[victim]
        for call in moments(1 + 3 * told, calls + 1, every=23):
            lives = live({victim: Death(call, told)}, workers=len(machines), machines=where, replicate_kib=0.0)
            died = {victim} if lives.calls[victim] >= call else set()
            assert sorted(lives.results) == sorted(set(where) - died), call
            for found in lives.results.values():
                assert found == undisturbed(), call


@pytest.mark.parametrize("calls", [moments(15, 30, every=2), moments(72, 92, every=3)], ids=["begins", "ends"])
def test_a_worker_may_die_when_some_are_in_the_call_in_which_weights_are_shared_and_others_are_not(calls: range) -> None:
    for call in calls:
        lives = live({2: Death(call, told=True)}, replicate_kib=0.0)
        assert {0, 1} <= set(lives.results), call
        for found in lives.results.values():
            assert found == undisturbed(), call


def test_some_may_have_begun_when_the_others_have_not_and_everyone_holds_everything_from_now_on() -> None:
    for call in moments(12, 25, every=2):
        lives = live({0: Death(call, told=True)}, machines={0: "a", 1: "a", 2: "b"}, replicate_kib=0.0)
        assert sorted(lives.results) == [1, 2], call
        for found in lives.results.values():
            assert found == undisturbed(), call


@pytest.mark.parametrize(
    ("victims", "calls"),
    [((0, 3), moments(50, 60, every=2)), ((3, 0), moments(50, 68, every=3))],
    ids=["first, then last", "last, then first"],
)
def test_another_may_die_while_steps_are_done_again_or_everyone_gets_all_of_the_state(
    victims: tuple[int, int], calls: range
) -> None:
    """Of a host of two and two lone ones: without one of the two, each host is a lone one."""
    where = dict(enumerate("aabc"))
    for call in calls:
        deaths = {victims[0]: Death(46, told=True), victims[1]: Death(call, told=call % 2 == 1)}
        lives = live(deaths, workers=4, machines=where, replicate_kib=0.0)
        assert {1, 2} <= set(lives.results), call
        for found in lives.results.values():
            assert found == undisturbed(), call


@pytest.mark.parametrize(
    ("victim", "told", "calls"),
    [(1, False, range(22, 29)), (0, True, range(53, 57))],
    ids=["while others come", "while a checkpoint begins"],
)
def test_a_lone_worker_may_die_when_others_have_come_to_the_other_host(victim: int, told: bool, calls: range) -> None:
    for call in calls:
        deaths = {victim: Death(call, told)}
        lives = live(deaths, workers=2, joiners=2, machines=dict(enumerate("abaa")), replicate_kib=0.0, epochs=4)
        assert 1 - victim in lives.results, call
        expected = undisturbed(epochs=4)
        for rank, found in lives.results.items():
            late = {} if rank < 2 else {key: found[key] for key in ("seen", "position", "last")}
            assert found == {**expected, **late}, call


@pytest.mark.parametrize("host", [(0, 1), (2, 3)])
def test_a_whole_host_may_be_lost(host: tuple[int, int]) -> None:
    for call in moments(25, 100, every=14):
        lives = live(dict.fromkeys(host, Death(call)), workers=4, machines=HOSTS, replicate_kib=0.0)
        assert {0, 1, 2, 3}.difference(host) <= set(lives.results), call
        for found in lives.results.values():
            assert found == undisturbed(), call


@pytest.mark.parametrize(("machines", "workers"), [("aabb", 2), ("abc", 2), ("aba", 2), ("abcd", 3)])
def test_workers_of_any_host_may_come_later(machines: str, workers: int) -> None:
    lives = live(
        {},
        workers=workers,
        joiners=len(machines) - workers,
        machines=dict(enumerate(machines)),
        replicate_kib=0.0,
        epochs=8,
    )

    expected = undisturbed(epochs=8)
    for rank, found in lives.results.items():
        same = expected if rank < workers else {**expected, "seen": found["seen"], "position": found["position"]}
        assert found == same
    assert max(lives.calls[rank] for rank in range(workers, len(machines))) > 10, "nobody came in time"
