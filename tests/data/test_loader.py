"""Loading: the same samples whoever loads them, each once, and errors that name the sample."""

from __future__ import annotations

import multiprocessing
import random
from collections import namedtuple
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    Dataset,
    IterableDataset,
    SequentialSampler,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
)

from unisono import ConfigurationError, DataError, Exact, Loader, Trainer
from unisono.collective import Collective
from unisono.data.loader import Request, dataset_length, load
from unisono.testing import run_threads

# More loader processes than cores are what these tests are about.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")

CPU = torch.device("cpu")
Pair = namedtuple("Pair", ["left", "right"])


class Augmented(Dataset[Any]):
    """Each sample: its index, and what it drew from the three generators."""

    def __len__(self) -> int:
        return 30

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor([index, torch.rand(()).item(), np.random.rand(), random.random()], dtype=torch.float64)


class Faulty(Augmented):
    def __getitem__(self, index: int) -> Tensor:
        if index == 17:
            raise OSError("the file is cut off")
        return super().__getitem__(index)


class InOneGo(Augmented):
    """Reads many samples at once, and has its own randomness at that."""

    def __getitems__(self, indices: list[int]) -> list[Tensor]:
        return [torch.tensor([index, len(indices), torch.rand(()).item()], dtype=torch.float64) for index in indices]


class FaultyInOneGo(Augmented):
    def __getitems__(self, indices: list[int]) -> list[Tensor]:
        raise OSError("the file is cut off")


class Dies(Augmented):
    """As when the kernel kills a loader process that takes too much memory."""

    def __getitem__(self, index: int) -> Tensor:
        raise SystemExit(3)


class WithoutLength:
    def __getitem__(self, index: int) -> int:
        return index


class Streamed(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(3))


def asked(*parts: Sequence[int], epoch: int = 0) -> list[Request]:
    return [Request(epoch, np.array(part, dtype=np.int64)) for part in parts]


PARTS = asked([3, 1, 4], [15, 9], [2, 6, 5, 29], [0])


def loaded(dataset: Any, settings: Loader | None = None, requests: list[Request] = PARTS, seed: int = 0) -> list[Any]:
    return list(load(dataset, requests, settings or Loader(), seed=seed, device=CPU, timeout_s=60.0))


def flat(microbatches: list[Tensor]) -> list[list[float]]:
    return [sample for microbatch in microbatches for sample in microbatch.tolist()]


def with_noise(samples: list[Tensor]) -> Tensor:
    return torch.stack(samples) + torch.rand(())


# ---- whoever loads ----


@pytest.mark.parametrize(
    "settings",
    [
        Loader(num_workers=1, multiprocessing_context="fork"),
        Loader(num_workers=4, multiprocessing_context="fork", prefetch_factor=1),
        Loader(num_workers=1, multiprocessing_context="spawn"),
    ],
    ids=["one", "four", "spawned"],
)
def test_loader_processes_give_the_samples_that_the_worker_itself_reads(settings: Loader) -> None:
    alone = flat(loaded(Augmented()))

    assert flat(loaded(Augmented(), settings)) == alone
    assert [sample[0] for sample in alone] == [3, 1, 4, 15, 9, 2, 6, 5, 29, 0]


def test_an_augmentation_belongs_to_the_sample_and_not_to_its_neighbours() -> None:
    together = {sample[0]: sample for sample in flat(loaded(Augmented()))}
    elsewhere = {sample[0]: sample for sample in flat(loaded(Augmented(), requests=asked([0, 29], [5], [1, 2, 3, 4, 6, 9, 15])))}

    assert together == elsewhere


def test_every_sample_epoch_and_seed_draws_anew_from_all_three_generators() -> None:
    drawn = [
        value
        for epoch, seed in ((0, 0), (1, 0), (0, 1))
        for sample in flat(loaded(Augmented(), requests=asked([1, 2], epoch=epoch), seed=seed))
        for value in sample[1:]
    ]

    assert len(set(drawn)) == 18


def test_a_random_collate_fn_draws_the_same_in_a_loader_process() -> None:
    alone = flat(loaded(Augmented(), Loader(collate_fn=with_noise)))

    assert flat(loaded(Augmented(), Loader(collate_fn=with_noise, num_workers=2, multiprocessing_context="fork"))) == alone
    assert alone != flat(loaded(Augmented()))


