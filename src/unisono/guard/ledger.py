"""Proof that each sample was used exactly once, without a list of them. *Local.*

An entry holds sums over samples, in any order: their number, and their indices to the powers 1, 2 and 3, modulo 2**64. Entries of
different workers add up. A sample that is missing, doubled or replaced changes the sums; two such faults cancel only if they
agree in all three powers. The sums of a whole epoch have closed forms.

The four sums are one integer, each in a lane of 128 bits whose upper half has room for carries: entries are added in every step,
and one addition is four times as cheap as four.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

Entry = int
"""Number of samples; sums of their indices, squares and cubes modulo 2**64; from the lowest lane on."""

LANES = 4
_LANE_BITS = 128
ENTRY_BYTES = LANES * _LANE_BITS // 8
_LOWER_HALF = 2**64 - 1
LOWER_HALVES = sum(_LOWER_HALF << _LANE_BITS * lane for lane in range(LANES))
"""Reduces a sum of entries: ``one + other & LOWER_HALVES`` is the entry of the samples of both."""
NOTHING: Entry = 0


def entry(indices: npt.NDArray[np.int64]) -> Entry:
    """The entry of some samples, int64 ``[n]``."""
    return entries(indices, np.array([[0, len(indices)]]))[0]


def entries(indices: npt.NDArray[np.int64], spans: npt.NDArray[np.int64]) -> list[Entry]:
    """The entries of several spans of samples: many cost little more than one.

    Args:
        indices: int64 ``[n]``.
        spans: Where each begins and ends, int64 ``[spans, 2]``.
    """
    numbers = np.zeros(len(indices) + 1, dtype=np.uint64)  # an empty span may begin behind the last sample
    numbers[:-1] = indices
    squares = numbers * numbers  # unsigned arithmetic is modulo 2**64
    borders = spans.ravel()
    lanes = np.zeros((len(spans), LANES, 2), dtype="<u8")
    lanes[:, 0, 0] = sizes = borders[1::2] - borders[::2]
    for lane, powers in enumerate((numbers, squares, squares * numbers), start=1):
        lanes[:, lane, 0] = np.add.reduceat(powers, borders)[::2]  # from each border to the next
    lanes[sizes == 0] = 0  # reduceat sums at least one
    raw = lanes.tobytes()
    return [int.from_bytes(raw[at : at + ENTRY_BYTES], "little") for at in range(0, len(raw), ENTRY_BYTES)]


def order_sums(indices: npt.NDArray[np.int64], starts: Sequence[int], weights: npt.NDArray[np.uint64]) -> list[int]:
    """64 bits for each of these parts that, unlike ``entries``, depend on the order of the samples.

    Args:
        indices: int64 ``[n]``.
        starts: Where each part begins, ascending from 0; none is empty.
        weights: Random numbers for the first, second, ... sample of a part, uint64 [the largest part].
    """
    borders = np.array([*starts, len(indices)])
    places = np.arange(len(indices)) - np.repeat(borders[:-1], borders[1:] - borders[:-1])
    numbers = indices.astype(np.uint64)
    numbers += np.uint64(1)
    numbers *= weights[places]
    found: list[int] = np.add.reduceat(numbers, borders[:-1]).tolist()
    return found


def total(entries: Iterable[Entry]) -> Entry:
    """The entry of all samples of several entries together."""
    return sum(entries) & LOWER_HALVES


def samples_of(entry: Entry) -> int:
    """How many samples it counts."""
    return entry & _LOWER_HALF


def whole(length: int) -> Entry:
    """The entry of the samples ``0 .. length - 1``, each once."""
    n = length
    triangle = n * (n - 1) // 2
    sums = n, triangle, (n - 1) * n * (2 * n - 1) // 6, triangle * triangle
    return sum((one & _LOWER_HALF) << _LANE_BITS * lane for lane, one in enumerate(sums))
