"""The state of a run, as one worker holds it, and what checkpoints and guards see of it between two steps."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from unisono.checkpoint.checkpoints import Checkpoint
from unisono.checkpoint.format import check
from unisono.checkpoint.message import from_bytes, to_bytes
from unisono.collective import Collective
from unisono.data.stream_batches import Positions
from unisono.errors import CheckpointError, ConfigurationError
from unisono.layout import Layout
from unisono.observe.timing import StepClock
from unisono.replica.base import Replica
from unisono.replica.buffers import BufferFold
from unisono.replica.parameters import plain_name
from unisono.sync import Reduction, Sync
from unisono.training.user_state import UserState
from unisono.training.weights import Weights


@dataclasses.dataclass(frozen=True, kw_only=True)
class LocalState:
    """What this worker trains with, whoever the others are."""

    replica: Replica
    weights: Weights
    """The memory of its trainable parameters."""
    buffers: BufferFold
    """What becomes of its buffers."""
    sync: Sync
    clock: StepClock
    carries: bool = False
    """Whether what the optimizer keeps must be saved, or handed to other workers."""
    user: UserState
    """What belongs to the user's code."""
    positions: Positions = dataclasses.field(default_factory=Positions)
    """Where the data are, if they are streams."""

    @property
    def layout(self) -> Layout:
        """Where its trainable parameters lie."""
        return self.replica.layout

    def undo_step(self) -> None:
        """*local*. Forgets the step under way: buffers are as at its start, also those that a forward has just changed for
        the first time. (No replica keeps gradients after an error.)"""
        self.buffers.buffers.restore()


@dataclasses.dataclass(frozen=True, kw_only=True)
class State:
    """The state of a run between two steps, as one worker holds it. Everything here is *local*."""

    local: LocalState
    reduction: Reduction
    collective: Collective

    def common(self) -> dict[str, Any]:
        """What all workers have alike and the model's file does not hold."""
        replica = self.local.replica
        persistent = set(replica.model_state())
        whole = replica.whole_state()
        return {
            **({} if whole is None else {"optimizer": whole}),
            "strides": True,  # of the optimizer's tensors: they are as they were
            "groups": replica.hyperparameters(),
            "scheduler": replica.schedule_state(),
            **self.reduction.state_dict(),
            "user": self.local.user.describe(),
            "modes": replica.changed_modes(),
            "buffers": {name: buffer for name, buffer in replica.buffers.named().items() if name not in persistent},
        }

    def own(self) -> dict[str, Any]:
        """The part that this worker saves: where its streams are, and the optimizer's state of the parameters that it owns, by
        name. (No state if it is in ``common``.)"""
        replica = self.local.replica
        owned = self.reduction.saved_by(self.collective.rank) if replica.whole_state() is None else ()
        states = {replica.layout.names[slot]: dict(state) for slot in owned if (state := replica.slot_state(slot))}
        return {"state": states, "streams": self.local.positions.describe()}

    def restore(self, checkpoint: Checkpoint) -> None:
        """Takes everything from a checkpoint, whatever the number of workers that wrote it."""
        replica = self.local.replica
        replica.load_model_state(checkpoint.tensors("model"))
        common = checkpoint.part("trainer")
        buffers = {plain_name(name): value for name, value in common["buffers"].items()}
        with torch.no_grad():
            for name, buffer in replica.buffers.named().items():
                if name in buffers:
                    buffer.copy_(buffers[name])
        self.reduction.load_state_dict(common)
        parts = [checkpoint.part(name) for name in checkpoint.part_names("optimizer-")]
        self.local.positions.adopt(*(part.get("streams", {}) for part in parts))
        self._restore_optimizer(parts, common)
        if "user" in common:  # checkpoints of earlier versions have neither
            self.local.user.resume(common["user"])
            replica.change_modes(common["modes"])
        replica.set_hyperparameters(common["groups"])
        replica.set_schedule_state(common["scheduler"])

    def _restore_optimizer(self, parts: Sequence[Mapping[str, Any]], common: Mapping[str, Any]) -> None:
        replica = self.local.replica
        if "optimizer" in common:
            replica.set_whole_state(common["optimizer"])
            return
        state: dict[str, Any] = {}
        for part in parts:
            state.update((plain_name(key), value) for key, value in part["state"].items())
        replica.clear_state()
        for slot in self.reduction.updated_by(self.collective.rank):
            saved = state.get(replica.layout.names[slot])
            if saved is not None:
                replica.set_slot_state(slot, saved, strides=common.get("strides", False))

    def replicated(self) -> Iterator[tuple[str, Tensor]]:
        """What all workers hold alike, each in memory of its own, by name for a person."""
        replica = self.local.replica
        if self._own_weights:
            yield from self.local.weights.named()
        for name, parameter in replica.frozen().items():
            yield f"frozen parameter {name!r}", parameter
        for name, buffer in replica.buffers.named().items():
            yield f"buffer {name!r}", buffer
        yield from self.local.user.tensors()
        for slot, key, value in self._replicated_state():
            yield f"{key!r} of the optimizer" + ("" if slot is None else f" for {replica.layout.names[slot]!r}"), value

    def replicated_tensors(self) -> list[Tensor]:
        """The same in the same order, weights as they lie in memory: to look at it costs by the number of tensors."""
        replica = self.local.replica
        weights = self.local.weights.flats if self._own_weights else ()
        users = [tensor for _, tensor in self.local.user.tensors()]
        state = [value for _, _, value in self._replicated_state()]
        return [*weights, *replica.frozen().values(), *replica.buffers.named().values(), *users, *state]

    @property
    def _own_weights(self) -> bool:
        """Shared weights are one copy a host: there is something to compare between hosts only."""
        return not self.local.weights.shared or len(self.collective.hosts) > 1

    def _replicated_state(self) -> Iterator[tuple[int | None, str, Tensor]]:
        if self.collective.size > 1 and self.reduction.replicates:
            if (whole := self.local.replica.whole_state()) is not None:
                yield from ((None, name, value) for name, value in _tensors(whole, ""))
                return
            for slot in self.reduction.updated_by(self.collective.rank):
                for key, value in sorted(self.local.replica.slot_state(slot).items()):
                    if isinstance(value, Tensor):
                        yield from ((slot, name, part) for name, part in _tensors(value, key))


