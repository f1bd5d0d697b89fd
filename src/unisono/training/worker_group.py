"""Everything that depends on who takes part: made anew for each generation. *Local.*"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from unisono.collective import Collective
from unisono.collective.hosts import host_sizes
from unisono.data.batch import Batch
from unisono.errors import ConfigurationError
from unisono.guard.replicas import ReplicaGuard
from unisono.guard.stragglers import Stragglers, warn_about
from unisono.guard.values import Values
from unisono.training.balance import Balance
from unisono.training.session import Session
from unisono.training.settings import Settings
from unisono.training.state import LocalState, State
from unisono.training.step import Stepper


class WorkerGroup:
    """The workers of one generation, and what they compute with together.

    Args:
        local: What this worker trains with.
        settings: What steps are computed by.
        collective: The workers.
        session: How they do things together. Where workers may be lost, each host is to have all of the state.
        learned: What reductions of earlier groups have learned (see ``Reduction.state_dict``).

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
        local: LocalState,
        settings: Settings,
        collective: Collective,
        *,
        session: Session,
        learned: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        self.collective = collective
        self.reduction = local.sync.bind(
            local.layout,
            collective,
            settings.microbatches,
            sparse=local.replica.sparse,
            per_host=session.can_change,
            whole=not local.replica.updates_apart,
            clock=local.clock,
        )
        undivided = local.replica.has_modes or local.replica.updates_whole
        if undivided and not self.reduction.replicates and collective.size > 1:
            raise ConfigurationError(
                "Exact(shard_update=True), but the optimizer needs the state of all parameters on every worker (it has train() "
                "and eval(), or is not PyTorch's): leave shard_update away"
            )
        for one in learned:
            self.reduction.load_state_dict(one)
        self.stragglers = Stragglers(self.reduction.ranges, warn_about(session.watch.identity, main=collective.rank == 0))
        self.balance = Balance(self.reduction.ranges, host_sizes(collective))
        self.token = object()
        self.state = State(local=local, reduction=self.reduction, collective=collective)
        self.guard = ReplicaGuard(
            self.state.replicated,
            self.state.replicated_tensors,
            collective,
            settings.on_desync,
            settings.compare_every,
            Values(local.replica.groups, local.user.digest, local.user.named),
        )
        self.stepper = Stepper(
            local, settings, collective=collective, reduction=self.reduction, guard=self.guard, session=session
        )

    def reassign(self, batch: Batch) -> None:
        """*local*, alike on all workers. Takes over the ranges by which the batch is divided."""
        if batch.ranges and batch.ranges != self.reduction.ranges:
            self.reduction.reassign(batch.ranges)
            self.stragglers.reassign(batch.ranges)
