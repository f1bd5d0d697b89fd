"""What people expect of data parallelism, collected from what other systems promise and test: a run as a whole."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR, ReduceLROnPlateau, StepLR

import unisono
from tests.contracts.scenarios import (
    DOUBLE,
    WORKERS,
    Moody,
    Recorded,
    Tied,
    Trace,
    assert_equal_on_all_workers,
    mean,
    mlp,
    setup_of,
    summed,
    tokens,
    trained,
    vectors,
)
from tests.reference import plain_loop
from tests.reference.harness import (
    Outcome,
    Setup,
    assert_close,
    assert_same_bits,
    assert_same_tensors,
    index_lists,
    outcome,
    plainly,
)
from unisono.collective import Collective, InProcess
from unisono.testing import run_threads

# ---------------------------------------------------------------------- optimizer and scheduler


def test_a_scheduler_counts_optimizer_steps_not_microbatches_or_workers() -> None:
    def setup() -> Setup:
        made = setup_of(mlp, rate=0.8)()
        return made._replace(scheduler=StepLR(made.optimizer, step_size=2, gamma=0.5))

    trace = Trace(lambda _, result: result.learning_rates)
    common = assert_equal_on_all_workers(setup)
    assert common.rates == [0.2]  # 5 steps: two decays
    trained(setup, workers=1, callbacks=[trace])
    assert trace.seen == [(0.8,), (0.8,), (0.4,), (0.4,), (0.2,)]


def test_a_plateau_scheduler_sees_the_global_loss() -> None:
    def setup() -> Setup:
        made = setup_of(mlp)()
        return made._replace(scheduler=ReduceLROnPlateau(made.optimizer, factor=0.5, patience=1, threshold=0.1))

    common = assert_equal_on_all_workers(setup, epochs=3)
    assert_close(common, plainly(setup, vectors(), batch_size=8, epochs=3), 1e-12)
    assert common.rates[0] < 0.1, "the rate never fell"


def test_gradients_left_over_from_before_are_not_counted() -> None:
    def setup() -> Setup:
        made = setup_of(mlp)()
        mean(made.model, (torch.ones(2, 6, dtype=DOUBLE), torch.tensor([0, 1]))).backward()
        return made

    assert_same_bits(trained(mlp), assert_equal_on_all_workers(setup))


def test_a_frozen_parameter_with_a_left_over_gradient_stays_frozen() -> None:
    def setup() -> Setup:
        torch.manual_seed(2)
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        mean(model, (torch.ones(2, 6, dtype=DOUBLE), torch.tensor([0, 1]))).backward()
        model.get_parameter("0.weight").requires_grad_(False)
        return Setup(model, optimizer, summed)

    common = assert_equal_on_all_workers(setup)
    assert torch.equal(common.state["0.weight"], setup().model.state_dict()["0.weight"])


def test_no_gradient_lingers_after_a_step() -> None:
    trace = Trace(lambda trainer, _: [parameter.grad for parameter in trainer.model.parameters()])
    trained(mlp, callbacks=[trace])
    assert all(gradient is None for gradients in trace.seen for gradient in gradients)


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.Adagrad])
def test_a_second_trainer_goes_on_with_the_optimizer_of_the_first(kind: type[torch.optim.Optimizer]) -> None:
    """Unfreezing layers shifts who owns what; the state of the layers trained before goes along."""
    data = vectors()

    def model() -> nn.Sequential:
        torch.manual_seed(2)
        return nn.Sequential(nn.Linear(6, 40), nn.Tanh(), nn.Linear(40, 11), nn.Tanh(), nn.Linear(11, 3)).double()

    def work(collective: Collective) -> Outcome:
        made = model()
        optimizer = kind(made.parameters())
        for frozen in (True, False):
            made[0].requires_grad_(not frozen)
            trainer = unisono.Trainer(
                made,
                optimizer,
                summed,
                batch_size=8,
                microbatches=4,
                collective=collective,
                sync=unisono.Exact(replicate_kib=0),
            )
            for batch in trainer.batches(data, 1):
                trainer.step(batch)
        return outcome(made, optimizer, [], [])

    one = run_threads(1, work)[0]
    for workers in WORKERS[1:]:
        outcomes = run_threads(workers, work)
        assert_same_tensors(outcomes[0].state, one.state, f"{workers} workers")
        states = [name for other in outcomes for name in other.optimizer]
        assert sorted(states) == sorted(one.optimizer), "the state is not shared out"
    plain = model()
    optimizer = kind(plain.parameters())
    for frozen in (True, False):
        plain[0].requires_grad_(not frozen)
        plain_loop.train(plain, optimizer, summed, data, index_lists(len(data), batch_size=8))
    assert_close(one, outcome(plain, optimizer, [], []), 1e-12)


# ---------------------------------------------------------------------- workers


def test_replicas_that_differ_at_the_start_take_worker_0s_values_and_say_so() -> None:
    def work(collective: Collective) -> dict[str, Tensor]:
        torch.manual_seed(collective.rank)
        model = Moody()
        trainer = unisono.Trainer(
            model, torch.optim.SGD(model.parameters(), lr=0.1), summed, batch_size=8, microbatches=4, collective=collective
        )
        start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        for batch in trainer.batches(vectors(), 1):
            trainer.step(batch)
        return start | {f"trained {name}": tensor for name, tensor in model.state_dict().items()}

    torch.manual_seed(0)
    expected = Moody().state_dict()
    with pytest.warns(UserWarning, match="differ at the start") as said:
        states = run_threads(3, work)
    assert len(said) == 1
    for state in states:
        assert_same_tensors({name: state[name] for name in expected}, expected, "start")
        assert_same_tensors(state, states[0], "end")


def test_a_callback_is_called_on_every_worker_after_every_step_and_epoch() -> None:
    class Counter(unisono.Callback):
        def __init__(self) -> None:
            self.calls: list[Any] = []

        def on_step(self, trainer: unisono.Trainer, result: unisono.StepResult) -> None:
            self.calls.append(("step", result.step, result.loss))

        def on_epoch(self, trainer: unisono.Trainer, epoch: int) -> None:
            self.calls.append(("epoch", epoch))

    def work(collective: Collective) -> list[Any]:
        made, counter = setup_of(mlp)(), Counter()
        trainer = unisono.Trainer(
            made.model, made.optimizer, summed, batch_size=20, microbatches=4, collective=collective, callbacks=[counter]
        )
        for batch in trainer.batches(vectors(), 2):
            trainer.step(batch)
        return counter.calls

    told = run_threads(3, work)
    assert [call[:2] for call in told[0]] == [("step", 1), ("step", 2), ("epoch", 0), ("step", 3), ("step", 4), ("epoch", 1)]
    assert told[1] == told[0]
    assert told[2] == told[0]


def test_a_callback_that_edits_weights_and_buffers_in_place_is_obeyed() -> None:
    def clamp(trainer: unisono.Trainer, result: unisono.StepResult) -> None:
        with torch.no_grad():
            for parameter in trainer.model.parameters():
                parameter.clamp_(-0.1, 0.1)
            trainer.model.get_buffer("norm.running_mean").mul_(0.5)

    common = assert_equal_on_all_workers(Moody, callbacks=[Trace(clamp)])
    assert float(common.state["out.weight"].abs().max()) <= 0.1
    assert not torch.equal(common.state["norm.running_mean"], trained(Moody).state["norm.running_mean"])


# ---------------------------------------------------------------------- randomness


def test_dropout_differs_between_microbatches_and_steps_but_not_between_numbers_of_workers() -> None:
    class Noisy(nn.Module):
        def __init__(self, masks: list[Tensor]) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(6, dtype=DOUBLE))
            self.masks = masks

        def forward(self, inputs: Tensor) -> Tensor:
            mask = F.dropout(torch.ones(2, 60, dtype=DOUBLE), 0.5)
            self.masks.append(mask)
            return inputs * self.scale * mask[:, :6]

    def masks_on(workers: int) -> set[bytes]:
        masks: list[Tensor] = []
        trained(setup_of(lambda: Noisy(masks)), vectors(16), workers=workers, sync=unisono.Exact(replicate_kib=0, one_pass=False))
        assert len(masks) == 8  # 2 steps of 4 microbatches
        assert not any(torch.equal(mask[0], mask[1]) for mask in masks), "two samples of a microbatch share a mask"
        return {mask.numpy().tobytes() for mask in masks}

    one = masks_on(1)
    assert len(one) == 8, "two microbatches drew the same mask"
    assert masks_on(2) == one
    assert masks_on(3) == one


def test_what_is_drawn_between_steps_is_the_same_for_any_number_of_workers() -> None:
    def draw(_: unisono.Trainer, __: unisono.StepResult) -> tuple[float, float, float]:
        return float(torch.rand(())), float(np.random.rand()), random.random()

    def drawn(workers: int) -> set[tuple[Any, ...]]:
        def work(collective: Collective) -> tuple[Any, ...]:
            made, trace = setup_of(Moody)(), Trace(draw)
            trainer = unisono.Trainer(
                made.model, made.optimizer, summed, batch_size=8, microbatches=4, collective=collective, callbacks=[trace]
            )
            for batch in trainer.batches(vectors(), 1):
                trainer.step(batch)
            assert len(set(trace.seen)) == 5, "two steps left the generators alike"
            return tuple(trace.seen)

        return set(run_threads(workers, work))

    one = drawn(1)
    assert len(one) == 1
    assert drawn(2) == one
    assert drawn(3) == one


def test_the_users_generators_before_training_have_no_say_in_it() -> None:
    """The seed of a run is the trainer's; steps leave the process-wide generators in a state that depends on it alone."""

    def after(chance: int) -> tuple[Any, ...]:
        made = setup_of(Moody)()
        torch.manual_seed(chance)
        np.random.seed(chance)
        random.seed(chance)
        trainer = unisono.Trainer(made.model, made.optimizer, summed, batch_size=8, microbatches=4, collective=InProcess())
        losses = [trainer.step(batch).loss for batch in trainer.batches(vectors(), 1)]
        return (*losses, float(torch.rand(())), float(np.random.rand()), random.random())

    assert after(1) == after(2)


