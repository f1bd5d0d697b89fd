"""Whether user code exchanges values with other workers itself. *Local.*"""

from __future__ import annotations

import torch.distributed as dist

from unisono.errors import ConfigurationError


class Talk:
    """Whether user code exchanges values with other workers in a process group, which their number then decides about."""

    def __init__(self) -> None:
        self._number = _operations()

    def check(self) -> None:
        """Raises:
        ConfigurationError: It has, since this object was made.
        """
        if _operations() != self._number:
            raise ConfigurationError(
                "the model or the loss exchanges values with the other workers (torch.distributed.all_reduce or the like), so "
                "they depend on the number of workers. Leave it out: the losses, gradients and metrics that the trainer reports "
                "are those of all workers"
            )


def _operations() -> int:
    """Collective operations of the default process group so far; unisono's own messages are none."""
    if not dist.is_available() or not dist.is_initialized() or dist.group.WORLD is None:
        return 0
    try:
        return int(dist.group.WORLD._get_sequence_number_for_group())  # type: ignore[attr-defined]
    except RuntimeError:  # not every backend counts
        return 0
