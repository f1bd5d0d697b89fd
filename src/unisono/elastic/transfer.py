"""What a worker is given that is behind the others, or new, or on a host that lacks the state. *Local.*"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from unisono.elastic.replay_log import ReplayLog
from unisono.training.state import LocalState


@dataclasses.dataclass(frozen=True, kw_only=True)
class StateTransfer:
    """See the module."""

    last: Any
    """Result of the last act."""
    buffers: Sequence[Tensor]
    weights: Sequence[Tensor] | None
    """Flat, a tensor a block; None: the host has them."""
    state: Mapping[int, Mapping[str, Any]] | None
    """All of the optimizer's state, by slot; None: the host has it."""
    groups: list[dict[str, Any]]
    """Hyperparameters of the optimizer, by parameter group."""
    scheduler: Mapping[str, Any] | None
    repeats: dict[str, Any]
    part: Any
    """What the rest of the trainer says to those who are new."""

    @classmethod
    def of(cls, own: LocalState, *, last: Any, weights: bool, state: bool, repeats: ReplayLog, part: Any) -> StateTransfer:
        """What this worker can give.

        Args:
            weights: Whether the weights are wanted.
            state: Whether the optimizer's state is.
        """
        replica = own.replica
        return cls(
            last=last,
            buffers=replica.buffers.values(),
            weights=list(own.weights.flats) if weights else None,
            state={s.index: dict(replica.slot_state(s.index)) for s in own.layout.slots} if state else None,
            groups=replica.hyperparameters(),
            scheduler=replica.schedule_state(),
            repeats=repeats.describe(),
            part=part,
        )

    def to_bytes(self) -> bytes:
        """For ``from_bytes`` on another worker of the same run."""
        buffer = io.BytesIO()
        torch.save(vars(self), buffer)
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> StateTransfer:
        """What another worker has packed; it comes from a process of this run, so it may be unpickled."""
        return cls(**torch.load(io.BytesIO(data), map_location="cpu", weights_only=False))

    def put_into(self, own: LocalState, *, new: bool) -> None:
        """Takes everything over that is in it.

        Args:
            new: Whether this worker has not been there before.
        """
        replica = own.replica
        replica.buffers.go_to(self.buffers)
        if self.weights is not None:
            with torch.no_grad():
                for flat, value in zip(own.weights.flats, self.weights, strict=True):
                    flat.copy_(value)
        if self.state is not None:
            replica.clear_state()
            for slot, state in self.state.items():
                if state:
                    replica.set_slot_state(slot, state)
        if new:
            replica.set_hyperparameters(self.groups)
            replica.set_schedule_state(self.scheduler)
        own.buffers.begin()
        replica.skip_update()
