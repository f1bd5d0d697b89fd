"""What all tests share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from unisono.testing import Workers


@pytest.fixture(scope="session")
def run_workers() -> Iterator[Callable[..., list[Any]]]:
    """`unisono.testing.run_workers`, but PyTorch is imported once for all tests: it takes longer than most of them."""
    with Workers(preload=["pytest", "psutil"]) as workers:
        yield workers.run
