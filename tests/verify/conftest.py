"""Fork servers that all tests share: importing PyTorch takes longer than most verifications."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from unisono.verify.servers import ForkServers


@pytest.fixture(scope="session")
def servers() -> Iterator[ForkServers]:
    with ForkServers() as made:
        yield made
