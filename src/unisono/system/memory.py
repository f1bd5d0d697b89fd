"""Memory that is used again, step after step. *Local.*"""

from __future__ import annotations

import contextlib
import ctypes
import resource
import sys

from unisono.system import cgroups

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_LARGE = 2**30


def peak_memory_bytes() -> int:
    """The most memory that this process has had resident at once, pages that it shares with others among it."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def free_memory_bytes() -> int:
    """What this process and others may still take, within the limits of their control group."""
    import psutil  # takes a hundredth of a second

    free: int = psutil.virtual_memory().available
    left = cgroups.memory()[1]
    return free if left is None else min(free, left)


def give_back_freed_memory() -> None:
    """Gives what has been freed so far back to the kernel: after a change of what is held, not in every step."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


def keep_freed_memory() -> None:
    """Lets glibc's malloc keep what is freed, instead of giving it back to the kernel and asking for it again.

    By default it does so with every tensor above a few MiB. Each step then pays a page fault for every 4 KiB of its gradients
    and activations, and the zeroing of that memory: of a step of the wide MLP in ``benchmarks/``, a sixth. What a process holds
    is its peak either way. Where the allocator is another one nothing happens.
    """
    if sys.platform != "linux":
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(_M_MMAP_THRESHOLD, _LARGE)
    mallopt(_M_TRIM_THRESHOLD, _LARGE)
