"""Replicas are compared while training runs, and a difference is named.

At the start of a step a worker may digest some of what all workers hold alike, piece by piece in turn; the digest travels in the
step's header, so that no message is added. Each step looks at as much as fits into a small share of the time, and everything is
looked at once in ``PERIOD`` steps. Small tensors are combined into one piece, which is cheaper than one at a time.

A lasting difference (in optimizer state, weights that every worker updates, buffers that forward leaves alone) is thus found
within a period. Weights published by their owner are equal again after the next update, as are buffers that forward changes: a
fault there lasts one step, and is found if its piece is looked at in that step. ``compare_every=1`` looks at everything in every
step.
"""

from __future__ import annotations

import json
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from hashlib import blake2b
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from unisono.collective import Collective
from unisono.errors import Desync
from unisono.guard.values import Values
from unisono.system.budget import Credit

PERIOD = 64
"""Steps in which everything is compared once."""

OnDesync = Literal["error", "heal"]

_PIECE_BYTES = 2**20
_SMALL_BYTES = 2**16
_HASHED_BYTES = 2**12
_COLUMNS = 256
_ROW_BYTES = 8 * _COLUMNS
_FACTOR = np.uint64(0x9E3779B97F4A7C15)
_KNOWN_TO_NUMPY = {torch.float32, torch.float64, torch.int64, torch.int32, torch.bool, torch.uint8}
_SHARE = 0.0015
_PIECE_S, _TENSOR_S, _BYTES_PER_S = 20e-6, 10e-6, 6e9
"""What looking costs: a piece, each tensor in it, and how fast bytes go. Constants, since all workers must compute the same."""

Array = npt.NDArray[Any]
Part = Tensor | Array
"""What is looked at; an array if NumPy sees the same memory."""
Holding = tuple[str, Tensor]
"""Name of something that all workers hold alike, and its tensor."""


