"""How replicas are kept together."""

from unisono.sync.base import Reduction, Sync
from unisono.sync.exact import Exact

__all__ = ["Exact", "Reduction", "Sync"]
