"""How workers talk to each other: one narrow interface, several transports."""

from unisono.collective.base import Collective, Expected, LostWorker, Pending
from unisono.collective.inprocess import InProcess, Meeting

__all__ = ["Collective", "Expected", "InProcess", "LostWorker", "Meeting", "Pending"]