def test_making_a_trainer_draws_no_random_number() -> None:
    made = setup_of(Moody)()
    before = (torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate())
    unisono.Trainer(made.model, made.optimizer, summed, batch_size=8, microbatches=4, collective=InProcess())
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == before[1:]


def test_another_seed_is_another_run() -> None:
    assert trained(Moody, seed=1).losses != trained(Moody, seed=2).losses


# ---------------------------------------------------------------------- evaluation


def test_evaluating_in_the_middle_changes_nothing() -> None:
    def look(trainer: unisono.Trainer, result: unisono.StepResult) -> None:
        if result.step == 2:
            found = trainer.evaluate(vectors(13), {"loss": summed, "share": lambda m, b: ((m(b[0]) > 0).sum(), b[0].numel())})
            assert found.keys() == {"loss", "share"}
            assert trainer.model.training

    for workers in WORKERS:
        watched = trained(Moody, workers=workers, callbacks=[Trace(look)])
        assert_same_bits(trained(Moody), watched, f"{workers} workers")


def test_evaluation_counts_each_sample_once_and_equals_a_plain_one() -> None:
    data = vectors(103)

    def evaluated(workers: int) -> set[float]:
        def work(collective: Collective) -> float:
            made = setup_of(Moody)()
            trainer = unisono.Trainer(made.model, made.optimizer, summed, batch_size=8, microbatches=4, collective=collective)
            return trainer.evaluate(data)["loss"]

        return set(run_threads(workers, work))

    one = evaluated(1)
    assert evaluated(2) == evaluated(3) == evaluated(4) == one
    model = setup_of(Moody)().model.eval()
    inputs, labels = data.parts
    assert one.pop() == pytest.approx(float(F.cross_entropy(model(inputs), labels).detach()), rel=1e-12)


