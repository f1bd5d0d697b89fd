"""What people expect of data parallelism, collected from what other systems promise and test: models, sums and batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import BatchSampler, Dataset, SequentialSampler, WeightedRandomSampler

import unisono
from tests.contracts.scenarios import (
    DOUBLE,
    Moody,
    Recorded,
    Tied,
    assert_equal_on_all_workers,
    mean,
    mlp,
    setup_of,
    summed,
    tokens,
    trained,
    vectors,
)
from tests.reference.harness import (
    Outcome,
    Samples,
    Setup,
    assert_close,
    assert_same_bits,
    assert_same_tensors,
    assert_tensors_close,
    in_unison,
    index_lists,
    outcome,
    plainly,
)
from unisono.collective import Collective, InProcess
from unisono.testing import run_threads

# ---------------------------------------------------------------------- sums and weights


def test_a_batch_split_over_four_workers_equals_the_whole_batch() -> None:
    whole = trained(mlp, workers=1, microbatches=1)
    split = trained(mlp, workers=4, microbatches=4)
    assert_close(split, whole, 1e-12)


def test_accumulating_four_microbatches_equals_one_large_batch() -> None:
    """Against accumulation as it is written by hand: four backward passes, each of its share of the mean, then one step."""
    data, made = vectors(), setup_of(mlp)()
    for indices in index_lists(len(data), batch_size=8):
        made.optimizer.zero_grad()
        for part in np.split(np.array(indices), 4):
            inputs, labels = torch.utils.data.default_collate([data[index] for index in part])
            (F.cross_entropy(made.model(inputs), labels) / 4).backward()
        made.optimizer.step()
    by_hand = outcome(made.model, made.optimizer, [], [])
    for name, tensor in trained(mlp).state.items():
        assert_tensors_close(tensor, by_hand.state[name], 1e-12, name)


@pytest.mark.parametrize("loss", [summed, mean], ids=["sum and count", "mean"])
def test_of_103_samples_over_4_workers_each_counts_once(loss: Callable[[Any, Any], Any]) -> None:
    data, setup = vectors(103), setup_of(mlp, loss=loss)
    for run in (
        in_unison(4, setup, data, batch_size=16, microbatches=8, epochs=2),
        in_unison(3, setup, data, batch_size=10, microbatches=4, epochs=2),
    ):
        batch_size = 16 if len(run.losses) == 14 else 10
        assert_close(run, plainly(setup, data, batch_size=batch_size, epochs=2), 1e-12)


def test_each_sample_is_read_exactly_once_an_epoch_by_exactly_one_worker() -> None:
    def work(collective: Collective) -> tuple[list[int], int]:
        made, data = setup_of(mlp)(), Recorded(vectors(103))
        trainer = unisono.Trainer(made.model, made.optimizer, made.loss, batch_size=16, microbatches=8, collective=collective)
        counted = sum(trainer.step(batch).samples for batch in trainer.batches(data, 1))
        return data.read, counted

    told = run_threads(4, work)
    probes = [0, 0, 51, 51, 102, 102]
    assert all(sorted(read[:6]) == probes for read, _ in told), "three samples are looked at first, twice: is it the same data?"
    assert sorted(index for read, _ in told for index in read[6:]) == list(range(103))
    assert {counted for _, counted in told} == {103}


def test_a_last_batch_of_a_single_sample_leaves_most_workers_without_work() -> None:
    data = vectors(33)
    common = assert_equal_on_all_workers(mlp, data)
    assert_close(common, plainly(setup_of(mlp), data, batch_size=8), 1e-12)


def test_microbatches_that_count_nothing_weigh_nothing() -> None:
    inputs, labels = vectors().parts
    labels = torch.where(torch.arange(len(labels)) % 8 < 4, -100, labels)  # the first half of each batch is masked out

    def loss(model: Any, batch: Any) -> tuple[Tensor, Tensor]:
        return summed(model, batch)[0], (batch[1] != -100).sum()

    setup, data = setup_of(mlp, loss=loss), Samples(inputs, labels)
    common = assert_equal_on_all_workers(setup, data, order="sequential")
    assert_close(common, plainly(setup, data, batch_size=8, order="sequential"), 1e-12)


def test_clipping_takes_the_norm_of_the_whole_gradient() -> None:
    common = assert_equal_on_all_workers(mlp, max_grad_norm=0.2)
    plain = plainly(setup_of(mlp), vectors(), batch_size=8, max_grad_norm=0.2)
    assert min(plain.norms) > 0.2, "nothing was clipped"
    assert_close(common, plain, 1e-12)


# ---------------------------------------------------------------------- models


class Experts(nn.Module):
    """Each sample goes to the expert that it names; an expert without samples takes no part in the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(6, 3) for _ in range(4))
        self.idle = nn.Linear(6, 3)
        self.double()

    def forward(self, inputs: Tensor) -> Tensor:
        chosen = (inputs[:, 0] * 10).long() % 4
        rows = torch.zeros(len(inputs), 3, dtype=inputs.dtype)
        for number, expert in enumerate(self.experts):
            if (chosen == number).any():
                rows = rows + expert(inputs) * (chosen == number).unsqueeze(1)
        return rows


