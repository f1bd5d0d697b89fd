"""Everything that depends on who takes part: made anew for each generation. *Local.*"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unisono.collective import Collective
from unisono.data.batch import Batch
from unisono.guard.replicas import ReplicaGuard
from unisono.guard.silence import Watch
from unisono.guard.stragglers import Stragglers, warn_about
from unisono.sync.exact import host_sizes
from unisono.training.balance import Balance
from unisono.training.session import Session
from unisono.training.settings import Settings
from unisono.training.state import LocalState, State
from unisono.training.step import Stepper


class WorkerGroup:
    """The workers of one generation, and what they compute with together.

    Args:
        equipment: This worker's.
        settings: What steps are computed by.
        collective: The workers.
        watch: Who looks after those that do not answer.
        session: How they do things together.
        per_host: Whether each host is to have all of the state.
        learned: What reductions of other workers have learned (see ``Reduction.state_dict``).

    Attributes:
        collective: As given.
        watch: As given.
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
        watch: Watch,
        *,
        session: Session,
        per_host: bool,
        learned: Mapping[str, Any] | None = None,
    ) -> None:
        own = equipment
        self.collective, self.watch = collective, watch
        self.reduction = own.sync.bind(
            own.layout, collective, settings.microbatches, sparse=own.replica.sparse, per_host=per_host, clock=own.clock
        )
        self.reduction.load_state_dict(learned or {})
        self.stragglers = Stragglers(self.reduction.ranges, warn_about(watch.identity, main=collective.rank == 0))
        self.balance = Balance(self.reduction.ranges, host_sizes(collective))
        self.token = object()
        self.state = State(own=own, reduction=self.reduction, collective=collective)
        self.guard = ReplicaGuard(
            self.state.replicated, self.state.replicated_tensors, collective, settings.on_desync, settings.compare_every
        )
        self.stepper = Stepper(own, settings, collective=collective, reduction=self.reduction, guard=self.guard, session=session)

    def reassign(self, batch: Batch) -> None:
        """*local*, alike on all workers. Takes over the ranges by which the batch is divided."""
        if batch.ranges and batch.ranges != self.reduction.ranges:
            self.reduction.reassign(batch.ranges)
            self.stragglers.reassign(batch.ranges)
