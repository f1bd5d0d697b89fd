"""What all tests share."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch

from tests.launch.warm import warm_parent
from tests.memory import empty_memory
from unisono.system.fork_server import ForkServer, is_possible
from unisono.testing import Workers

# A shell ignores Ctrl-C for what it starts in the background, and so would everything that the tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# What the tests compute is too small to be shared out: a second thread would wait for the first, and keep its core busy.
torch.set_num_threads(1)

# How long one example takes depends on what else the machine does. Each test has its time limit.
hypothesis.settings.register_profile("without a deadline for each example", deadline=None)
hypothesis.settings.load_profile("without a deadline for each example")


@pytest.fixture(scope="session")
def run_workers() -> Iterator[Callable[..., list[Any]]]:
    """`unisono.testing.run_workers`, but PyTorch is imported once for all tests: it takes longer than most of them."""
    with Workers(preload=["pytest", "psutil"]) as workers:
        yield workers.run


@pytest.fixture(scope="session")
def warm_commands() -> Iterator[ForkServer | None]:
    """From what `unisono` commands are forked, for the same reason; None where that is impossible."""
    with warm_parent() if is_possible() else contextlib.nullcontext() as source:
        yield source


@pytest.fixture(autouse=True)
def an_empty_memory() -> Iterator[None]:
    """For each test."""
    yield
    empty_memory()


# ---- tests that need the machine for themselves, where pytest-xdist runs several at a time ----


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[Any]:
    """Waits before the time limit of the test begins."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return (yield)
    with _place_on_the_machine(alone=item.get_closest_marker("alone") is not None):
        return (yield)


@contextlib.contextmanager
def _place_on_the_machine(*, alone: bool) -> Iterator[None]:
    """Beside other tests, or alone. While one waits to be alone, no other begins."""
    with contextlib.ExitStack() as files:
        queue, machine = (os.open(path, os.O_RDONLY) for path in (Path(__file__), Path(__file__).parent))
        for descriptor in (queue, machine):
            files.callback(os.close, descriptor)
        fcntl.flock(queue, fcntl.LOCK_EX)
        fcntl.flock(machine, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(queue, fcntl.LOCK_UN)
        # Closing would not do: a process that the test has forked may live on with the same open file.
        files.callback(fcntl.flock, machine, fcntl.LOCK_UN)
        yield