class ReplicaGuard:
    """Digests what this worker holds, and finds the worker that differs.

    Args:
        holdings: What all workers hold alike now, in the same order with the same names.
        tensors: The same memory in the same order, in as few tensors as possible.
        collective: The workers.
        on_desync: "error", or "heal": where more than half agree, the others take their state.
        every: Everything is looked at once in this many steps; None: as often as time allows.
        values: Numbers and texts that are compared in every step, besides.
    """

    def __init__(
        self,
        holdings: Callable[[], Iterator[Holding]],
        tensors: Callable[[], Sequence[Tensor]],
        collective: Collective,
        on_desync: OnDesync,
        every: int | None = None,
        values: Values | None = None,
    ) -> None:
        self._holdings = holdings
        self._tensors = tensors
        self._collective = collective
        self._on_desync = on_desync
        self._every = every
        self._values = values or Values(lambda: (), lambda: 0, dict)
        self._places: list[tuple[int, int]] = []  # addresses and sizes of the tensors that the pieces are made of
        self._pieces: list[tuple[list[Part], float]] = []
        self._next = 0
        self._looked = 0.0
        self._credit = Credit(_SHARE)
        self._rest = 0  # steps until a piece may be due
        self._steps = 1  # steps from one time that a piece may be due to the next
        self._read_s = math.nan

    def digest(self, seconds: Sequence[float]) -> int:
        """*local*. 64 bits of the values, and of the pieces whose turn it is; 0 if this worker is alone.

        Args:
            seconds: Clock readings whose sum grows as time passes, the same on all workers; NaN if unknown.
        """
        return self._digest_pieces(seconds) ^ self._values.digest() if self._collective.size > 1 else 0

    def _digest_pieces(self, seconds: Sequence[float]) -> int:
        """64 bits of the pieces whose turn it is; 0 if it is no piece's turn."""
        if self._rest:
            self._rest -= 1
            return 0
        before_s, self._read_s = self._read_s, sum(seconds)
        passed_s = 0.0 if math.isnan(self._read_s - before_s) else self._read_s - before_s
        looked_at = self._due(passed_s)
        self._rest = self._pause(passed_s)
        self._steps = self._rest + 1
        return int.from_bytes(digest_of(looked_at), "little") | 1 if looked_at else 0  # 0 is for no piece

    def _due(self, passed_s: float) -> list[Part]:
        """The pieces whose turn it is."""
        if self._next >= len(self._pieces):
            tensors = self._tensors()
            places = [(tensor.data_ptr(), tensor.nbytes) for tensor in tensors]
            if places != self._places:
                self._places, self._pieces = places, _pieces(tensors)
            self._next, self._looked = 0, 0.0
        begin = self._next
        # What the period demands, at any cost; and more while there is time.
        self._looked += self._steps * len(self._pieces) / (self._every or PERIOD)
        self._credit.earn(passed_s)
        while self._next < len(self._pieces) and self._is_due(self._pieces[self._next][1]):
            self._credit.spend(self._pieces[self._next][1])
            self._next += 1
        return [part for piece, _ in self._pieces[begin : self._next] for part in piece]

    def _is_due(self, cost_s: float) -> bool:
        return self._next + 1 <= self._looked + 1e-9 or (self._every is None and self._credit.affords(cost_s))

    def _pause(self, passed_s: float) -> int:
        """For how many steps nothing will be due, if they take as long as those before: asking in each step would cost as much as
        looking."""
        period = self._every or PERIOD
        if not self._pieces:  # one shared copy of the weights, and all state sharded
            return period - 1
        begins = self._next >= len(self._pieces)  # a new round, whose pieces are assumed to be like these
        missing = 1 - 1e-9 if begins else self._next + 1 - 1e-9 - self._looked
        steps = missing * period / len(self._pieces)
        if self._every is None:
            missing_s = self._credit.missing(self._pieces[0 if begins else self._next][1])
            steps = min(steps, missing_s * self._steps / passed_s if passed_s > 0 else 1)
        return max(0, math.ceil(steps) - 1)

    def check_all(self, step: int) -> None:
        """*collective*. Compares everything.

        Raises:
            Desync: Workers differ and were not healed.
        """
        if self._collective.size == 1:
            return
        values = json.dumps(self._values.named()).encode()
        mine = digest_of(self._tensors()) + blake2b(values, digest_size=8).digest()
        everybodys = self._collective.all_gather(torch.frombuffer(bytearray(mine), dtype=torch.uint8))
        if any(not torch.equal(other, everybodys[0]) for other in everybodys):
            self.settle(step)

    def settle(self, step: int) -> None:
        """*collective*. Names what differs and on which workers; heals it if asked to.

        Raises:
            Desync: It was not healed.
        """
        self._settle_values(step)
        mine = {name: digest_of([tensor]).hex() for name, tensor in self._holdings()}
        everybodys: list[dict[str, str]] = self._collective.all_gather_json(mine)
        names = [name for name in mine if len({other.get(name) for other in everybodys}) > 1]
        if not names:
            return
        votes = Counter(tuple(other.get(name) for name in names) for other in everybodys)
        winner, most = votes.most_common(1)[0]
        ranks = [rank for rank, other in enumerate(everybodys) if tuple(other.get(name) for name in names) != winner]
        known = most * 2 > len(everybodys)
        what = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        who = f"on worker{'s'[: len(ranks) != 1]} {', '.join(map(str, ranks))}" if known else "between workers"
        steps = self._every or PERIOD
        found = f"step {step}: replicas differ: {what} {who}"
        if self._on_desync == "error" or not known:
            raise Desync(
                f"{found}. A bit may have flipped in memory, or code changed the model on some workers only (a callback that "
                f"depends on the rank?). The last {steps} steps may be affected: resume from a checkpoint before them"
                + ("" if known else "; with two workers it cannot be told which one is right"),
                step=step,
                tensor=names[0],
                ranks=ranks if known else range(len(everybodys)),
            )
        source = next(rank for rank in range(len(everybodys)) if rank not in ranks)
        for name, tensor in self._holdings():
            if name in names:
                value = tensor.detach().contiguous()
                self._collective.broadcast(value, source)
                with torch.no_grad():
                    tensor.copy_(value)
        if self._collective.rank == 0:
            warnings.warn(
                f"{found}, which took the state of worker {source}. Up to {steps} steps were computed with the differing values",
                stacklevel=2,
            )

    def _settle_values(self, step: int) -> None:
        """Names a number or text that differs. (None is healed: what has set it will set it again.)"""
        mine = self._values.named()
        told = self._collective.all_gather_json(mine)
        names = [name for name in {**told[0], **told[-1], **mine} if len({other.get(name) for other in told}) > 1]
        if not names:
            return
        found = ", ".join(f"{_short(other.get(names[0], 'not there'))} on worker {rank}" for rank, other in enumerate(told[:4]))
        more = f", and {len(names) - 1} more" if len(names) > 1 else ""
        raise Desync(
            f"step {step}: the workers differ in {names[0]} ({found}{', ...' if len(told) > 4 else ''}){more}. This step has "
            "updated nothing. Every worker must set it alike: look for a callback or schedule that depends on the rank, on time "
            "or on what this worker alone has seen",
            step=step,
            tensor=names[0],
            ranks=range(len(told)),
        )


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."


