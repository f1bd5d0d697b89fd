"""Exit statuses by which a worker tells the launcher how it ended, beside 0 (done, or left as it was told to)."""

from __future__ import annotations

import signal

from unisono.system.signals import RESTART

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
"""What asks a run to stop."""

STOP_CODES = frozenset(128 + signum for signum in STOP_SIGNALS)
"""The worker stopped because a signal asked it to."""

__all__ = ["RESTART", "STOP_CODES", "STOP_SIGNALS"]
