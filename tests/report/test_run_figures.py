from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.report.made_up import evaluations, manifest, write_run
from tests.report.test_attachments import PICTURES
from unisono.report.attachments import attach
from unisono.report.figure import Figure
from unisono.report.run_data import RunData, RunReader
from unisono.report.run_figures import Axis, gradient_figure, loss_figure, schedule_figure, throughput_figure, timeline_figure
from unisono.report.run_page import run_page
from unisono.report.series import Stretches, smoothed
from unisono.report.worker_times import all_reduce_bound, parameter_bytes, phase_totals, waiting_share, worker_times

CSS = (Path(__file__).parents[2] / "src/unisono/report/page.css").read_text()


def painted(value: Any) -> Any:
    """As the page's script does it: each colour must be one that the style sheet knows, in both themes."""
    if isinstance(value, str) and value.startswith("--"):
        assert len(re.findall(rf"{value}:", CSS)) == 2, value
        return "#123456"
    if isinstance(value, dict):
        return {key: painted(item) for key, item in value.items()}
    return [painted(item) for item in value] if isinstance(value, list) else value


def accepted_by_plotly(figure: Figure) -> None:
    import plotly.graph_objects as go

    drawn = painted(figure.as_json())
    json.dumps(drawn, allow_nan=False)
    go.Figure(data=drawn["data"], layout=drawn["layout"])
    if figure.seconds is not None:
        assert len(figure.seconds["x"]) == len(figure.data)
        go.Figure(layout=painted(figure.seconds["layout"]))
    for colour, _ in figure.legend():
        painted(colour)


@pytest.mark.parametrize("steps", [1, 5, 700])
@pytest.mark.parametrize("workers", [1, 3, 9])
def test_every_figure_of_a_run_is_one_that_plotly_accepts(tmp_path: Path, steps: int, workers: int) -> None:
    lost_at = 400 if steps > 400 and workers > 1 else None
    extra = evaluations(1, steps, accuracy=math.nan) + evaluations(1, 1, steps, steps + 1, error=2.0)
    page = run_page(RunReader(write_run(tmp_path / "run", steps=steps, workers=workers, lost_at=lost_at, extra=extra)).read())
    figures = [section.figure for section in page.sections if section.figure]
    assert len(figures) >= 6
    for figure in figures:
        accepted_by_plotly(figure)


@pytest.mark.parametrize("name", PICTURES)
def test_every_picture_of_an_application_is_one_that_plotly_accepts(tmp_path: Path, name: str) -> None:
    attach(tmp_path, name, PICTURES[name])
    section = next(one for one in run_page(RunReader(tmp_path).read()).sections if one.key == "picture-0")
    assert section.figure or section.body
    if section.figure:
        accepted_by_plotly(section.figure)


def test_a_figure_without_colours_of_the_theme_has_the_legend_that_plotly_draws() -> None:
    named = [{"name": "a", "line": {"color": "--blue"}}, {"name": "b", "marker": {"color": "--red"}}]
    ours = Figure(data=named, layout={})
    assert ours.legend() == [("--blue", "a"), ("--red", "b")]
    assert ours.as_json()["layout"] == {"showlegend": False}
    for colour in (None, "red", "--red);background:url(//evil)", 3):
        theirs = Figure(data=[named[0], {"name": "b", "marker": {"color": colour}}], layout={})
        assert theirs.legend() == []
        assert theirs.as_json()["layout"] == {}


def test_long_columns_become_means_of_stretches() -> None:
    stretches = Stretches.of(10, points=4)
    column = np.array([1.0, 2, 3, 4, np.nan, 6, np.inf, np.nan, np.nan, 10])
    assert (stretches.count, stretches.lines_each) == (4, 3)
    assert stretches.mean(column).tolist()[:2] == [2.0, 5.0]
    assert [stretches.low(column)[1], stretches.high(column)[1]] == [4.0, 6.0]
    assert np.isnan(stretches.mean(column)[2])
    assert stretches.last(column).tolist()[-1] == 10.0


def test_a_smoothed_line_neither_lags_nor_bends_at_its_ends() -> None:
    straight = np.linspace(0, 1, 301)
    assert np.abs(smoothed(straight)[20:-20] - straight[20:-20]).max() < 1e-12
    assert smoothed(np.array([1.0, np.nan, 1.0])).tolist() == pytest.approx([1.0, 1.0, 1.0])
    assert np.isnan(smoothed(np.full(5, np.nan))).all()


def test_steps_and_seconds_have_a_place_for_each_event(tmp_path: Path) -> None:
    run = RunReader(write_run(tmp_path / "run", steps=50, workers=3, lost_at=20)).read()
    figure = throughput_figure(run, Axis.of(run))
    (mark,) = figure.layout["shapes"]
    assert mark["x0"] == 20
    assert figure.seconds is not None
    (mark,) = figure.seconds["layout"]["shapes"]
    assert mark["x0"] == pytest.approx(run.elapsed_s[19], abs=1e-3)


def test_groups_with_one_learning_rate_share_a_line() -> None:
    columns = {"step": np.arange(1.0, 4), "lr": np.ones(3), "lr_1": np.full(3, 2.0), "lr_2": np.ones(3)}
    run = RunData(name="x", url="x", columns=columns)
    figure = schedule_figure(run, Axis.of(run))
    assert [label for _, label in figure.legend()] == ["group 0, 2", "group 1"]


def test_the_limit_of_clipping_is_drawn(tmp_path: Path) -> None:
    run = RunReader(write_run(tmp_path / "run", steps=5)).read()
    *_, limit = gradient_figure(run, Axis.of(run)).data
    assert (limit["name"], set(limit["y"])) == ("clipped to 1", {1.0})
    far = RunReader(write_run(tmp_path / "far", steps=5, settings={"max_grad_norm": 1e9})).read()
    assert [trace["name"] for trace in gradient_figure(far, Axis.of(far)).data] == ["norm"]


def test_a_loss_over_many_steps_shows_its_range(tmp_path: Path) -> None:
    run = RunReader(write_run(tmp_path / "run", steps=1500)).read()
    figure = loss_figure(run, Axis.of(run))
    low, high, mean, course = (np.array(trace["y"], dtype=float) for trace in figure.data)
    assert len(mean) == 500
    assert (low <= mean).all()
    assert (mean <= high).all()
    assert np.abs(np.diff(course)).mean() < np.abs(np.diff(mean)).mean()


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