def _pieces(tensors: Sequence[Tensor]) -> list[tuple[list[Part], float]]:
    """Everything in pieces of at most 1 MiB, with what each costs. A tensor that is not contiguous is not cut; looking at it
    copies it. Small tensors become arrays here, once, since that costs more than looking at them."""
    found: list[list[Tensor]] = []
    room = 0
    for tensor in tensors:
        flat = tensor.detach()
        cut = flat.is_contiguous() and flat.nbytes > _PIECE_BYTES
        for part in torch.split(flat.view(-1), _PIECE_BYTES // flat.element_size()) if cut else (flat,):
            if not part.nbytes:
                continue
            if part.nbytes > room:
                found.append([])
                room = _PIECE_BYTES
            found[-1].append(part)
            room -= part.nbytes
    return [([_as_array(part) for part in piece], _cost(piece)) for piece in found]


def _as_array(part: Tensor) -> Part:
    return _bytes_of(part) if part.nbytes <= _SMALL_BYTES and part.is_cpu and part.is_contiguous() else part


def _cost(piece: Sequence[Tensor]) -> float:
    return _PIECE_S + len(piece) * _TENSOR_S + sum(tensor.nbytes for tensor in piece) / _BYTES_PER_S


def digest_of(parts: Sequence[Part]) -> bytes:
    """*local*. 64 bits of the bytes of these. Many bytes are first summed as integers in columns: any single bit that differs
    changes a sum, and the cost is that of reading the memory."""
    found = blake2b(digest_size=8)
    small: list[Array] = []
    for part in parts:
        if isinstance(part, np.ndarray):
            small.append(part)
        elif part.nbytes > _SMALL_BYTES:
            _add_large(found, part)
        else:
            small.append(_bytes_of(part))
    # A call costs more than the bytes of a small tensor, so these are digested together.
    raw = np.frombuffer(b"".join([one.data for one in small]), np.uint8)
    if raw.nbytes > _HASHED_BYTES:
        summed = raw.nbytes // _ROW_BYTES * _ROW_BYTES
        words = raw[:summed].view(np.uint64).reshape(-1, _COLUMNS)
        # Odd factors lose no bit, and distinguish equal rows in different places.
        factors = np.arange(1, len(words) + 1, dtype=np.uint64) * _FACTOR | np.uint64(1)
        found.update(np.einsum("i,ij->j", factors, words).data)
        raw = raw[summed:]
    found.update(raw.data)
    return found.digest()


def _add_large(found: blake2b, tensor: Tensor) -> None:
    """Sums on the tensor's device, so that little is copied from a GPU."""
    raw = tensor.detach().reshape(-1).view(torch.uint8)
    summed = raw.numel() // _ROW_BYTES * _ROW_BYTES
    words = raw[:summed].view(torch.int64).view(-1, _COLUMNS)
    columns = words.numpy().sum(axis=0) if words.is_cpu else words.sum(dim=0).cpu().numpy()
    found.update(columns.data)
    found.update(raw[summed:].cpu().numpy().data)


def _bytes_of(tensor: Tensor) -> Array:
    """The memory of a tensor; a copy if it is not contiguous or not on the CPU."""
    here = tensor.detach().cpu()
    if here.dtype not in _KNOWN_TO_NUMPY:
        here = here.reshape(-1).view(torch.uint8)
    return np.ascontiguousarray(here.numpy())
