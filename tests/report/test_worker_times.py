from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.report.made_up import manifest, write_run
from unisono.report.run_data import RunData, RunReader
from unisono.report.run_figures import Axis, timeline_figure
from unisono.report.worker_times import all_reduce_bound, parameter_bytes, phase_totals, waiting_share, worker_times


def test_a_workers_block_average_counts_for_all_steps_of_its_block(tmp_path: Path) -> None:
    run = RunReader(write_run(tmp_path / "run", steps=7, workers=2)).read()
    logged = run.column("compute_s_1")
    mine = worker_times(run)[1]["compute"]
    assert mine[:3].tolist() == [logged[2]] * 3
    assert mine[3:6].tolist() == [logged[5]] * 3
    assert mine[6] == logged[5]


@pytest.mark.parametrize("workers", [2, 3])  # of two, the one that is left logs no more blocks
def test_a_worker_that_has_left_takes_no_more_time(tmp_path: Path, workers: int) -> None:
    run = RunReader(write_run(tmp_path / "run", steps=30, workers=workers, lost_at=12)).read()
    *others, gone_times = worker_times(run)
    assert np.isfinite(gone_times["compute"]).tolist() == [step <= 12 for step in range(1, 31)]
    assert all(np.isfinite(times["compute"]).all() for times in others)
    figure = timeline_figure(run, Axis.of(run))
    gone = next(trace for trace in figure.data if f"{workers - 1} compute" in trace["hovertemplate"])
    assert [value > 0 for value in gone["y"]] == [step <= 12 for step in range(1, 31)]


def test_shares_come_from_the_summary_and_from_the_log_while_there_is_none(tmp_path: Path) -> None:
    ended = RunReader(write_run(tmp_path / "ended", steps=10)).read()
    assert phase_totals(ended)["compute"] == [0.3, 0.3]
    assert waiting_share(ended) == pytest.approx(0.12)
    training = RunReader(write_run(tmp_path / "training", steps=10, ended=False)).read()
    assert phase_totals(training)["compute"][0] == pytest.approx(training.column("compute_s").sum())
    assert waiting_share(RunData(name="x", url="x")) is None


def test_the_all_reduce_bound_counts_every_parameter_in_its_own_width() -> None:
    def run(workers: int, **parameters: str) -> RunData:
        return RunData(name="x", url="x", manifest=manifest(workers=workers, parameters=parameters))

    sizes = {"a": "float32[3, 5]", "b": "bfloat16[4]", "c": "float64[]"}
    assert parameter_bytes(run(2, **sizes)) == 60 + 8 + 8
    assert all_reduce_bound(run(4, **sizes)) == 1.5 * 76
    assert all_reduce_bound(run(1, **sizes)) == 0
    assert parameter_bytes(run(2, a="complex64[3]")) is None
    assert all_reduce_bound(RunData(name="x", url="x")) is None
