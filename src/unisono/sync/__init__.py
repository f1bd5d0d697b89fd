"""How replicas are kept together."""

from unisono.sync.base import Reduced, Reduction, Sync
from unisono.sync.exact import Exact

__all__ = ["Exact", "Reduced", "Reduction", "Sync"]
