"""Ten faults of all kinds, as in the campaign (``tests/campaigns/chaos.py``), which goes on for as long as anyone likes; and a
link between two hosts that fails for a moment."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from benchmarks.virtual_hosts import NoNamespaces
from tests.campaigns import chaos, chaos_hosts
from tests.campaigns.chaos_faults import TO_WORKERS, Fault

SEED = 4
KIND = "owners"


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digest of the undisturbed run."""
    return chaos.undisturbed(tmp_path_factory.mktemp("alone"), KIND)


def test_whatever_happens_to_the_workers_the_weights_are_those_of_an_undisturbed_run(tmp_path: Path, expected: str) -> None:
    rng = random.Random(SEED)
    faults = 0
    while faults < 10:
        folder = tmp_path / f"after {faults}"
        folder.mkdir()
        outcome = chaos.one_run(1, folder, expected, rng, most=10 - faults, kind=KIND, faults=TO_WORKERS)
        assert not outcome.problems, outcome.row()
        faults += len(outcome.faults)


def test_a_link_that_fails_for_a_moment_between_two_hosts_changes_no_bit(tmp_path: Path, expected: str) -> None:
    try:
        outcome = chaos_hosts.one_run(
            1, tmp_path, expected, random.Random(SEED), most=1, kind=KIND, faults=[Fault.LINK_SHORT], steps=chaos.STEPS
        )
    except NoNamespaces as reason:
        pytest.skip(str(reason))
    assert not outcome.problems, outcome.row()
    assert outcome.faults == [Fault.LINK_SHORT]
