"""What the workers of a host hold in common, so that none of it dies with one of them.

Each worker updates the parameters that it owns, so it alone would hold their optimizer state. Here that state lies in memory
that all workers of the host have mapped: it stays when its owner dies, and a worker that joins finds it there. The same holds
for weights while they are shared (``weights.py``).

One moment is left in which a death does harm: while parameters are updated, in place. So each owner keeps a copy of what it
is about to change, as often as a hundredth of the time allows: in every step where that is cheap beside computing gradients.
A *progress table* in common memory says how far each owner came. After a death the host's state is either whole, or it goes back
to the copy, and the steps since then are taken again; the same bits come out.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from unisono.collective import Collective
from unisono.elastic.arena import Arena, Entry, new_arena
from unisono.elastic.progress_table import BEGUN, COPIED, DONE, ProgressTable
from unisono.replica.base import Replica
from unisono.sync import Reduction
from unisono.training.weights import Weights

_SHARE = 0.01
"""How much of the time may go into copies, where steps may be done again."""
_SHARE_WITHOUT_REPLAY = 0.1
"""How much of it where only the step under way may be done again, so that each step needs its copy."""
_BYTES_PER_S = 5e9
"""What copying costs, roughly: decisions that all workers take alike cannot rest on what one of them has measured."""
_MOST_ARENAS = 64
"""An optimizer whose state takes another shape again and again would fill the memory."""


class _Place(NamedTuple):
    """Where a value of the optimizer's state lies."""

    entry: Entry
    view: Tensor | None


_NOWHERE = _Place(Entry(slot=-1, key="", dtype=None), None)


@dataclasses.dataclass(frozen=True)
class Point:
    """What the host's state can go on from, after a generation has ended."""

    step: int
    """Steps that are behind it."""
    parts: tuple[int, ...] = ()
    """Former places on this host whose parts must go back to their copies; none: the state is whole as it is."""


@dataclasses.dataclass(frozen=True)
class _Part:
    """What one worker of this host owns."""

    slots: frozenset[int]
    bounds: tuple[tuple[int, int], ...]
    """Its elements of each block of weights."""


