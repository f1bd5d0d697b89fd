"""Everything that depends on who takes part: made anew for each generation. *Local.*"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from unisono.collective import Collective
from unisono.guard.replicas import ReplicaGuard
from unisono.guard.stragglers import Stragglers, warn_about
from unisono.layout import Layout
from unisono.observe.timing import StepClock
from unisono.replica.buffers import Buffers
from unisono.replica.torch_replica import TorchReplica
from unisono.replica.weights import Weights
from unisono.sync import Sync
from unisono.sync.exact import host_sizes
from unisono.training.balance import Balance
from unisono.training.session import Session
from unisono.training.settings import Settings
from unisono.training.state import State
from unisono.training.step import Batch, Stepper


@dataclasses.dataclass(frozen=True, kw_only=True)
class LocalState:
    """What this worker trains with, whoever the others are."""

    model: nn.Module
    optimizer: Optimizer
    scheduler: Any
    layout: Layout
    weights: Weights
    buffers: Buffers
    replica: TorchReplica
    sync: Sync
    clock: StepClock

    def undo_step(self) -> None:
        """*local*. Forgets the step under way: buffers are as at its start, and no gradient is left."""
        self.buffers.restore()
        for parameter in self.layout.parameters:
            parameter.grad = None


class WorkerGroup:
    """The workers of one generation, and what they compute with together.

    Args:
        equipment: This worker's.
        settings: What steps are computed by.
        collective: The workers.
        session: How they do things together. Where workers may be lost, each host is to have all of the state.
        dense: Slots whose gradients were to have few rows, and had not.

    Attributes:
        collective: As given.
        reduction: How gradients are summed over these workers.
        stragglers: Looks for slow ones among them.
        balance: Says how much each of them computes.
        token: Stands for them in batches that are divided among them.
        state: The run's state, as this worker holds it.
        guard: Compares replicas.
        stepper: Computes steps.
    """

    def __init__(
        self,
        equipment: LocalState,
        settings: Settings,
        collective: Collective,
        *,
        session: Session,
        dense: Sequence[int] = (),
    ) -> None:
        own = equipment
        self.collective = collective
        self.reduction = own.sync.bind(
            own.layout,
            collective,
            settings.microbatches,
            sparse=own.replica.tables.slots(own.layout),
            per_host=session.can_change,
        )
        if dense:
            self.reduction.densify(dense)
        self.stragglers = Stragglers(self.reduction.ranges, warn_about(session.watch.identity, main=collective.rank == 0))
        self.balance = Balance(self.reduction.ranges, host_sizes(collective))
        self.token = object()
        self.state = State(
            model=own.model,
            optimizer=own.optimizer,
            scheduler=own.scheduler,
            layout=own.layout,
            weights=own.weights,
            reduction=self.reduction,
            collective=collective,
        )
        self.guard = ReplicaGuard(
            self.state.replicated, self.state.replicated_tensors, collective, settings.on_desync, settings.compare_every
        )
        self.stepper = Stepper(
            replica=own.replica,
            layout=own.layout,
            weights=own.weights,
            buffers=own.buffers,
            reduction=self.reduction,
            optimizer=own.optimizer,
            collective=collective,
            leaves=settings.microbatches,
            seed=settings.seed,
            max_grad_norm=settings.max_grad_norm,
            guard=self.guard,
            on_nonfinite=settings.on_nonfinite,
            overlap=settings.overlap,
            clock=own.clock,
            session=session,
        )

    def reassign(self, batch: Batch) -> None:
        """*local*, alike on all workers. Takes over the ranges by which the batch is divided."""
        if batch.ranges and batch.ranges != self.reduction.ranges:
            self.reduction.reassign(batch.ranges)
            self.stragglers.reassign(batch.ranges)

    def close(self) -> None:
        """*local*. Others take part from now on."""
        self.reduction.close()
