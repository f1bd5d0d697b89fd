"""Real runs under random stops end as if nothing had happened; ``tests/campaigns/stops.py`` makes as many as one likes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.campaigns.stops import Campaign, Kind


@pytest.mark.timeout(300)
def test_five_random_stops_of_every_kind_change_no_bit(tmp_path: Path) -> None:
    report = Campaign(tmp_path, stops=5, seed=0).run()
    assert report.problems == []
    assert set(report.stops) == set(Kind)
    assert str(report).startswith("5 stops (")
    assert str(report).endswith("all digests equal")
