"""Nurseries that all tests share: importing PyTorch takes longer than most verifications."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from unisono.verify.nursery import Nurseries

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def nurseries() -> Iterator[Nurseries]:
    with Nurseries() as made:
        yield made