# ---------------------------------------------------------------------- stopping and going on


def _moody_with_schedule() -> Setup:
    made = setup_of(Moody)()
    return made._replace(scheduler=CosineAnnealingLR(made.optimizer, 10))


def test_three_steps_a_reload_and_three_more_equal_six(tmp_path: Path) -> None:
    data = vectors(20)
    whole = trained(_moody_with_schedule, data, epochs=2)
    assert len(whole.losses) == 6
    for number, (before, after) in enumerate([(1, 3), (3, 1), (4, 2)]):
        folder = tmp_path / str(number)
        first = trained(_moody_with_schedule, data, workers=before, run_dir=folder, epochs=1)
        rest = trained(_moody_with_schedule, data, workers=after, run_dir=folder, epochs=2)
        assert first.losses + rest.losses == whole.losses
        assert_same_tensors(rest.state, whole.state, "reloaded")
        assert_same_tensors(rest.optimizer, whole.optimizer, "reloaded")


def test_a_run_stopped_within_an_epoch_goes_on_with_the_exact_remainder_on_other_workers(tmp_path: Path) -> None:
    data = vectors(52)
    whole = trained(_moody_with_schedule, data)
    made, before = _moody_with_schedule(), Recorded(data)
    trainer = unisono.Trainer(
        made.model,
        made.optimizer,
        made.loss,
        batch_size=8,
        microbatches=4,
        scheduler=made.scheduler,
        run_dir=tmp_path,
        collective=InProcess(),
    )
    losses: list[float] = []
    with pytest.raises(SystemExit):
        for batch in trainer.batches(before, 1):
            if len(losses) == 2:
                os.kill(os.getpid(), signal.SIGTERM)  # remembered; acted on after the step
            losses.append(trainer.step(batch).loss)
    seen = [index for indices in index_lists(52, batch_size=8)[:3] for index in indices]
    assert trainer.position.samples == 24

    after = Recorded(data)
    rest = trained(_moody_with_schedule, after, workers=3, run_dir=tmp_path)
    compared = [0, 0, 26, 26, 51, 51] * 3  # before the first step, twice by each worker: have all the same data?
    identified = [0, 0, 26, 26, 51, 51] * 4  # twice by each worker that resumes, and for the checkpoint: are they those of then?
    assert sorted(after.read) == sorted([*(set(range(52)) - set(seen)), *compared, *identified])
    assert (len(losses), len(rest.losses)) == (2, 4)  # the third step's loss went with SystemExit
    assert [*losses, whole.losses[2], *rest.losses] == whole.losses
    assert_same_tensors(rest.state, whole.state, "remainder")
    assert_same_tensors(rest.optimizer, whole.optimizer, "remainder")


def test_the_weights_file_is_a_plain_state_dict_that_the_bare_model_loads(tmp_path: Path) -> None:
    run = trained(setup_of(Tied), tokens(), workers=3, run_dir=tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    bare = Tied()
    assert saved.keys() == bare.state_dict().keys()
    bare.load_state_dict(saved)
    assert bare.out.weight is bare.embedding.weight
    assert_same_tensors(dict(bare.state_dict()), run.state, "loaded")
