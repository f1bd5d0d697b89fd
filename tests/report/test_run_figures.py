from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.report.made_up import PICTURES, evaluations, write_run
from unisono.report.attachments import attach
from unisono.report.figure import Figure
from unisono.report.run_data import RunData, RunReader
from unisono.report.run_figures import Axis, gradient_figure, loss_figure, schedule_figure, throughput_figure
from unisono.report.run_page import run_page

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
