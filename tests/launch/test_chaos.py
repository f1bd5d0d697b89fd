"""Ten faults of all kinds, as in the campaign (``tests/campaigns/chaos.py``), which goes on for as long as anyone likes."""

from __future__ import annotations

import random
from pathlib import Path

from tests.campaigns import chaos

SEED = 4


def test_whatever_happens_to_the_workers_the_weights_are_those_of_an_undisturbed_run(tmp_path: Path) -> None:
    rng = random.Random(SEED)
    (tmp_path / "alone").mkdir()
    expected = chaos.undisturbed(tmp_path / "alone", "owners")
    faults = 0
    while faults < 10:
        folder = tmp_path / f"after {faults}"
        folder.mkdir()
        outcome = chaos.one_run(1, folder, expected, rng, most=10 - faults, kind="owners", faults=list(chaos.Fault))
        assert not outcome.problems, outcome.row()
        faults += len(outcome.faults)
