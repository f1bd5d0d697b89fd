"""One fork server serves all runs that need the same interpreter."""

from __future__ import annotations

import os
from pathlib import Path

from tests.verify.test_inquiry import PRELUDE
from unisono.verify.job import Change, Job
from unisono.verify.runs import Runs
from unisono.verify.servers import ForkServers


def test_one_environment_has_one_server(servers: ForkServers) -> None:
    environment = {"PYTHONHASHSEED": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "UNISONO_THREADS": "1"}
    assert servers.get(environment) is servers.get(dict(reversed(environment.items())))
    assert servers.get(environment).pid != os.getpid()


def test_neighbours_hash_strings_differently_unless_the_experiment_says_otherwise(tmp_path: Path, servers: ForkServers) -> None:
    script = tmp_path / "script.py"
    script.write_text("print(hash('a'))")
    with Runs(servers, str(script), [], steps=1, threads=1) as runs:
        apart, alike = runs.all([Job(workers=2), Job(workers=2, changes=frozenset({Change.SAME_HASH}))])
        hashes = [[(run.folder / f"output-{rank}.txt").read_text() for rank in range(2)] for run in (apart, alike)]
    assert hashes[0][0] != hashes[0][1]
    assert hashes[1][0] == hashes[1][1]


def test_a_script_beside_a_module_that_hides_an_imported_one_runs_in_a_new_interpreter(
    tmp_path: Path, servers: ForkServers
) -> None:
    (tmp_path / "queue.py").write_text("from pathlib import Path\nPath(__file__).with_name('hidden').touch()\nraise ImportError")
    script = tmp_path / "script.py"
    script.write_text(PRELUDE + "\nimport queue\n")
    with Runs(servers, str(script), [], steps=1, threads=1) as runs:
        failure = runs(Job()).failure
    assert failure is not None
    assert (tmp_path / "hidden").exists()