def _tensors(state: Any, path: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(state, Tensor):
        if hasattr(state, "__tensor_flatten__"):  # a kind of tensor that consists of others
            for name in state.__tensor_flatten__()[0]:
                yield from _tensors(getattr(state, name), f"{path}.{name}")
        else:
            yield path, state
        return
    parts = state.items() if isinstance(state, Mapping) else enumerate(state) if isinstance(state, (list, tuple, deque)) else ()
    for key, part in parts:
        yield from _tensors(part, f"{path}[{key!r}]")


def check_carried(replica: Replica, reduction: Reduction, rank: int) -> None:
    """*local*, after the first update. Whether what the optimizer keeps can be saved and handed over.

    Raises:
        CheckpointError: It cannot be written.
        ConfigurationError: It cannot be divided among workers.
    """
    whole = replica.whole_state()
    if whole is not None and not reduction.replicates:
        raise ConfigurationError(
            "Exact(shard_update=True), but the optimizer keeps more than a state for each parameter and settings for each group: "
            "what else its state_dict() holds would differ from worker to worker. Leave shard_update away"
        )
    slots = {replica.layout.names[slot]: dict(replica.slot_state(slot)) for slot in reduction.updated_by(rank)}
    check({"param_groups": replica.hyperparameters(), "state": slots if whole is None else whole})


def settle_state(replica: Replica, owners: Sequence[Sequence[int]], collective: Collective) -> None:
    """*collective*. Leaves each worker with the optimizer's state of the parameters that it owns, and of no other trainable one.

    An optimizer may come with state: made for every parameter at once (Adagrad), loaded, or left by an earlier Trainer, whose
    owners were others. An owner who holds some keeps it, else the first worker who does hands it over.

    Args:
        owners: For each rank, the slot indices that it owns.
    """
    rank = collective.rank
    mine = [slot.index for slot in replica.layout.slots if replica.slot_state(slot.index)]
    holders = [set(json.loads(text)) for text in collective.all_gather_bytes(json.dumps(mine).encode())]
    source = {
        slot: next(holder for holder, held in enumerate(holders) if slot in held)
        for owner, owned in enumerate(owners)
        for slot in owned
        if slot not in holders[owner] and any(slot in held for held in holders)
    }
    if source:
        sent = {slot: dict(replica.slot_state(slot)) for slot in mine if source.get(slot) == rank}
        for message in collective.all_gather_bytes(to_bytes(sent)):
            for slot, state in from_bytes(message).items():
                if slot in owners[rank]:
                    replica.set_slot_state(slot, state)
    replica.clear_state(set(mine) - set(owners[rank]))
    _settle_whole(replica, collective)


def _settle_whole(replica: Replica, collective: Collective) -> None:
    """*collective*. What belongs to no parameter is worker 0's, if the workers have it differently."""
    whole = replica.whole_state() if collective.size > 1 else None
    if whole is None:
        return
    try:
        mine = to_bytes(whole)
    except CheckpointError:  # check_carried() will say so, if it matters
        return
    if len(set(collective.all_gather_bytes(hashlib.sha256(mine).digest()))) > 1:
        found = collective.all_gather_bytes(mine if collective.rank == 0 else b"")[0]
        replica.set_whole_state(from_bytes(found))
