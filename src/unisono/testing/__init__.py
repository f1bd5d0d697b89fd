"""Helpers for testing training code: several workers in one process, or in processes of their own."""

from unisono.testing.processes import run_workers
from unisono.testing.threads import run_threads

__all__ = ["run_threads", "run_workers"]