def test_parameters_that_some_workers_do_not_use_are_trained_by_those_who_do() -> None:
    inputs, labels = vectors().parts
    inputs[:, 0] = (torch.arange(len(inputs)) // 2 % 3) / 10 + 0.05  # a microbatch, one expert; expert 3 never
    data, setup = Samples(inputs, labels), setup_of(Experts)
    common = assert_equal_on_all_workers(setup, data, order="sequential")
    assert_close(common, plainly(setup, data, batch_size=8, order="sequential"), 1e-12)
    fresh = setup().model.state_dict()
    unused = {name for name in fresh if torch.equal(fresh[name], common.state[name])}
    assert unused == {"idle.weight", "idle.bias", "experts.3.weight", "experts.3.bias"}
    assert not unused & common.optimizer.keys(), "an optimizer was stepped on parameters without gradient"


class Recurrent(nn.Module):
    """One layer, three times in a forward; its bias a fourth time."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.out = nn.Linear(6, 6), nn.Linear(6, 3)
        self.double()

    def forward(self, inputs: Tensor) -> Tensor:
        for _ in range(3):
            inputs = torch.tanh(self.layer(inputs))
        return self.out(inputs + self.layer.bias)


def test_a_parameter_used_several_times_in_a_forward_gets_the_sum() -> None:
    common = assert_equal_on_all_workers(Recurrent)
    assert_close(common, plainly(setup_of(Recurrent), vectors(), batch_size=8), 1e-12)


def test_tied_weights_stay_tied() -> None:
    def work(collective: Collective) -> Outcome:
        made = setup_of(Tied)()
        trainer = unisono.Trainer(made.model, made.optimizer, summed, batch_size=8, microbatches=4, collective=collective)
        for batch in trainer.batches(tokens(), 1):
            trainer.step(batch)
        assert isinstance(made.model, Tied)
        assert made.model.out.weight is made.model.embedding.weight
        return outcome(made.model, made.optimizer, [], [])

    three = run_threads(3, work)[2]
    assert torch.equal(three.state["out.weight"], three.state["embedding.weight"])
    plain = plainly(setup_of(Tied), tokens(), batch_size=8)
    assert_tensors_close(three.state["out.weight"], plain.state["out.weight"], 1e-12, "the tied weight")


class Words(nn.Module):
    def __init__(self, *, sparse: bool) -> None:
        super().__init__()
        self.embedding, self.out = nn.Embedding(9, 5, sparse=sparse), nn.Linear(5, 9)
        self.double()

    def forward(self, words: Tensor) -> Tensor:
        return self.out(torch.tanh(self.embedding(words)))


def test_sparse_embedding_gradients_equal_dense_ones() -> None:
    dense = assert_equal_on_all_workers(setup_of(lambda: Words(sparse=False)), tokens())
    sparse = assert_equal_on_all_workers(setup_of(lambda: Words(sparse=True)), tokens())
    assert_close(sparse, dense, 1e-12)


class Frozen(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.frozen = nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 6)).requires_grad_(False)
        self.out = nn.Linear(6, 3)
        self.double()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.out(self.frozen(inputs))


def test_frozen_parameters_never_change_and_cost_no_bytes() -> None:
    thin = trained(setup_of(lambda: Frozen(2)), workers=3)
    thick = trained(setup_of(lambda: Frozen(500)), workers=3)
    assert thin.bytes_sent == thick.bytes_sent
    fresh = setup_of(lambda: Frozen(500))().model.state_dict()
    frozen = {name: tensor for name, tensor in thick.state.items() if name.startswith("frozen")}
    assert_same_tensors(frozen, {name: fresh[name] for name in frozen}, "frozen")
    assert not torch.equal(thick.state["out.weight"], fresh["out.weight"])


def test_frozen_parameters_that_the_optimizer_holds_do_not_decay() -> None:
    def setup() -> Setup:
        torch.manual_seed(2)
        model = Frozen(4)
        return Setup(model, torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5), summed)

    common = assert_equal_on_all_workers(setup)
    assert torch.equal(common.state["frozen.0.weight"], setup().model.state_dict()["frozen.0.weight"])


class Checkpointed(nn.Module):
    """Recomputes its middle in backward, dropout included, if asked to."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.first, self.out = nn.Linear(6, 11), nn.Linear(11, 3)
        self.middle = nn.Sequential(nn.Linear(11, 11), nn.Tanh(), nn.Dropout(0.3), nn.Linear(11, 11))
        self.double()

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(inputs))
        for _ in range(2):  # twice: reentrant checkpoints then accumulate into .grad in several goes
            if self.kind == "none":
                hidden = self.middle(hidden)
            else:
                hidden = checkpoint(self.middle, hidden, use_reentrant=self.kind == "reentrant")
        return self.out(hidden)


