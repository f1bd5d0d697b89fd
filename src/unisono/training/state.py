"""What a run is between two steps: the model, the optimizer and its scheduler, as checkpoints and guards see them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from unisono.checkpoint.checkpoints import Checkpoint
from unisono.collective import Collective
from unisono.layout import Layout
from unisono.replica.optimizer import hyperparameters, owned_state, set_hyperparameters, set_state
from unisono.replica.weights import Weights
from unisono.sync import Reduction


@dataclasses.dataclass(frozen=True, kw_only=True)
class State:
    """The state of a run, as one worker holds it. Everything here is *local*."""

    model: nn.Module
    optimizer: Optimizer
    scheduler: Any
    layout: Layout
    weights: Weights
    reduction: Reduction
    collective: Collective

    def common(self) -> dict[str, Any]:
        """What all workers have alike and the model's state dict does not hold."""
        persistent = set(self.model.state_dict())
        return {
            "groups": hyperparameters(self.optimizer),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "dense": [self.layout.names[index] for index in sorted(self.reduction.densified)],
            "buffers": {name: buffer for name, buffer in self.model.named_buffers() if name not in persistent},
        }

    def own(self) -> dict[str, Any]:
        """The part that this worker saves: the optimizer's state of the parameters that it owns, by name."""
        return owned_state(self.optimizer, self.layout, self.reduction.owned_by(self.collective.rank))

    def restore(self, checkpoint: Checkpoint) -> None:
        """Takes everything from a checkpoint, whatever the number of workers that wrote it."""
        self.model.load_state_dict(checkpoint.tensors("model"))
        common = checkpoint.part("trainer")
        with torch.no_grad():
            for name, buffer in self.model.named_buffers():
                if name in common["buffers"]:
                    buffer.copy_(common["buffers"][name])
        dense = common.get("dense", ())
        self.reduction.densify({index for index, name in enumerate(self.layout.names) if name in dense})
        set_hyperparameters(self.optimizer, common["groups"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(common["scheduler"])
        state: dict[str, Any] = {}
        for name in checkpoint.part_names("optimizer-"):
            state.update(checkpoint.part(name)["state"])
        set_state(self.optimizer, self.layout, state, self.reduction.updated_by(self.collective.rank))

    def replicated(self) -> Iterator[tuple[str, Tensor]]:
        """What all workers hold alike, each in memory of its own, by name for a person."""
        if self._own_weights:
            yield from self.weights.named()
        for name, buffer in self.model.named_buffers():
            yield f"buffer {name!r}", buffer
        for slot, key, value in self._replicated_state():
            yield f"{key!r} of the optimizer for {self.layout.names[slot]!r}", value

    def replicated_tensors(self) -> list[Tensor]:
        """The same in the same order, weights as they lie in memory: to look at it costs by the number of tensors."""
        state = [value for _, _, value in self._replicated_state()]
        return [*(self.weights.flats if self._own_weights else ()), *self.model.buffers(), *state]

    @property
    def _own_weights(self) -> bool:
        """Shared weights are one copy a host: there is something to compare between hosts only."""
        return not self.weights.shared or len(self.collective.hosts) > 1

    def _replicated_state(self) -> Iterator[tuple[int, str, Tensor]]:
        if self.reduction.replicated:
            for slot in self.reduction.updated_by(self.collective.rank):
                for key, value in sorted(self.optimizer.state.get(self.layout.parameters[slot], {}).items()):
                    if isinstance(value, Tensor):
                        yield slot, key, value