class SharedState:
    """The optimizer's state in common memory, and the copy of state and weights.

    Args:
        replica: Whose state it is.
        weights: The memory of its parameters.

    Attributes:
        replay: Whether steps that are done may be done again: nobody but the trainer changes weights between them.
        copied: The step that the copy shows; -1 if there is none in this generation.
        grown: Whether this worker's part of the state has something new that is not yet held in common.
        will_grow: Whether the next step is the first one, which makes the state.
    """

    def __init__(self, replica: Replica, weights: Weights) -> None:
        self._replica = replica
        self._weights = weights
        self._arenas: list[Arena] = []
        self._places: dict[int, dict[str, _Place]] = {}  # by slot and key: where each value lies now
        self._known_table: ProgressTable | None = None  # of an earlier generation, too
        self._copies: list[Tensor] = []
        self._parts: dict[int, list[_Part]] = {}  # of all workers of this host, by generation
        self._generation = 0
        self._updated: frozenset[int] = frozenset()  # the slots that this worker updates, or did in the last generation
        self._place = 0
        self._due = _Budget()
        self.replay = False
        self.copied = -1
        self.grown = self.will_grow = False
        self._unfit = False  # something in the state cannot be held, so nothing can be gone back to

    # ------------------------------------------------------------------ a generation begins

    def bind(self, collective: Collective, reduction: Reduction, generation: int, step: int) -> bool:
        """*collective*. Holds the state, which shows step ``step``, together with the workers of this generation.

        Returns:
            Whether that can be done; the same on all workers.
        """
        self._collective = collective
        self._near = next(tuple(host) for host in collective.hosts if collective.rank in host)
        self._place = self._near.index(collective.rank)
        table = ProgressTable.make(collective, self._known_table)
        if table is None:
            return False
        self._known_table = table
        self._parts[generation] = [
            _Part(frozenset(reduction.updated_by(rank)), tuple((s[rank].lo, s[rank].hi) for s in reduction.segments))
            for rank in self._near
        ]
        self._parts = {number: parts for number, parts in self._parts.items() if number >= table.generation}
        self._generation = generation
        table.open()
        self._learn()
        if not self.settle(step):
            return False
        self.will_grow = not self._arenas
        self._copies = [
            common
            for block, flat in enumerate(self._weights.flats)
            if (common := collective.common(flat.numel(), flat.dtype, self._copies[block] if self._copies else None)) is not None
        ]
        self._table.mine(self._place)[:] = (-1, step, step)
        self.copied = -1
        self._due = _Budget()
        collective.barrier()
        # Until here the marks of the generation before were the ones that count.
        table.count(generation)
        return True

    def _learn(self) -> None:
        """*collective*. Everyone has everything that someone has; whoever joins sees it in the optimizer."""
        known = [bool(has) for has in self._collective.all_gather(torch.tensor([bool(self._arenas)]))]
        here = any(known[rank] for rank in self._near)  # else it comes from another host, and lies in each optimizer alone
        mine = json.dumps([{"born": c.born, "nbytes": c.nbytes, "entries": [vars(e) for e in c.entries]} for c in self._arenas])
        told = max(self._collective.all_gather_bytes(mine.encode()), key=len)
        if not self._arenas:
            self._arenas = [
                Arena(born=one["born"], nbytes=one["nbytes"], entries=[Entry.from_json(entry) for entry in one["entries"]])
                for one in json.loads(told)
            ]
        for arena in self._arenas:
            arena.memory = self._collective.common(arena.nbytes, torch.uint8, arena.memory)
            arena.copy = self._collective.common(arena.nbytes, torch.uint8, arena.copy)
        self._places = {}
        alone = len(self._near) == 1  # and what it owned may lie elsewhere, if it was alone before
        self._show(take=(self._updated if alone else frozenset()) if here else frozenset(range(len(self._replica.layout.slots))))
        self._updated = self._mine.slots

    def settle(self, step: int) -> bool:
        """*collective*. Takes what is new in the optimizer's state into common memory.

        Args:
            step: Steps that the state has behind it.

        Returns:
            Whether all of the state can be held; the same on all workers. Tensors on the CPU can, numbers, and None.
        """
        new = self._news()
        mine = None if new is None else [vars(entry) for entry in new]
        told = [json.loads(text) for text in self._collective.all_gather_bytes(json.dumps(mine).encode())]
        if None in told:
            self._unfit = True
            return False
        entries = [Entry.from_json(one) for rank in self._near for one in told[rank]]
        if entries:
            arena = new_arena(entries, step)
            arena.memory = self._collective.common(arena.nbytes, torch.uint8)
            arena.copy = self._collective.common(arena.nbytes, torch.uint8)
            self._arenas.append(arena)
            self._show(take=self._mine.slots)
        if any(told):
            self._collective.barrier()  # all of a host have it, before a mark says that it is there
        self._keep()
        self.grown = False
        if self._generation:
            self._table.mine(self._place)[DONE] = step
        self._collective.barrier()
        return True

    def _news(self) -> list[Entry] | None:
        """What this worker owns of the state and is not in common memory; None if some of it cannot be there."""
        found: list[Entry] = []
        for slot in sorted(self._mine.slots):
            known, state = self._places.get(slot, {}), self._replica.slot_state(slot)
            if known.keys() - state.keys():
                return None  # what is gone would come back with whoever joins
            for key, value in state.items():
                if key in known and known[key].entry.fits(value):
                    continue
                if (entry := Entry.of(slot, key, value)) is None:
                    return None
                found.append(entry)
        return None if found and len(self._arenas) == _MOST_ARENAS else found

    def _show(self, *, take: frozenset[int]) -> None:
        """Makes the optimizer's state lie in the arenas; what this worker has of slots to ``take`` is copied there first."""
        before, self._places = self._places, {}
        for arena in self._arenas:
            assert arena.memory is not None
            for entry in arena.entries:
                self._places.setdefault(entry.slot, {})[entry.key] = _Place(entry, entry.view(arena.memory))
        for slot, places in self._places.items():
            state = self._replica.slot_state(slot)
            for key, (entry, view) in places.items():
                known = before.get(slot, {}).get(key)
                if known is not None and known.entry is entry:
                    places[key] = known
                    continue
                if slot in take and (key in state or slot in self._mine.slots):
                    if key not in state or not entry.fits(state[key]):
                        continue  # it is not so any more, which is yet to be said
                    if view is not None:
                        _put(view, state[key])  # where several workers have it, it is the same
                self._replica.place_state(slot, key, entry.shown(view))

    # ------------------------------------------------------------------ a step

    def renew(self, step: int, *, replay: bool) -> None:
        """*collective*. Steps follow after step ``step``; what was changed since the last one is held, too."""
        self.settle(step)
        self.replay, self.will_grow = replay, not self._arenas
        self.copied, self._due = -1, _Budget()
        self._table.mine(self._place)[:] = (-1, step, step)

    def skip(self, step: int) -> None:
        """*local*. Step ``step`` has changed nothing."""
        self._table.mine(self._place)[:] = (-1, step, step)
        self.copied, self._due = -1, _Budget()

    def before_update(self, step: int, step_s: float, *, settles: bool) -> None:
        """*local*. Step ``step`` is about to update what this worker owns; the copy comes first where it is due, on all workers
        alike.

        Args:
            step_s: What a step takes, in seconds, as all workers know it.
            settles: Whether all have to meet once more before the step ends: where they do not, nobody takes the state of a lone
                worker in between.
        """
        alone = len(self._near) == 1
        if alone and not settles:
            return
        marks = self._table.mine(self._place)
        if alone:
            marks[DONE] = step - 1
        if alone and not self._keep():  # after_update has not done it: nobody else needed it
            marks[COPIED] = self.copied = -1
        elif alone or self._due.now(max(map(self._nbytes, self._parts[self._generation])), step_s, replay=self.replay):
            self._copy(self._mine, back=False)
            marks[COPIED] = self.copied = step - 1
        marks[BEGUN] = step

    def after_update(self, step: int) -> None:
        """*local*. This worker has updated what it owns."""
        self.will_grow = False
        if len(self._near) == 1:
            return
        self.grown = not self._keep()
        if not self.grown:
            self._table.mine(self._place)[DONE] = step

    def _keep(self) -> bool:
        """Some optimizers put a new tensor into their state instead of changing the one that is there: it is copied there.

        Returns:
            Whether all that this worker owns lies where it should.
        """
        whole = True
        for slot in self._mine.slots:
            state, places = self._replica.slot_state(slot), self._places.get(slot, {})
            whole = whole and state.keys() == places.keys()
            for key, value in state.items():
                entry, view = places.get(key, _NOWHERE)
                if value is view:
                    continue
                if not entry.fits(value):
                    whole = False
                elif view is not None:
                    _put(view, value)
                    if not entry.number:
                        self._replica.place_state(slot, key, view)
        return whole

    def _copy(self, part: _Part, *, back: bool, weights: bool = True) -> None:
        """Copies what a worker owns into the copy, or back."""
        for arena in self._arenas:
            for lo, hi in arena.runs(part.slots):
                assert arena.memory is not None
                assert arena.copy is not None
                here, there = arena.memory[lo:hi], arena.copy[lo:hi]
                (here if back else there).copy_(there if back else here)
        if not weights:
            return
        for flat, copy, (lo, hi) in zip(self._weights.flats, self._copies, part.bounds, strict=True):
            (flat if back else copy)[lo:hi].copy_((copy if back else flat)[lo:hi])

    def _nbytes(self, part: _Part) -> int:
        state = sum(hi - lo for arena in self._arenas for lo, hi in arena.runs(part.slots))
        return state + sum(
            (hi - lo) * flat.element_size() for flat, (lo, hi) in zip(self._weights.flats, part.bounds, strict=True)
        )

    # ------------------------------------------------------------------ a generation has ended

    def point(self, reached: int) -> Point | None:
        """*local*, alike on all workers of the host, once nobody of the generation writes any more.

        Args:
            reached: The last step that some worker who is left has completed.

        Returns:
            What the host's state can go on from; None if it cannot.
        """
        number = self._table.generation
        if number not in self._parts:
            return Point(reached)  # nobody has updated anything yet
        marks = self._table.counting()[: len(self._parts[number])]
        if len(marks) == 1 and marks[0, BEGUN] <= min(marks[0, DONE], reached):
            return Point(reached)  # nobody else has
        if self._unfit:
            return None
        top = int(marks[:, BEGUN].max())
        if bool((marks[:, DONE] == top).all()) and reached >= top:
            return Point(top)
        behind = marks[:, DONE] < top - 1  # something new of theirs was not in common memory yet
        parts = np.flatnonzero((marks[:, BEGUN] == top) | behind)
        if not behind.any() and bool((marks[parts, DONE] == top).all() and (marks[parts, COPIED] == -1).all()):
            return Point(reached)  # a step that changes nothing
        if bool((marks[parts, COPIED] == top - 1).all()) and not behind.any():
            return Point(top - 1, tuple(parts.tolist()))
        step = int(marks[0, COPIED])
        if step < 0 or not bool((marks[:, COPIED] == step).all()):
            return None
        return Point(step, tuple(range(len(marks))))

    def restore(self, step: int, parts: Sequence[int], *, main: bool) -> None:
        """*local*. Goes back to the state after step ``step``.

        Args:
            parts: Former places on this host whose parts must go back to their copies.
            main: Whether this worker does it for all workers of the host.
        """
        owned = self._parts[self._table.generation]
        for place in parts:
            if main:
                self._copy(owned[place], back=True, weights=self._weights.shared)
            if not self._weights.shared:
                for flat, copy, (lo, hi) in zip(self._weights.flats, self._copies, owned[place].bounds, strict=True):
                    flat[lo:hi].copy_(copy[lo:hi])
        self._arenas, self._places = [arena for arena in self._arenas if arena.born <= step], {}
        self._replica.clear_state()
        self._show(take=frozenset())
        self.grown = False

    def read_numbers(self) -> None:
        """*local*, once nobody of the generation writes any more. Numbers that others have updated: tensors show that by
        themselves."""
        for slot, places in self._places.items():
            state = self._replica.slot_state(slot)
            for key, (entry, view) in places.items():
                if entry.number and slot not in self._updated and key in state:
                    self._replica.place_state(slot, key, entry.shown(view))

    @property
    def _table(self) -> ProgressTable:
        assert self._known_table is not None
        return self._known_table

    @property
    def _mine(self) -> _Part:
        return self._parts[self._generation][self._place]


class _Budget:
    """When a copy is due: in the first step of a generation, then as often as its share of the time allows. *Local*, alike on all
    workers."""

    def __init__(self) -> None:
        self._first = True
        self._saved_s = 0.0

    def now(self, nbytes: int, step_s: float, *, replay: bool) -> bool:
        """Whether step after step, each of ``step_s`` seconds, it is time to copy ``nbytes``."""
        cost_s = nbytes / _BYTES_PER_S
        self._saved_s += _SHARE * step_s
        due = self._first or (self._saved_s >= cost_s if replay else cost_s <= _SHARE_WITHOUT_REPLAY * step_s)
        if due:
            self._first, self._saved_s = False, 0.0
        return due


def _put(view: Tensor, value: Any) -> None:
    view.copy_(value) if isinstance(value, Tensor) else view.fill_(value)
