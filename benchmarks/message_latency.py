"""What a small message between two workers of one host costs, over Gloo and over shared memory.

Twice: in a tight loop, and between bursts of computing, as in training. There Gloo's own thread has to get a busy core
before it can take a message::

    python benchmarks/message_latency.py
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from unisono.collective import Collective
from unisono.testing import run_workers
from unisono.testing.processes import Transport

ROUNDS, REPEATS = 9, 100


def measure(collective: Collective) -> dict[str, float]:
    """Median microseconds of a call; what stands after "+" is the time on top of computing alone."""
    message = torch.zeros(1000)
    expected = [[(1000, message.dtype, message.device)]] * collective.size
    square = torch.zeros(64, 64)

    def compute() -> None:
        for _ in range(40):
            square @ square

    def exchange() -> None:
        collective.exchange([[message]] * collective.size, expected)

    def both() -> None:
        compute()
        exchange()

    calls: dict[str, Callable[[], None]] = {"barrier": collective.barrier, "4 KB": exchange, "compute": compute, "both": both}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            collective.barrier()
            began = time.perf_counter()
            for _ in range(REPEATS):
                call()
            times[name].append(1e6 * (time.perf_counter() - began) / REPEATS)
    median = {name: statistics.median(seconds) for name, seconds in times.items()}
    return {
        "barrier": median["barrier"],
        "4 KB, tight loop": median["4 KB"],
        "4 KB, computing in between: +": median["both"] - median["compute"],
    }


def main() -> None:
    transports: list[Transport] = ["gloo", "shared memory"]
    for transport in transports:
        for name, microseconds in run_workers(2, measure, transport=transport)[0].items():
            print(f"{transport:14} {name:32} {microseconds:8.0f} us", flush=True)


if __name__ == "__main__":
    main()
