"""Faults to plant in tests."""

from __future__ import annotations

import torch
from torch import Tensor


def flip_bit(tensor: Tensor, element: int = 0, bit: int = 0) -> None:
    """*local*. Flips one bit in memory, as a cosmic ray would: neither version counters nor autograd notice.

    Args:
        tensor: Contiguous.
        element: Index into the flat tensor.
        bit: Of that element, from its lowest address on.
    """
    raw = tensor.detach().view(-1)[element : element + 1].view(torch.uint8)
    with torch.no_grad():
        raw[bit // 8] ^= 1 << bit % 8
