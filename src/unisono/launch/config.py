"""What to run, and how: the options of `unisono run`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from unisono.replica.framework_threads import thread_environment


@dataclass(frozen=True, kw_only=True)
class LaunchConfig:
    """What one launcher is to run on its host."""

    script: str
    """Path of the script."""
    args: Sequence[str] = ()
    """Its arguments."""
    workers: int
    """How many workers."""
    workers_defaulted: bool
    """Whether that number is a default, so that the Trainer may use fewer."""
    threads: int
    """Threads per worker."""
    grace_s: float
    """How long workers may take to save their work and exit after a stop, in seconds."""
    minimum: int = 1
    """Smallest world size with which training goes on when workers are lost."""
    max_restarts: int = 3
    """How often in the whole run a worker is replaced, or all start again from a checkpoint."""
    wait_s: float = 300.0
    """How long to wait for missing workers (fewer than the minimum) or hosts, in seconds."""
    meet: tuple[str, int] | None = None
    """Host and port of the rendezvous of several hosts; None if there is only this one."""
    hosts: int = 1
    """Number of hosts that begin the run together."""

    @property
    def environment(self) -> dict[str, str]:
        """Variables for every worker, and for the process from which they are forked."""
        return {
            "UNISONO_LAUNCHED": "1",
            "UNISONO_WORKERS_DEFAULTED": "1" if self.workers_defaulted else "0",
            "UNISONO_THREADS": str(self.threads),
            "OMP_NUM_THREADS": str(self.threads),
            "MKL_NUM_THREADS": str(self.threads),
            **thread_environment(self.threads),
            "UNISONO_MINIMUM": str(self.minimum),
            "UNISONO_WAIT": str(self.wait_s),
            "PYTHONUNBUFFERED": "1",  # what a worker said before it was killed is in its log
        }
