"""How a worker waits for its GPU where others may be lost meanwhile. The kernels here are made up; the workers are real."""

from __future__ import annotations

import functools
import time

import pytest
import torch

from unisono.collective import Collective, LostWorker
from unisono.collective.torch_distributed import TorchDistributed
from unisono.testing.processes import run_workers


class Kernel:
    """What torch.distributed has begun on a device.

    Args:
        looks: After how many looks it is done.
    """

    def __init__(self, looks: int) -> None:
        self.looks = looks
        self.waits = 0

    def is_completed(self) -> bool:
        self.looks -= 1
        return self.looks < 0

    def wait(self) -> None:
        self.waits += 1


def waits(collective: Collective, looks: int, *, lost: bool = False, timeout_s: float = 20.0) -> tuple[str, int, float]:
    """What was raised, how often the device was told to wait, and how long that took."""
    assert isinstance(collective, TorchDistributed)
    assert collective.size == 2
    began_s = time.monotonic()

    def check() -> None:
        if lost and time.monotonic() - began_s > 0.05:
            raise LostWorker("worker 1 was lost")

    met = TorchDistributed(timeout_s=timeout_s, check=check)
    kernel = Kernel(looks)
    try:
        met.finish([(kernel, None)])
    except LostWorker as error:
        return str(error), kernel.waits, time.monotonic() - began_s
    return "", kernel.waits, time.monotonic() - began_s


def test_a_device_that_ends_is_waited_for_by_the_device() -> None:
    assert [found[:2] for found in run_workers(2, waits, 40)] == [("", 1), ("", 1)]


def test_a_worker_that_is_lost_ends_the_wait_for_a_kernel_that_never_ends() -> None:
    for error, told, seconds in run_workers(2, functools.partial(waits, lost=True), 10**9):
        assert (error, told) == ("worker 1 was lost", 0)
        assert seconds < 5


def test_a_kernel_that_never_ends_is_given_up() -> None:
    for error, told, _ in run_workers(2, functools.partial(waits, timeout_s=0.2), 10**9):
        assert "waited 0.2 s for another worker's GPU, which did not answer" in error
        assert told == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_one_worker_meets_itself_over_nccl_and_leaves_while_a_kernel_runs() -> None:
    device = torch.device("cuda", 0)
    for number in range(2):
        store = torch.distributed.HashStore()
        met = TorchDistributed.meet(0, 1, torch.distributed.PrefixStore(str(number), store), device=device, check=lambda: None)
        tensor = torch.ones(8, device=device)
        met.broadcast(tensor)
        torch.cuda._sleep(10**8)
        met.close()
        assert not torch.distributed.is_initialized()