def test_what_collate_fn_draws_does_not_depend_on_what_the_samples_drew() -> None:
    """A dataset that keeps its samples draws only the first time."""

    class Still(Augmented):
        def __getitem__(self, index: int) -> Tensor:
            return torch.zeros(4, dtype=torch.float64)

    def noise(samples: list[Tensor]) -> Tensor:
        return torch.rand(1, 1)

    assert flat(loaded(Still(), Loader(collate_fn=noise))) == flat(loaded(Augmented(), Loader(collate_fn=noise)))


def test_reading_leaves_no_microbatch_out_of_turn_when_some_are_slower() -> None:
    class Uneven(Augmented):
        def __getitem__(self, index: int) -> Tensor:
            torch.ones(2_000_000 if index % 5 == 0 else 1).cumsum(0)
            return super().__getitem__(index)

    requests = asked(*([index] for index in range(30)))
    found = loaded(Uneven(), Loader(num_workers=4, multiprocessing_context="fork"), requests)

    assert [sample[0] for sample in flat(found)] == list(range(30))


# ---- other kinds of datasets and batches ----


def test_a_dataset_that_reads_in_one_go_is_read_in_one_go() -> None:
    alone = flat(loaded(InOneGo()))

    assert [sample[:2] for sample in alone] == [[3, 3], [1, 3], [4, 3], [15, 2], [9, 2], [2, 4], [6, 4], [5, 4], [29, 4], [0, 1]]
    assert flat(loaded(InOneGo(), Loader(num_workers=2, multiprocessing_context="fork"))) == alone


def test_a_subset_reads_as_its_dataset_does() -> None:
    indices = list(range(29, -1, -1))

    assert [sample[:2] for sample in flat(loaded(Subset(InOneGo(), indices), requests=asked([0, 1])))] == [[29, 2], [28, 2]]
    # One by one, so that each sample's randomness is its own: it goes by the place in the subset.
    subset = Subset(Augmented(), indices)
    assert flat(loaded(subset, requests=asked([0, 1]))) == flat(loaded(subset, requests=asked([0], [1])))


def test_plain_tensors_are_read_at_once_as_if_sample_by_sample() -> None:
    class Slow(TensorDataset):
        """Not a TensorDataset itself, so it takes the way of all others."""

    tensors = (torch.randn(30, 3), torch.arange(30), torch.randn(30).to(torch.bfloat16))
    fast, slow = loaded(TensorDataset(*tensors)), loaded(Slow(*tensors))

    assert len(fast) == len(slow) == 4
    for one, other in zip(fast, slow, strict=True):
        assert type(one) is type(other)
        assert all(torch.equal(left, right) and left.dtype == right.dtype for left, right in zip(one, other, strict=True))


def nested(samples: list[Tensor]) -> dict[str, Any]:
    values = torch.stack(samples)
    return {"pair": Pair(values, (values[:, 0], ["a", 1])), "list": [{"deep": values + 1}], "name": "x"}


@pytest.mark.parametrize("num_workers", [0, 1])
def test_nested_batches_reach_the_loss_as_they_are(num_workers: int) -> None:
    seen: list[Any] = []

    def loss(model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, int]:
        seen.append(batch)
        return model(batch["list"][0]["deep"].float()).sum(), len(batch["pair"].left)

    model = nn.Linear(4, 1)
    alone = Exact(one_pass=False)  # each batch once
    trainer = Trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), loss, batch_size=10, microbatches=2, sync=alone)
    settings = Loader(collate_fn=nested, num_workers=num_workers, multiprocessing_context="fork" if num_workers else None)
    for batch in trainer.batches(Augmented(), epochs=1, loader=settings):
        trainer.step(batch)

    assert len(seen) == 6
    for batch in seen:
        assert type(batch["pair"]) is Pair
        left, (indices, rest) = batch["pair"]
        assert left.shape == (5, 4)
        assert torch.equal(indices, left[:, 0])
        assert (rest, batch["name"]) == (["a", 1], "x")
        assert torch.equal(batch["list"][0]["deep"], left + 1)


def test_a_dict_dataset_is_collated_as_pytorch_does() -> None:
    class Rows(Dataset[dict[str, Any]]):
        def __len__(self) -> int:
            return 5

        def __getitem__(self, index: int) -> dict[str, Any]:
            return {"x": torch.full((2,), index), "pair": Pair(index, float(index))}

    (found,) = loaded(Rows(), requests=asked([4, 2]))
    right = default_collate([Rows()[4], Rows()[2]])

    assert type(found["pair"]) is Pair
    assert torch.equal(found["x"], right["x"])
    assert torch.equal(found["pair"].left, right["pair"].left)
    assert torch.equal(found["pair"].right, right["pair"].right)


