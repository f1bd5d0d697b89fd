"""Check before the first step that all workers read the same data."""

from __future__ import annotations

import dataclasses
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from hashlib import blake2b
from typing import Any

import numpy as np
import torch

from unisono.collective import Collective
from unisono.errors import DataError


def check_same_data(read: Callable[[int], Any], length: int, collective: Collective) -> None:
    """*collective*. Reads a few samples twice on every worker and compares them.

    Worker 0 warns of a sample that a worker reads differently the second time: the data set draws from a generator of its own.
    One that cannot be digested is not compared.

    Args:
        read: Gives a sample by index, with its randomness seeded.
        length: Number of samples.

    Raises:
        DataError: Workers read different data; those that differ from the majority are named.
    """
    if collective.size == 1:
        return
    told = collective.all_gather_json([_digests(read, length), _digests(read, length)])
    restless = []
    for place, index in enumerate(_probed(length)):
        found, again = ([digests[place] for digests in each] for each in zip(*told, strict=True))
        if "" in found or found != again:
            restless += [index] if "" not in (*found, *again) else []
            continue
        if len(set(found)) == 1:
            continue
        most, votes = Counter(found).most_common(1)[0]
        odd = [rank for rank, digest in enumerate(found) if digest != most]
        who = (
            f"on worker{'s'[: len(odd) != 1]} {', '.join(map(str, odd))} is not what the others have"
            if votes * 2 > len(found)
            else "is not the same on all workers"
        )
        raise DataError(
            f"sample {index} of the data {who}. Every worker must read the same {length} samples: look for another version of a "
            "file, an unsorted directory listing, or a data set that was drawn without a seed",
            index=index,
        )
    if restless and collective.rank == 0:
        warnings.warn(
            f"sample {restless[0]} of the data is another each time it is read, although torch, numpy.random and random are "
            "seeded for each sample: the data set draws from a generator of its own, or reading changes it. So the weights will "
            "depend on the number of workers and on stops. Draw from the seeded generators, or seed the data set's own from them "
            "in __getitem__",
            stacklevel=2,
        )


def probe(read: Callable[[int], Any], length: int) -> list[str]:
    """*local*. Identifies the data for a worker that joins later: the length, and digests of a few samples ("" where one cannot
    be digested, or differs each time)."""
    first, second = _digests(read, length), _digests(read, length)
    return [str(length), *(one if one == other else "" for one, other in zip(first, second, strict=True))]


def _probed(length: int) -> list[int]:
    return sorted({0, length // 2, length - 1})


def _digests(read: Callable[[int], Any], length: int) -> list[str]:
    """Of a few samples; "" if one cannot be read (training will say so) or digested."""
    found = []
    for index in _probed(length):
        try:
            found.append(content_digest(read(index)))
        except Exception:
            found.append("")
    return found


def content_digest(value: Any) -> str:
    """*local*. Hexadecimal digest of tensors, arrays and plain values, nested in any way: their types, shapes and bits.

    Raises:
        TypeError: It holds anything else.
    """
    hashed = blake2b(digest_size=8)
    for part in _parts(value):
        hashed.update(part)
    return hashed.hexdigest()


def _parts(value: Any) -> Iterable[bytes | memoryview]:
    if isinstance(value, torch.Tensor):
        dense = value.detach() if value.layout == torch.strided else value.detach().to_dense()
        yield f"{value.dtype}{tuple(value.shape)}".encode()
        yield dense.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    elif isinstance(value, np.ndarray) and value.dtype != object:
        yield f"{value.dtype}{value.shape}".encode()
        yield np.ascontiguousarray(value).tobytes()
    elif isinstance(value, (bool, int, float, complex, str, bytes, np.generic)) or value is None:
        yield f"{type(value).__name__}:{value!r};".encode()
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _parts(key)
            yield from _parts(item)
    elif isinstance(value, (list, tuple)):
        yield f"{len(value)}[".encode()
        for item in value:
            yield from _parts(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from _parts({field.name: getattr(value, field.name) for field in dataclasses.fields(value)})
    else:
        raise TypeError(f"a {type(value).__name__} has no bytes to compare")
