"""Proof that each sample was used exactly once, without keeping a list of them. *Local.*

An entry sums over samples, whatever their order: how many there are, and their numbers to the powers 1, 2 and 3, modulo 2**64.
Entries of different workers add up. A sample that is missing, doubled or taken for another changes the sums; two such faults
cancel only if they agree in all three powers. Of a whole epoch the sums are known without looking at a single sample.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

Entry = tuple[int, int, int, int]
"""Number of samples; sums of their indices, squares and cubes modulo 2**64."""

_MODULUS = 2**64
NOTHING: Entry = (0, 0, 0, 0)
_FEW = 128
"""Up to so many, Python's integers are faster than a few calls of NumPy, each of which is cold once a step."""


def entry(indices: npt.NDArray[np.int64]) -> Entry:
    """The entry of some samples, int64 ``[n]``."""
    if len(indices) <= _FEW:
        values = indices.tolist()
        twos = [value * value for value in values]
        return len(values), sum(values) % _MODULUS, sum(twos) % _MODULUS, sum(map(int.__mul__, twos, values)) % _MODULUS
    numbers = indices.astype(np.uint64, copy=False)
    squares = numbers * numbers  # unsigned arithmetic is modulo 2**64 by itself
    return len(indices), int(numbers.sum()), int(squares.sum()), int((squares * numbers).sum())


def total(entries: Iterable[Entry]) -> Entry:
    """The entry of all samples of several entries together."""
    counts, ones, twos, threes = zip(NOTHING, *entries, strict=True)
    return sum(counts), sum(ones) % _MODULUS, sum(twos) % _MODULUS, sum(threes) % _MODULUS


def whole(length: int) -> Entry:
    """The entry of the samples ``0 .. length - 1``, each once."""
    n = length
    triangle = n * (n - 1) // 2
    return n, triangle % _MODULUS, (n - 1) * n * (2 * n - 1) // 6 % _MODULUS, triangle * triangle % _MODULUS
