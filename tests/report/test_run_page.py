from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.report.made_up import evaluations, manifest, write_run
from tests.report.test_page import Parsed
from unisono.report.run_data import RunReader
from unisono.report.run_page import run_page


@pytest.mark.parametrize(
    ("summary", "logged", "live", "headline"),
    [
        ({}, 0, True, "Nothing to see yet"),
        ({}, 7, True, "Training, step 7 of 28"),
        ({}, 7, False, "No end recorded, last at step 7 of 28"),
        ({"steps": 7, "finished": False, "workers": 2}, 7, False, "Stopped after step 7 of 28"),
        ({"steps": 7, "finished": True, "workers": 2}, 7, True, "Trained in unison on 2 workers"),
        ({"steps": 5, "finished": True, "workers": 2}, 7, True, "Training, step 7 of 28"),
    ],
)
def test_the_headline_says_how_far_the_run_is(
    tmp_path: Path, summary: dict[str, Any], logged: int, live: bool, headline: str
) -> None:
    if logged:
        write_run(tmp_path, steps=logged, ended=False, planned=28)
    if summary:
        (tmp_path / "summary.json").write_text(json.dumps(summary))
    page = run_page(RunReader(tmp_path).read(), live=live)
    assert headline in page.head
    assert page.ended == (summary.get("steps") == logged and bool(logged))


def test_a_run_under_way_shows_how_much_is_done_and_left_and_one_that_is_done_does_not(tmp_path: Path) -> None:
    open_run = RunReader(write_run(tmp_path / "open", steps=50, planned=200, ended=False)).read()
    assert open_run.seconds_left is not None
    assert open_run.seconds_left == pytest.approx(150 / 50 * open_run.elapsed_s[-1])
    text = Parsed(run_page(open_run, live=True).head).text
    assert re.search(r"25%, about 0:0\d left", text)
    assert 'style="width:25.0%"' in run_page(open_run, live=True).head
    assert "left" not in Parsed(run_page(open_run).head).text  # a report may be read years later
    longer = RunReader(write_run(tmp_path / "longer", steps=50, planned=40, ended=False)).read()
    assert "100%, about 0:00 left" in run_page(longer, live=True).head
    ended = RunReader(write_run(tmp_path / "ended", steps=50)).read()
    assert "progress" not in run_page(ended, live=True).head


def test_a_run_that_does_not_say_how_far_it_goes_has_no_bar(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", ended=False)
    for planned in (None, {}, {"steps": 0}, {"steps": "many"}, [60]):
        (folder / "manifest.json").write_text(json.dumps({**manifest(), "planned": planned}))
        head = run_page(RunReader(folder).read(), live=True).head
        assert "Training, step 60</p>" in head
        assert "progressbar" not in head


def test_evaluations_are_figures_over_steps_and_over_seconds(tmp_path: Path) -> None:
    extra = [*evaluations(20, 40, 60, accuracy=0.5, recall=0.1), *evaluations(60, once=0.3)]
    run = RunReader(write_run(tmp_path / "run", ended=False, extra=extra)).read()
    assert run.events == ()
    page = run_page(run, live=True)
    found = [section for section in page.sections if section.key.startswith("metric-")]
    assert [section.title for section in found] == [
        "accuracy: from 0.5000 to 0.6050",
        "recall: from 0.1000 to 0.1210",
    ]
    assert found[0].text == "Measured 3 times, after step 20 to 60."
    figure = found[0].figure
    assert figure is not None
    assert figure.data[0]["x"] == [20, 40, 60]
    assert figure.data[0]["y"] == [0.5, 0.55, 0.605]
    assert figure.seconds is not None
    assert figure.seconds["x"][0] == pytest.approx(run.elapsed_s[[19, 39, 59]], abs=1e-3)
    assert "<dt>once</dt><dd>0.3000" in page.head
