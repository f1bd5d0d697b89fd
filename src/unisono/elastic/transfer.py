"""State for a worker that is behind the others, or new, or on a host that lacks it: as a message, to those who need it alone."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from unisono.checkpoint.message import from_bytes, to_bytes
from unisono.collective import Collective
from unisono.elastic.held_state import HeldState, Outcome
from unisono.elastic.replay_log import PastStep
from unisono.guard.replicas import digest_of
from unisono.observe.summary import Summary
from unisono.replica.base import Replica
from unisono.training.header import Signals
from unisono.training.participant import Visible
from unisono.training.record import Position
from unisono.training.session import StepKey
from unisono.training.step import StepResult

_TYPES = (Outcome, PastStep, Position, Signals, StepKey, StepResult, Summary, Visible)
"""What a message may hold beside plain values."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StateTransfer:
    """See the module. *Local* but for ``deliver``."""

    outcome: Outcome
    """Of the last operation."""
    buffers: Sequence[Tensor]
    weights: Sequence[Tensor] | None
    """Flat, a tensor a block; None: the receiver's host has them."""
    state: Mapping[int, Mapping[str, Any]] | None
    """All of the optimizer's state, by slot; None: the receiver's host has it."""
    whole: Any = None
    """The same, if it is more than a state of slots; None: it is not, or the receiver's host has it."""
    groups: list[dict[str, Any]]
    """Hyperparameters of the optimizer, by parameter group."""
    scheduler: Mapping[str, Any] | None
    replay_log: dict[str, Any]
    frozen: Mapping[str, Tensor]
    """Parameters that are not trained and are not what a newcomer has made of them, by name."""
    run: dict[str, Any]
    """How far the run has come, for those who are new."""

    @classmethod
    def of(cls, held: HeldState, *, weights: bool, state: bool, frozen: Collection[str], run: dict[str, Any]) -> StateTransfer:
        """What this worker can give.

        Args:
            weights: Whether the weights are wanted.
            state: Whether the optimizer's state is.
            frozen: Names of the parameters that are not trained and are wanted.
            run: How far the run has come.
        """
        local, replica = held.local, held.local.replica
        whole = replica.whole_state() if state else None
        slots = local.layout.slots if whole is None else ()
        states = ((slot.index, dict(replica.slot_state(slot.index))) for slot in slots)
        return cls(
            outcome=held.outcome,
            buffers=replica.buffers.values(),
            weights=list(local.weights.flats) if weights else None,
            state={slot: found for slot, found in states if found} if state else None,
            whole=whole,
            groups=replica.hyperparameters(),
            scheduler=replica.schedule_state(),
            replay_log=held.replay_log.describe(),
            frozen={name: tensor.detach() for name, tensor in replica.frozen().items() if name in frozen},
            run=run,
        )

    @classmethod
    def deliver(
        cls, transfer: StateTransfer | None, collective: Collective, source: int, receivers: Collection[int]
    ) -> StateTransfer | None:
        """*collective*. Brings ``transfer``, given on the source, to the receivers; None on all others.

        Raises:
            CheckpointError: It holds something that cannot be sent without pickling it; or no message came.
        """
        data = b"" if transfer is None else to_bytes(vars(transfer), _TYPES)
        size = int(collective.all_gather(torch.tensor([len(data)]))[source])
        nothing: list[Tensor] = []
        sent = [torch.frombuffer(bytearray(data), dtype=torch.uint8)] if data else nothing
        expected = [(size, torch.uint8, torch.device("cpu"))] if collective.rank in receivers else []
        received = collective.exchange(
            [sent if rank in receivers and rank != source else nothing for rank in range(collective.size)],
            [expected if rank == source != collective.rank else [] for rank in range(collective.size)],
        )
        if collective.rank not in receivers:
            return None
        message = data if collective.rank == source else received[source][0].numpy().tobytes()
        return cls(**from_bytes(message, _TYPES))

    def put_into(self, held: HeldState, *, state: bool) -> None:
        """Takes over what it holds.

        Args:
            state: Whether this worker needs the optimizer's state; else its host has that.
        """
        local, replica = held.local, held.local.replica
        replica.buffers.go_to(self.buffers)
        for flat, value in zip(local.weights.flats, self.weights or (), strict=self.weights is not None):
            flat.copy_(value)
        if state and self.whole is not None:
            replica.set_whole_state(self.whole)
        elif state and self.state is not None:
            replica.clear_state()
            for slot, values in self.state.items():
                replica.set_slot_state(slot, values)
        if held.is_new:
            mine = replica.frozen()
            with torch.no_grad():
                for name, value in self.frozen.items():
                    mine[name].copy_(value)
            replica.set_hyperparameters(self.groups)
            replica.set_schedule_state(self.scheduler)
        local.buffers.begin()
        replica.skip_update()
        held.outcome = self.outcome
        held.replay_log.adopt(self.replay_log)


def unlike_frozen(replica: Replica, collective: Collective, source: int, newcomers: Collection[int]) -> set[str]:
    """*collective*. Names of the parameters that are not trained and are not alike on ``source`` and ``newcomers``: code between
    two steps has changed them, or they were drawn without a seed. (A frozen backbone may be large: what is alike is not sent.)"""
    takes_part = collective.rank == source or collective.rank in newcomers
    mine = {name: digest_of([tensor]).hex() for name, tensor in replica.frozen().items()} if takes_part else {}
    told = [json.loads(text) for text in collective.all_gather_bytes(json.dumps(mine).encode())]
    return {name for name, digest in told[source].items() if any(told[rank].get(name) != digest for rank in newcomers)}
