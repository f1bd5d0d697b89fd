"""Proof that each sample was used exactly once, without keeping a list of them. *Local.*

An entry sums over samples, whatever their order: how many there are, and their numbers to the powers 1, 2 and 3, modulo 2**64.
Entries of different workers add up. A sample that is missing, doubled or taken for another changes the sums; two such faults
cancel only if they agree in all three powers. Of a whole epoch the sums are known without looking at a single sample.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

Entry = tuple[int, int, int, int]
"""Number of samples; sums of their indices, squares and cubes modulo 2**64."""

Tally = tuple[npt.NDArray[np.int64], Entry]
"""Samples, int64 ``[n]``, and their entry, reckoned ahead."""

_MODULUS = 2**64
NOTHING: Entry = (0, 0, 0, 0)


def entry(indices: npt.NDArray[np.int64]) -> Entry:
    """The entry of some samples, int64 ``[n]``."""
    return entries(indices, [0], [0])[0][0] if len(indices) else NOTHING


def entries(indices: npt.NDArray[np.int64], starts: Sequence[int], firsts: Sequence[int]) -> tuple[list[Entry], list[Entry]]:
    """The entries of consecutive parts of some samples, and of groups of these: many at once cost little more than one.

    Args:
        indices: int64 ``[n]``.
        starts: Where each part begins, ascending from 0; none is empty.
        firsts: The number of each group's first part, ascending from 0; none is empty.
    """
    numbers = indices.astype(np.uint64, copy=False)
    squares = numbers * numbers  # unsigned arithmetic is modulo 2**64 by itself
    columns = [np.diff(starts, append=len(indices)).astype(np.uint64)]
    columns += [np.add.reduceat(powers, starts) for powers in (numbers, squares, squares * numbers)]
    return _rows(columns), _rows([np.add.reduceat(column, firsts) for column in columns])


def _rows(columns: Sequence[npt.NDArray[np.uint64]]) -> list[Entry]:
    return list(zip(*(column.tolist() for column in columns), strict=True))


def order_sums(indices: npt.NDArray[np.int64], starts: Sequence[int], weights: npt.NDArray[np.uint64]) -> list[int]:
    """64 bits for each of these parts, unlike ``entries`` of the samples in their order.

    Args:
        indices: int64 ``[n]``.
        starts: As for ``entries``.
        weights: Random numbers for the first, second, ... sample of a part, uint64 [the largest part].
    """
    sizes = np.diff(starts, append=len(indices))
    places = np.arange(len(indices)) - np.repeat(starts, sizes)
    numbers = indices.astype(np.uint64, copy=False)
    found: list[int] = np.add.reduceat((numbers + np.uint64(1)) * weights[places], starts).tolist()
    return found


def tallied(tally: Tally | None, indices: npt.NDArray[np.int64]) -> Entry:
    """The entry of these samples: reckoned ahead if it was for this very array, else now."""
    return tally[1] if tally is not None and tally[0] is indices else entry(indices)


def total(entries: Iterable[Entry]) -> Entry:
    """The entry of all samples of several entries together."""
    count = one = two = three = 0
    for some in entries:
        count += some[0]
        one += some[1]
        two += some[2]
        three += some[3]
    return count, one % _MODULUS, two % _MODULUS, three % _MODULUS


def whole(length: int) -> Entry:
    """The entry of the samples ``0 .. length - 1``, each once."""
    n = length
    triangle = n * (n - 1) // 2
    return n, triangle % _MODULUS, (n - 1) * n * (2 * n - 1) // 6 % _MODULUS, triangle * triangle % _MODULUS
