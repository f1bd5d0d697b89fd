"""What a worker has in place of the others until it has joined them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

from torch import Tensor

from unisono.collective import Collective, Expected
from unisono.errors import ConfigurationError


class Outsider(Collective):
    """The collective of a worker that has yet to join: it is not rank 0, so that it speaks for nobody, and reaches no one."""

    rank = 1
    size = 2

    def start_exchange(
        self, outgoing: Sequence[Sequence[Tensor]], incoming: Sequence[Sequence[Expected]], *, name: str = "exchange"
    ) -> NoReturn:
        self._refuse()

    def publish(self, flat: Tensor, bounds: Sequence[tuple[int, int]]) -> None:
        self._refuse()

    def broadcast(self, tensor: Tensor, source: int = 0) -> None:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise ConfigurationError(
            "this worker joins a run that is under way, and runs the script up to the loop in which the others are. Until then "
            "it cannot communicate: use trainer.collective inside the loop over batches or in callbacks, not before"
        )
