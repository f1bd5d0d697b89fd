"""What happens once, before the first step."""

from __future__ import annotations

import pytest

from unisono.errors import ConfigurationError
from unisono.training.setup import enter
from unisono.world import World


def test_a_second_trainer_neither_waits_for_workers_who_left_nor_sends_more_away(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "here"}
    for name, value in {**launched, "MASTER_PORT": "1", "UNISONO_LAUNCHED": "1", "UNISONO_WORKERS_DEFAULTED": "1"}.items():
        monkeypatch.setenv(name, value)
    assert enter(World.from_environment(), 2).size == 2
    second = World.from_environment()
    assert (second.size, second.local_size) == (2, 2)
    assert enter(second, 8).size == 2
    with pytest.raises(ConfigurationError, match="2 workers but only 1 microbatch"):
        enter(second, 1)