@pytest.mark.parametrize("overlap", [False, True])
def test_activation_checkpointing_changes_no_bit(overlap: bool) -> None:
    kinds = ("none", "non-reentrant", "reentrant")
    sync = unisono.Exact(overlap=overlap, bucket_mib=1e-4, replicate_kib=0)
    runs = [assert_equal_on_all_workers(setup_of(lambda kind=kind: Checkpointed(kind)), sync=sync) for kind in kinds]
    assert_same_bits(runs[0], runs[1], "non-reentrant")
    assert_same_bits(runs[0], runs[2], "reentrant")


def test_buffers_are_equal_on_all_workers_and_for_any_number_of_them() -> None:
    common = assert_equal_on_all_workers(Moody, vectors(44), epochs=2)
    assert int(common.state["norm.num_batches_tracked"]) == 12
    assert not torch.equal(common.state["norm.running_mean"], torch.zeros(11, dtype=DOUBLE))


def test_batch_norm_statistics_are_the_mean_of_what_the_microbatches_make_of_them() -> None:
    def model() -> nn.Module:
        return nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 3)).double()

    data = vectors(44)
    common = assert_equal_on_all_workers(setup_of(model), data)
    expected_mean, expected_variance = torch.zeros(6, dtype=DOUBLE), torch.ones(6, dtype=DOUBLE)
    for indices in index_lists(44, batch_size=8):
        parts = data.parts[0][indices].split(2)
        expected_mean = 0.9 * expected_mean + 0.1 * torch.stack([part.mean(0) for part in parts]).mean(0)
        expected_variance = 0.9 * expected_variance + 0.1 * torch.stack([part.var(0) for part in parts]).mean(0)
    assert_tensors_close(common.state["0.running_mean"], expected_mean, 1e-12, "running mean")
    assert_tensors_close(common.state["0.running_var"], expected_variance, 1e-12, "running variance")