# ---- errors ----


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_a_sample_that_cannot_be_read_is_named(num_workers: int) -> None:
    settings = Loader(num_workers=num_workers, multiprocessing_context="fork" if num_workers else None)

    with pytest.raises(DataError, match=r"sample 17 could not be read: OSError: the file is cut off") as caught:
        loaded(Faulty(), settings, asked([1, 2], [16, 17, 18], [3]))

    assert caught.value.index == 17
    assert "in __getitem__" in str(caught.value), "the original traceback is there"


def test_microbatches_before_the_bad_one_are_still_given() -> None:
    stream = load(Faulty(), asked([1, 2], [17]), Loader(), seed=0, device=CPU, timeout_s=60.0)

    assert next(stream)[:, 0].tolist() == [1, 2]
    with pytest.raises(DataError):
        next(stream)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_samples_that_were_to_be_read_in_one_go_are_named_together(num_workers: int) -> None:
    settings = Loader(num_workers=num_workers, multiprocessing_context="fork" if num_workers else None)

    with pytest.raises(DataError, match=r"samples 3, 1 could not be read: OSError") as caught:
        loaded(FaultyInOneGo(), settings, asked([3, 1]))

    assert caught.value.index is None


def test_samples_that_cannot_be_collated_are_named() -> None:
    class Ragged(Augmented):
        def __getitem__(self, index: int) -> Tensor:
            return torch.zeros(index)

    with pytest.raises(DataError, match=r"samples 0, 1, 2, 3, 4, \.\.\. \(6 in all\) could not be collated"):
        loaded(Ragged(), requests=asked(range(6)))


def test_a_loader_process_that_dies_is_an_error_and_not_a_wait() -> None:
    with pytest.raises(DataError, match="a loader process ended unexpectedly"):
        loaded(Dies(), Loader(num_workers=1, multiprocessing_context="fork"))


def test_loader_processes_end_with_an_error_even_while_somebody_holds_it() -> None:
    with pytest.raises(DataError) as caught:
        loaded(Faulty(), Loader(num_workers=2, multiprocessing_context="fork"), asked([1], [2], [17], [4], [5]))

    assert caught.value.__traceback__ is not None
    assert multiprocessing.active_children() == []


def test_loader_processes_end_when_the_user_leaves_the_loop() -> None:
    trainer = make_trainer(nn.Linear(4, 1).double(), None)
    for _ in trainer.batches(Augmented(), epochs=2, loader=Loader(num_workers=2, multiprocessing_context="fork")):
        assert len(multiprocessing.active_children()) == 2
        break

    assert multiprocessing.active_children() == []


