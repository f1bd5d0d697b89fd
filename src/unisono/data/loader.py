"""Microbatches from a dataset: ``torch.utils.data.DataLoader`` loads them, randomness is keyed by what is loaded.

A worker loads only its own microbatches. Before each sample is read, the generators of torch, numpy and random are seeded by
(seed, epoch, sample index), so an augmentation is the same whoever runs it: worker, loader process, or main process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset, default_collate

from unisono.data.epochs import EpochFollowers
from unisono.errors import ConfigurationError, DataError
from unisono.order import derive_seed
from unisono.replica.randomness import seed_generators

_INSTEAD_OF_A_DATALOADER = (
    "give fit() or batches() the dataset (loader.dataset), the Trainer the batch_size, and unisono.Loader(...) num_workers, "
    "collate_fn and the like"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loader:
    """How samples are loaded. Nothing here changes a bit of the result, except what ``collate_fn`` makes of the samples."""

    num_workers: int = 0
    """Loader processes a worker; 0 loads in the worker itself."""

    collate_fn: Callable[[list[Any]], Any] = default_collate
    """Makes one microbatch of a list of samples."""

    pin_memory: bool | None = None
    """Whether microbatches go to page-locked memory; None: when training on CUDA."""

    prefetch_factor: int = 2
    """Microbatches that each loader process prepares ahead."""

    multiprocessing_context: str | None = None
    """Start method of the loader processes ("fork", "spawn", "forkserver"); None: Python's default."""

    def __post_init__(self) -> None:
        if self.num_workers < 0:
            raise ConfigurationError(f"num_workers must be 0 or more, got {self.num_workers}")
        if self.prefetch_factor < 1:
            raise ConfigurationError(f"prefetch_factor must be 1 or more, got {self.prefetch_factor}")


@dataclasses.dataclass(frozen=True)
class Request:
    """Which samples make up a microbatch."""

    epoch: int
    indices: npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True)
class LoadFailure:
    """What went wrong while loading; travels from a loader process as a value, since exceptions lose their fields."""

    index: int | None
    message: str
    trace: str


def check_loader(loader: Any) -> None:
    """*local*.

    Raises:
        ConfigurationError: It is no ``Loader``.
    """
    if loader is not None and not isinstance(loader, Loader):
        raise ConfigurationError(f"loader is a {type(loader).__name__}, not a unisono.Loader: {_INSTEAD_OF_A_DATALOADER}")


def dataset_length(dataset: Any) -> int:
    """*local*. Number of samples.

    Raises:
        ConfigurationError: The dataset is not map-style, has no length, or is empty.
    """
    if isinstance(dataset, DataLoader):
        raise ConfigurationError(f"a DataLoader is given, but unisono loads by itself: {_INSTEAD_OF_A_DATALOADER}")
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__"):
        raise ConfigurationError(
            f"{type(dataset).__name__} is not a map-style dataset: samples are read by number here; give it __getitem__ and "
            "__len__. (fit and batches also take an IterableDataset or unisono.Streams; evaluate and predict do not)"
        )
    try:
        length = len(dataset)
    except (TypeError, NotImplementedError):
        raise ConfigurationError(f"{type(dataset).__name__} has no length: give it __len__, so that an epoch is known") from None
    if length == 0:
        raise ConfigurationError(f"{type(dataset).__name__} is empty: there is nothing to train on")
    return length


def load(
    dataset: Any,
    requests: Iterable[Request],
    settings: Loader,
    *,
    seed: int,
    device: torch.device,
    timeout_s: float,
    trains: bool = True,
) -> Iterator[Any]:
    """*local*. Loads one microbatch for each request, in order, ahead of its use if there are loader processes.

    Args:
        timeout_s: How long to wait for loader processes, in seconds.
        trains: Whether the requests are of epochs of training, about which data set and collate function want to know.

    Raises:
        DataError: A sample raised (its index is in the error), samples could not be collated, or loader processes are silent.
    """
    fetcher = _Fetcher(dataset, settings.collate_fn, seed, trains=trains)
    return load_with(fetcher, requests, settings, seed=seed, device=device, timeout_s=timeout_s)


