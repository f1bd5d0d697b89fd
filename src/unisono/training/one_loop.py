"""One loop over batches at a time. *Local.*

Stops, checkpoints and the steps that workers repeat belong to one trainer. Of two that take steps in turn, one would be a step
ahead of the other at each of these.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from unisono.errors import ConfigurationError

_open = threading.local()  # workers may be threads


@contextlib.contextmanager
def only_loop() -> Iterator[None]:
    """Around a loop over batches.

    Raises:
        ConfigurationError: This thread is in another one.
    """
    loops: list[object] = vars(_open).setdefault("loops", [])
    if loops:
        raise ConfigurationError(
            "a Trainer begins to train while another loop over batches is under way, so a stop, a checkpoint or the loss of a "
            "worker would find the two at different steps. Train models that take turns (a GAN) as one model with one Trainer: "
            'see "Several losses, GANs" in docs/guide.md. Or end the other loop first (close() an iterator that you have kept)'
        )
    token = object()
    loops.append(token)
    try:
        yield
    finally:
        loops.remove(token)
