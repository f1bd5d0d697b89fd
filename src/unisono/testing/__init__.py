"""Helpers for testing training code: several workers in one process, or in processes of their own; and faults to plant."""

from unisono.testing.faults import flip_bit
from unisono.testing.processes import Workers, run_workers
from unisono.testing.threads import run_threads

__all__ = ["Workers", "flip_bit", "run_threads", "run_workers"]
