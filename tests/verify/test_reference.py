"""No false alarm: ordinary scripts are equal on every number of workers, and only rounding from a plain loop."""

from __future__ import annotations

from pathlib import Path

import pytest

from unisono.verify.inquiry import inquire
from unisono.verify.servers import ForkServers

ORDINARY = Path(__file__).parent / "ordinary"


# The others, and the demos, by tests/campaigns/verify_ordinary.py.
@pytest.mark.parametrize("name", ["conv", "encoder", "gpt2"])
def test_an_ordinary_script_is_equal(name: str, servers: ForkServers) -> None:
    report = inquire(str(ORDINARY / f"{name}.py"), workers=(3,), steps=3, servers=servers)
    assert (report.problem, report.verdict, report.causes) == ("", "equal", ())
    assert report.reference is not None
    assert report.reference.problem == ""
    # An estimate of rounding that is far too large would never raise an alarm.
    assert 0 < report.reference.rounding.largest("loss") < 1e-6
    assert report.reference.distance.largest("loss") < 1e-6