def load_with(
    fetcher: Dataset[Any], requests: Iterable[Any], settings: Loader, *, seed: int, device: torch.device, timeout_s: float
) -> Iterator[Any]:
    """*local*. The same by a data set of microbatches, to which a request is what an index is to others."""
    if settings.num_workers == 0:
        loaded: Iterable[Any] = map(fetcher.__getitem__, requests)
    else:
        loaded = DataLoader(
            fetcher,
            batch_size=None,
            sampler=requests,
            collate_fn=_unchanged,
            num_workers=settings.num_workers,
            prefetch_factor=settings.prefetch_factor,
            timeout=timeout_s,
            pin_memory=device.type == "cuda" if settings.pin_memory is None else settings.pin_memory,
            multiprocessing_context=settings.multiprocessing_context,
            # Its own generator: the seed that a DataLoader draws would advance the global one.
            generator=torch.Generator().manual_seed(seed & 0x7FFF_FFFF_FFFF_FFFF),
        )
    iterator = iter(loaded)
    try:
        while True:
            try:
                microbatch = next(iterator)
            except StopIteration:
                return
            except RuntimeError as error:
                if "DataLoader timed out" in str(error):
                    raise DataError(
                        f"no microbatch came from {settings.num_workers} loader process{'es'[: 2 * (settings.num_workers > 1)]} "
                        f"in {timeout_s:g} s. Their output may say why (samples that cannot be pickled, a file that "
                        "cannot be read); if they were only slow, raise timeout_s or num_workers; with num_workers=0 errors show"
                    ) from error
                if "DataLoader worker" not in str(error):
                    raise
                raise DataError(f"a loader process ended unexpectedly: {error} (out of memory? try fewer num_workers)") from error
            if isinstance(microbatch, LoadFailure):
                raise DataError(f"{microbatch.message}\n\n{microbatch.trace}".rstrip(), index=microbatch.index)
            yield microbatch
    finally:
        # Ends the loader processes at once. Left to the garbage collector along with this error's traceback, their queues
        # would be closed before they are told, and the collector would wait 5 s for each.
        del iterator


def read_sample(dataset: Any, index: int, *, seed: int) -> Any:
    """*local*. A sample as epoch 0 reads it."""
    seed_generators(derive_seed("sample", seed, 0, index))
    return dataset[index]


class _Fetcher(Dataset[Any]):
    """A dataset of microbatches: seeds, reads and collates the samples of one request."""

    def __init__(self, dataset: Any, collate_fn: Callable[[list[Any]], Any], seed: int, *, trains: bool) -> None:
        self._followers = EpochFollowers(dataset, collate_fn) if trains else EpochFollowers()
        self._dataset = dataset
        self._collate = collate_fn
        self._seed = seed
        self._plain_tensors = type(dataset) is TensorDataset and collate_fn is default_collate
        self._in_one_go = _reads_in_one_go(dataset)

    def __getitem__(self, request: Request) -> Any:
        if self._plain_tensors:
            # Exactly what reading sample by sample and stacking gives, without a Python call a sample.
            index = torch.from_numpy(request.indices)
            return [tensor[index] for tensor in self._dataset.tensors]
        self._followers.set_epoch(request.epoch)
        with one_thread():
            samples = self._samples(request)
            return samples if isinstance(samples, LoadFailure) else self._collated(samples, request)

    def _samples(self, request: Request) -> list[Any] | LoadFailure:
        indices = request.indices.tolist()
        if self._in_one_go:
            seed_generators(derive_seed("samples", self._seed, request.epoch, indices[0]))
            try:
                return list(self._dataset.__getitems__(indices))
            except Exception as error:
                return failure(error, None, f"samples {_named(indices)} could not be read")
        samples: list[Any] = []
        for index in indices:
            seed_generators(derive_seed("sample", self._seed, request.epoch, index))
            try:
                samples.append(self._dataset[index])
            except Exception as error:
                return failure(error, index, f"sample {index} could not be read")
        return samples

    def _collated(self, samples: list[Any], request: Request) -> Any:
        indices = request.indices.tolist()
        seed_generators(derive_seed("collate", self._seed, request.epoch, indices[0]))
        try:
            return self._collate(samples)
        except Exception as error:
            return failure(error, None, f"samples {_named(indices)} could not be collated into a microbatch")


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """The body computes with one thread, as in a loader process: the count changes bits."""
    threads = torch.get_num_threads()
    if threads != 1:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if threads != 1:
            torch.set_num_threads(threads)


def _reads_in_one_go(dataset: Any) -> bool:
    """Whether the dataset itself has a way of reading many samples at once (a Subset has one only if its dataset has)."""
    if type(dataset) is Subset:
        return _reads_in_one_go(dataset.dataset)
    return callable(getattr(dataset, "__getitems__", None))


def failure(error: Exception, index: int | None, what: str) -> LoadFailure:
    """What a worker is told of an error in a loader process; of a ``DataError`` just its message."""
    if isinstance(error, DataError):
        return LoadFailure(index, str(error), "")
    return LoadFailure(index, f"{what}: {type(error).__name__}: {error}", traceback.format_exc())


def _named(indices: list[int]) -> str:
    return ", ".join(map(str, indices[:5])) + (f", ... ({len(indices)} in all)" if len(indices) > 5 else "")


def _unchanged(value: Any) -> Any:
    return value
