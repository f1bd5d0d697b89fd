"""Random numbers that depend on what is computed, never on who computes it. Everything here is *local*."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch


def seed_generators(seed: int, device: torch.device | None = None) -> None:
    """Seeds the process-wide generators of torch (CPU, and ``device`` if it is a GPU), numpy and random.

    Args:
        seed: 64 bits.
        device: The device whose generator dropout and its like draw from.
    """
    # The generators' own methods: torch.manual_seed() costs 70 microseconds for looking after devices nobody uses.
    torch.default_generator.manual_seed(seed)
    if device is not None and device.type == "cuda":
        torch.cuda.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed & 0xFFFF_FFFF)


@contextlib.contextmanager
def kept_generators() -> Iterator[None]:
    """After the body the process-wide generators are as they were before it."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else []):
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
