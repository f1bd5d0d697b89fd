"""ForkServers that all tests share: importing PyTorch takes longer than most verifications."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from unisono.verify.servers import ForkServers

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def servers() -> Iterator[ForkServers]:
    with ForkServers() as made:
        yield made
