"""How many threads TensorFlow and XLA compute with. Both read it from the environment, when their first operation runs."""

from __future__ import annotations

import os
from collections.abc import Mapping


def thread_environment(threads: int) -> dict[str, str]:
    """*local*. The variables with which a process must start so that frameworks compute with so many threads."""
    count = str(threads)
    # NPROC is what XLA takes for the number of cores, by which it splits sums.
    return {"TF_NUM_INTRAOP_THREADS": count, "TF_NUM_INTEROP_THREADS": count, "NPROC": count}


def intra_op_threads(env: Mapping[str, str]) -> int:
    """*local*. Threads of one TensorFlow operation in a process that has started with ``env``."""
    return _number(env, "TF_NUM_INTRAOP_THREADS")


def xla_threads(env: Mapping[str, str]) -> int:
    """*local*. Threads among which XLA divides an operation in a process that has started with ``env``."""
    return _number(env, "NPROC")


def _number(env: Mapping[str, str], name: str) -> int:
    text = env.get(name, "")
    return int(text) if text.isdigit() and int(text) else len(os.sched_getaffinity(0))