def test_a_bad_sample_ends_training_on_every_worker_with_its_index() -> None:
    def work(collective: Collective) -> None:
        torch.manual_seed(0)
        model = nn.Linear(4, 1).double()
        trainer = make_trainer(model, collective)
        for batch in trainer.batches(Faulty(), epochs=1):
            trainer.step(batch)

    with pytest.raises(DataError, match="sample 17") as caught:
        run_threads(3, work)

    assert caught.value.index == 17


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (WithoutLength(), "WithoutLength has no length: give it __len__"),
        (Streamed(), "Streamed is not a map-style dataset"),
        (iter([1, 2]), "list_iterator is not a map-style dataset"),
        ([], "list is empty"),
        (TensorDataset(torch.zeros(0, 3)), "TensorDataset is empty"),
    ],
    ids=["without length", "iterable", "iterator", "empty list", "empty tensors"],
)
def test_datasets_that_cannot_be_trained_on_are_refused(dataset: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        dataset_length(dataset)


@pytest.mark.parametrize(
    ("settings", "message"), [({"num_workers": -1}, "num_workers"), ({"prefetch_factor": 0}, "prefetch_factor")]
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Loader(**settings)


# ---- which samples: over whole epochs, on any number of workers ----


def make_trainer(model: nn.Module, collective: Collective | None, batch_size: int = 12, seed: int = 0) -> Trainer:
    return Trainer(
        model,
        torch.optim.SGD(model.parameters(), lr=0.0),
        lambda model, batch: (model(batch).sum(), len(batch)),
        batch_size=batch_size,
        microbatches=8,
        seed=seed,
        collective=collective,
    )


def microbatches_of(
    workers: int,
    order: Callable[[], Any],
    *,
    epochs: int = 1,
    num_workers: int = 0,
    drop_last: bool = False,
    seed: int = 0,
) -> dict[tuple[int, int, int], list[int]]:
    """(epoch, batch, microbatch) -> sample indices, from all workers; what each said it has is what it loaded."""

    def work(collective: Collective) -> dict[tuple[int, int, int], list[int]]:
        torch.manual_seed(0)
        trainer = make_trainer(nn.Linear(4, 1).double(), collective, seed=seed)
        settings = Loader(num_workers=num_workers, multiprocessing_context="fork" if num_workers else None)
        found: dict[tuple[int, int, int], list[int]] = {}
        for batch in trainer.batches(Augmented(), epochs, order=order(), drop_last=drop_last, loader=settings):
            for part in batch.parts:
                assert part.data[:, 0].tolist() == part.indices.tolist()
                found[batch.epoch, batch.number, part.number] = part.indices.tolist()
            trainer.step(batch)
        return found

    merged: dict[tuple[int, int, int], list[int]] = {}
    for found in run_threads(workers, work):
        assert not merged.keys() & found.keys(), "two workers computed one microbatch"
        merged |= found
    return dict(sorted(merged.items()))


def in_order(microbatches: dict[tuple[int, int, int], list[int]], epoch: int = 0) -> list[int]:
    return [index for (number, _, _), indices in microbatches.items() if number == epoch for index in indices]


@pytest.mark.parametrize("workers", [1, 2, 3, 4, 5, 7, 8])
def test_each_sample_is_trained_exactly_once_an_epoch(workers: int) -> None:
    found = microbatches_of(workers, lambda: "shuffle", epochs=2)

    assert found == microbatches_of(1, lambda: "shuffle", epochs=2)
    assert sorted(in_order(found, 0)) == sorted(in_order(found, 1)) == list(range(30))
    assert in_order(found, 0) != in_order(found, 1)


def test_loader_processes_do_not_change_which_samples_come_when() -> None:
    assert microbatches_of(2, lambda: "shuffle", epochs=2, num_workers=2) == microbatches_of(2, lambda: "shuffle", epochs=2)


def test_another_seed_is_another_order() -> None:
    assert microbatches_of(1, lambda: "shuffle", seed=1) != microbatches_of(1, lambda: "shuffle")


def test_the_short_last_batch_can_be_left_out() -> None:
    assert in_order(microbatches_of(3, lambda: "sequential", drop_last=True)) == list(range(24))


ORDERS: dict[str, tuple[Callable[[], Any], list[int] | None]] = {
    "sequential": (lambda: "sequential", list(range(30))),
    "list": (lambda: [5, 5, 0, 29, 7, 1, 2, 3, 4, 8, 9, 10, 11, 12, 13], [5, 5, 0, 29, 7, 1, 2, 3, 4, 8, 9, 10, 11, 12, 13]),
    "array": (lambda: np.arange(29, -1, -1), list(range(29, -1, -1))),
    "sampler": (lambda: SequentialSampler(range(30)), list(range(30))),
    "weighted": (lambda: WeightedRandomSampler([0.0] * 10 + [1.0] * 20, num_samples=24), None),
}


@pytest.mark.parametrize("name", list(ORDERS))
def test_an_order_from_the_user_is_the_same_on_every_number_of_workers(name: str) -> None:
    order, right = ORDERS[name]
    alone = microbatches_of(1, order, epochs=2)

    for workers in (2, 3, 8):
        assert microbatches_of(workers, order, epochs=2) == alone
    if right is None:
        assert set(in_order(alone)) <= set(range(10, 30))
        assert in_order(alone, 0) != in_order(alone, 1)
    else:
        assert in_order(alone, 0) == in_order(alone, 1) == right


@pytest.mark.parametrize("workers", [1, 3, 8])
def test_each_list_of_a_batch_sampler_is_a_global_batch(workers: int) -> None:
    found = microbatches_of(workers, lambda: BatchSampler(SequentialSampler(range(30)), batch_size=7, drop_last=False))

    batches: dict[int, list[int]] = {}
    for (_, number, _), indices in found.items():
        batches.setdefault(number, []).extend(indices)
    assert list(batches.values()) == [list(range(start, min(start + 7, 30))) for start in range(0, 30, 7)]


def test_training_on_a_dataset_without_a_length_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="no length"):
        make_trainer(nn.Linear(4, 1), None).batches(WithoutLength(), epochs=1)
