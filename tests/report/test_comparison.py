from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.report.made_up import summary, write_run
from tests.report.test_page import Parsed
from tests.report.test_run_figures import accepted_by_plotly
from unisono.report.comparison import comparison_page
from unisono.report.page import report_html
from unisono.report.run_data import RunReader, run_names


def compared(*folders: Path) -> Parsed:
    names = run_names([str(folder) for folder in folders])
    page = comparison_page([RunReader(folder, name=name).read() for folder, name in zip(folders, names, strict=True)])
    for section in page.sections:
        if section.figure:
            accepted_by_plotly(section.figure)
    return Parsed(report_html(page))


def test_runs_with_one_digest_ended_with_the_same_weights(tmp_path: Path) -> None:
    text = compared(write_run(tmp_path / "on-2"), write_run(tmp_path / "on-3", workers=3)).text
    assert "All ended with the same weights, bit for bit" in text
    assert "Same settings, same fingerprint" in text


def test_the_step_is_named_at_which_losses_part(tmp_path: Path) -> None:
    one, other = write_run(tmp_path / "one"), write_run(tmp_path / "other")
    assert "The losses are the same to the last bit, over 60 steps" in compared(one, other).text
    log = [json.loads(line) for line in (other / "metrics.jsonl").read_text().splitlines()]
    log[20]["loss"] += 1e-15
    (other / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    (other / "summary.json").write_text(json.dumps(summary(60, weights_sha256="1" * 64, samples_per_second=500.0)))
    text = compared(one, other).text
    assert "The losses diverge at step 21" in text
    assert "2 different results" in text
    assert "one is the fastest: 2.10 times other" in text


def test_settings_that_differ_are_listed(tmp_path: Path) -> None:
    text = compared(write_run(tmp_path / "one"), write_run(tmp_path / "two", settings={"seed": 7, "batch_size": 128})).text
    assert "2 settings differ" in text
    assert "settings.batch_size" in text


@pytest.mark.parametrize("ended", [True, False])
def test_runs_that_have_not_ended_or_hold_nothing_are_shown_too(tmp_path: Path, ended: bool) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    report = compared(write_run(tmp_path / "one", steps=1, ended=ended), write_run(tmp_path / "two", ended=False), empty)
    assert "Not all of these runs have ended" in report.text
    assert f"{empty} holds no step." in report.text