class Mixed(nn.Module):
    """Parameters of two dtypes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.out = nn.Linear(6, 11).double(), nn.Linear(11, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.out(torch.tanh(self.first(inputs)).float())


def test_parameters_of_two_dtypes_train_together() -> None:
    common = assert_equal_on_all_workers(Mixed)
    plain = plainly(setup_of(Mixed), vectors(), batch_size=8)
    assert {tensor.dtype for tensor in common.state.values()} == {torch.float32, torch.float64}
    assert_close(common, plain, 1e-5)


def test_a_channels_last_model_stays_so_and_trains_alike() -> None:
    generator = torch.Generator().manual_seed(1)
    data = Samples(torch.randn(40, 2, 6, 6, generator=generator, dtype=DOUBLE), torch.arange(40) % 3)

    def model() -> nn.Module:
        layers = (nn.Conv2d(2, 6, 3), nn.Tanh(), nn.Conv2d(6, 3, 4), nn.Flatten())
        return nn.Sequential(*layers).double().to(memory_format=torch.channels_last)

    common = assert_equal_on_all_workers(setup_of(model), data)
    assert_close(common, plainly(setup_of(model), data, batch_size=8), 1e-12)
    made = setup_of(model)()
    unisono.Trainer(made.model, made.optimizer, summed, batch_size=8, collective=InProcess())
    weight = made.model.get_parameter("2.weight")
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert not weight.is_contiguous()


# ---------------------------------------------------------------------- batches


def test_dict_and_nested_batches_are_as_good_as_tuples() -> None:
    inputs, labels = vectors().parts

    def loss(model: Any, batch: Any) -> tuple[Tensor, int]:
        return summed(model, (batch["features"]["left"][0] + batch["features"]["right"], batch["labels"]))

    class Nested(Dataset[Any]):
        def __len__(self) -> int:
            return len(labels)

        def __getitem__(self, index: int) -> Any:
            left = [inputs[index].clone(), "a name that stays on the way"]
            return {"features": {"left": left, "right": torch.zeros(6, dtype=DOUBLE)}, "labels": labels[index]}

    nested = assert_equal_on_all_workers(setup_of(mlp, loss=loss), Nested())
    assert_same_bits(nested, trained(mlp), "tuples")


@pytest.mark.parametrize(
    "order",
    [
        "sequential",
        [3, 1, 4, 1, 5, 9, 2, 6, 5, 35],
        WeightedRandomSampler([1.0] * 20 + [5.0] * 20, 30),
        BatchSampler(SequentialSampler(range(40)), 7, drop_last=True),
    ],
    ids=["sequential", "list", "weighted sampler", "batch sampler"],
)
def test_the_order_may_be_the_users_own(order: Any) -> None:
    common = assert_equal_on_all_workers(mlp, order=order, epochs=2)
    assert_close(common, plainly(setup_of(mlp), vectors(), batch_size=8, order=order, epochs=2), 1e-12)


def test_a_list_of_indices_is_read_in_its_order() -> None:
    data, order = Recorded(vectors()), [3, 1, 4, 1, 5, 9, 2, 6, 5, 35]
    trained(mlp, data, order=order)
    assert data.read == order


def test_leaving_the_batches_early_loses_none_of_them() -> None:
    def work(collective: Collective) -> Outcome:
        made = setup_of(Moody)()
        trainer = unisono.Trainer(made.model, made.optimizer, summed, batch_size=8, microbatches=4, collective=collective)
        results = []
        for stop in (2, 1, 2, 99):  # in the middle of an epoch, twice; at its end; and to the end
            for number, batch in enumerate(trainer.batches(vectors(), 2), start=1):
                results.append(trainer.step(batch))
                if number == stop:
                    break
        losses, norms = [one.loss for one in results], [one.gradient_norm for one in results]
        return outcome(made.model, made.optimizer, losses, norms)

    assert_same_tensors(run_threads(2, work)[0].state, trained(Moody, epochs=2).state, "after breaks")
    assert run_threads(3, work)[0].losses == trained(Moody, epochs=2).losses
