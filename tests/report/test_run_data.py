from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from tests.report.made_up import write_run
from unisono.report.run_data import RunReader, run_names

HUGE = f'{{"step": {10**400}, "loss": 1}}'


def append(folder: Path, text: str) -> None:
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(text)


def line(step: int, loss: float | str = 1.0) -> str:
    return json.dumps({"step": step, "loss": loss, "step_s": 0.5}) + "\n"


def test_a_log_becomes_columns_with_nan_where_a_line_says_nothing(tmp_path: Path) -> None:
    run = RunReader(write_run(tmp_path / "one", steps=6)).read()
    assert run.steps.tolist() == [1, 2, 3, 4, 5, 6]
    known = np.isfinite(run.column("compute_s_1"))
    assert known.tolist() == [False, False, True, False, False, True]
    assert np.isnan(run.column("no such column")).all()
    assert run.troubles == ()


def test_lines_with_an_event_are_no_steps(tmp_path: Path) -> None:
    run = RunReader(write_run(tmp_path / "one", steps=6, workers=3, lost_at=4)).read()
    assert len(run.steps) == 6
    (event,) = run.events
    assert (event.step, event.kind, event.workers) == (4, "generation", 2)
    assert event.text == "2 workers from here on: worker 2 (pid 4711) was killed by SIGKILL"


def test_an_event_of_an_unknown_kind_is_told_by_its_fields(tmp_path: Path) -> None:
    extra = [{"step": 3, "event": "straggler", "worker": 1, "slowness": 1.4}, {"step": 4, "event": "rain"}]
    run = RunReader(write_run(tmp_path / "one", steps=6, extra=extra)).read()
    assert [event.text for event in run.events] == ["worker 1, slowness 1.4", "rain"]


def test_a_new_start_is_an_event(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "one", steps=6)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "resumed_from_step": 3, "workers": 4}))
    (event,) = RunReader(folder).read().events
    assert (event.step, event.text) == (3, "started again on 4 workers from the checkpoint of step 3")


def test_numbers_that_json_does_not_have_come_back(tmp_path: Path) -> None:
    append(tmp_path, line(1, "nan") + line(2, "inf"))
    assert [str(value) for value in RunReader(tmp_path).read().column("loss")] == ["nan", "inf"]


def test_a_growing_log_is_read_on_where_it_was_left(tmp_path: Path) -> None:
    reader = RunReader(tmp_path)
    assert reader.read().steps.tolist() == []
    append(tmp_path, line(1) + line(2)[:9])
    assert reader.read().steps.tolist() == [1]
    append(tmp_path, line(2)[9:] + line(3))
    run = reader.read()
    assert run.steps.tolist() == [1, 2, 3]
    assert run.elapsed_s.tolist() == [0.5, 1.0, 1.5]
    assert run.troubles == ()


def test_what_was_read_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    append(tmp_path, "".join(map(line, range(1, 200))))
    reader = RunReader(tmp_path)
    reader.read()
    append(tmp_path, line(200))
    sizes = []
    from unisono.report import run_data

    original = run_data._read_from
    monkeypatch.setattr(run_data, "_read_from", lambda *given: sizes.append(len(found := original(*given))) or found)
    assert len(reader.read().steps) == 200
    assert sum(sizes) < 400


def test_a_log_that_was_cut_or_begun_anew_is_read_again(tmp_path: Path) -> None:
    reader = RunReader(tmp_path)
    append(tmp_path, line(1) + line(2) + line(3))
    reader.read()
    (tmp_path / "metrics.jsonl").write_text(line(1) + line(2, 9.0))
    assert reader.read().column("loss").tolist() == [1.0, 9.0]
    (tmp_path / "metrics.jsonl").write_text("".join(line(step, 4.0) for step in range(1, 9)))
    assert reader.read().column("loss").tolist() == [4.0] * 8
    (tmp_path / "metrics.jsonl").unlink()
    assert reader.read().steps.tolist() == []


@pytest.mark.parametrize(
    "damage", ["{", "7", "[]", '{"step": "3"}', '{"loss": 2}', "\x00\x00", '{"step": true}', "[" * 100_000, HUGE]
)
def test_damaged_lines_are_counted_and_left_out(tmp_path: Path, damage: str) -> None:
    append(tmp_path, line(1) + damage + "\n" + line(2))
    run = RunReader(tmp_path).read()
    assert run.steps.tolist() == [1, 2]
    assert run.troubles == ("metrics.jsonl: 1 line is damaged and left out.",)


def test_a_number_that_no_float_holds_is_infinite(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "one", steps=3)
    (folder / "summary.json").write_text(json.dumps({"steps": 3, "seconds": 10**400, "workers": -(10**400)}))
    append(folder, f'{{"step": 4, "loss": {10**400}}}\n')
    run = RunReader(folder).read()
    assert (run.summary["seconds"], run.workers, run.column("loss")[-1]) == (math.inf, 2, math.inf)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "one", steps=3)
    (folder / "summary.json").write_text('{"steps": 3')
    (folder / "manifest.json").write_text("[1]")
    (folder / "report.json").write_text("{}")
    run = RunReader(folder).read()
    assert [text.partition(" ")[0] for text in run.troubles] == ["summary.json", "manifest.json", "report.json"]
    assert (run.summary, run.settings, run.fingerprint, run.workers, run.has_ended) == ({}, {}, {}, 0, False)


def test_a_run_that_went_on_after_its_summary_has_not_ended(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "one", steps=3)
    reader = RunReader(folder)
    assert reader.read().has_ended
    append(folder, line(4))
    assert not reader.read().has_ended


def test_lists_of_the_summary_that_are_no_numbers_are_left_out(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "one", steps=3)
    (folder / "summary.json").write_text(json.dumps({"steps": 3, "compute_s": [1, "x"], "data_s": 4, "waiting_s": [1, 2.5]}))
    run = RunReader(folder).read()
    assert [run.per_worker(name) for name in ("compute_s", "data_s", "waiting_s", "none")] == [[], [], [1.0, 2.5], []]
    assert math.isnan(run.column("lr_7")[0])


def test_names_are_as_short_as_they_can_be_and_differ() -> None:
    assert run_names(["runs/a", "runs/b"]) == ["a", "b"]
    assert run_names(["x/run", "y/run", "y/other"]) == ["x/run", "y/run", "y/other"]
    assert run_names(["s3://bucket/a", "a"])[0] == "bucket/a"
    assert run_names(["runs/a", "runs/a"]) == ["a (1)", "a (2)"]
