"""Each demo on data cut down to a second: one digest on any number of workers, results beside baselines, predictions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.demos import small
from unisono.checkpoint.store import Store
from unisono.demos import forecast
from unisono.demos._tables import Table
from unisono.errors import ConfigurationError, DataError
from unisono.observe.attachments import read_attachments

DATA: dict[str, Callable[[Path], Path]] = {
    "vision": small.clothes,
    "language": small.text,
    "recommendation": small.ratings,
    "fraud": small.payments,
    "forecast": small.flights,
}
SHORT = {
    "vision": ["--epochs", "2", "--batch-size", "50"],
    "language": ["--epochs", "1", "--batch-size", "16", "--preset", "nanogpt"],
    "recommendation": ["--epochs", "2", "--batch-size", "100"],
    "fraud": ["--epochs", "2", "--batch-size", "100"],
    "forecast": ["--epochs", "2", "--batch-size", "100"],
}
FILES = {"vision": "clothes", "language": "text.txt", "recommendation": "ratings.csv", "fraud": "pay.csv", "forecast": "fly.csv"}


def digest(run_dir: Path) -> str:
    found = hashlib.sha256((run_dir / "model.safetensors").read_bytes()).hexdigest()
    assert json.loads((run_dir / "summary.json").read_text())["weights_sha256"] == found
    return found


@pytest.mark.parametrize("name", DATA)
def test_a_demo_has_one_digest_on_1_2_and_3_workers_and_reports_beside_baselines(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = DATA[name](tmp_path / FILES[name])
    digests = set()
    for workers in (1, 2, 3):
        run_dir = tmp_path / str(workers)
        small.run_demo(name, ["--data", str(data), "--run-dir", str(run_dir), *SHORT[name]], workers, monkeypatch)
        assert json.loads((run_dir / "summary.json").read_text())["workers"] == workers
        digests.add(digest(run_dir))
    assert len(digests) == 1
    shown = capsys.readouterr().out
    assert shown.count("this run") >= 3
    pictures = read_attachments(Store(tmp_path / "3"))
    assert [type(one.picture).__name__ for one in pictures].count("Comparison") >= 1
    assert len(pictures) >= 2


def trained(name: str, tmp_path: Path, patch: pytest.MonkeyPatch) -> list[str]:
    """Trains briefly; the options that a prediction needs."""
    data = DATA[name](tmp_path / FILES[name])
    small.run_demo(name, ["--data", str(data), "--run-dir", str(tmp_path / "run"), *SHORT[name]], 1, patch)
    return ["--data", str(data), "--run-dir", str(tmp_path / "run"), "--predict"]


def test_an_image_file_is_classified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    options = trained("vision", tmp_path, monkeypatch)
    picture = np.full((60, 60, 3), 255, dtype=np.uint8)
    picture[20:40, 20:40] = 30
    Image.fromarray(picture).save(tmp_path / "bag.png")
    capsys.readouterr()
    small.run_demo("vision", [*options, str(tmp_path / "bag.png")], 1, monkeypatch)
    shares = [float(line.split()[-1].rstrip("%")) for line in capsys.readouterr().out.splitlines()]
    assert len(shares) == 3
    assert shares == sorted(shares, reverse=True)
    (tmp_path / "no.png").write_text("not an image")
    with pytest.raises(DataError, match=r"no\.png is no image"):
        small.run_demo("vision", [*options, str(tmp_path / "no.png")], 1, monkeypatch)


def test_a_text_is_continued_in_its_own_letters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = trained("language", tmp_path, monkeypatch)
    capsys.readouterr()
    small.run_demo("language", [*options, "the small cat"], 1, monkeypatch)
    written = capsys.readouterr().out.rstrip("\n")
    assert written.startswith("the small cat")
    assert len(written) > 400
    with pytest.raises(ConfigurationError, match="never seen 'Ж'"):
        small.run_demo("language", [*options, "Ж"], 1, monkeypatch)


def test_a_user_gets_films_that_he_has_not_rated_and_an_unknown_user_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = trained("recommendation", tmp_path, monkeypatch)
    capsys.readouterr()
    small.run_demo("recommendation", [*options, "u7"], 1, monkeypatch)
    lines = capsys.readouterr().out.splitlines()
    assert 1 <= len(lines) <= 10
    assert all(line[5:].startswith("Film ") for line in lines)
    with pytest.raises(ConfigurationError, match="no user 'u99' among the 30 users"):
        small.run_demo("recommendation", [*options, "u99"], 1, monkeypatch)


def test_payments_are_scored_row_by_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = trained("fraud", tmp_path, monkeypatch)
    (tmp_path / "new.csv").write_text("country,amount\nnear,50\nfar,140\nelsewhere,\n")
    capsys.readouterr()
    small.run_demo("fraud", [*options, str(tmp_path / "new.csv")], 1, monkeypatch)
    head, *scores = capsys.readouterr().out.splitlines()
    assert head == "score"
    assert len(scores) == 3
    assert float(scores[0]) < float(scores[1])
    (tmp_path / "new.csv").write_text("country\nnear\n")
    with pytest.raises(DataError, match="has no column 'amount'; there are: country"):
        small.run_demo("fraud", [*options, str(tmp_path / "new.csv")], 1, monkeypatch)


def test_flights_that_have_not_landed_are_forecast_with_an_interval(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = trained("forecast", tmp_path, monkeypatch)
    new = small.flights(tmp_path / "new.csv", with_result=False)
    capsys.readouterr()
    small.run_demo("forecast", [*options, str(new)], 1, monkeypatch)
    head, *lines = capsys.readouterr().out.splitlines()
    assert head == "low,median,high"
    quantiles = np.array([[float(value) for value in line.split(",")] for line in lines])
    assert quantiles.shape == (400, 3)
    assert (np.diff(quantiles, axis=1) >= 0).all()


def test_flights_are_tested_on_whole_days_or_on_the_last_fifth_in_time() -> None:
    days = np.array([40, 1, 2, 3, 40, 41, 4, 5, 6, 9])
    table = Table("flights", {"x": np.arange(10.0)})
    train, test = forecast.split(table, days, spread=True)
    assert set(days[test]) == {4, 9}
    assert sorted([*train, *test]) == list(range(10))
    train, test = forecast.split(table, days, spread=False)
    assert days[test].tolist() == [40, 41]
    assert days[train].max() == 40


def test_a_prediction_without_a_trained_run_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigurationError, match="run `unisono demo fraud` first"):
        small.run_demo("fraud", ["--run-dir", str(tmp_path), "--predict", "new.csv"], 1, monkeypatch)


def fraud_file(rows: str) -> str:
    return "amount,country,fraud\n" + rows


GOOD = "10,near,0\n900,far,1\n" * 20
BAD_INPUT = {
    "label beyond 0 and 1": ("fraud", fraud_file(GOOD + "1,near,2\n"), r"row 42, column 'fraud': 2 is no label"),
    "labels of one class": ("fraud", fraud_file("10,near,0\n" * 50), r"train on \(the first in time\) all 40 have 0"),
    "one class in the test": ("fraud", fraud_file(GOOD + "10,near,0\n" * 20), r"test on \(the last in time\) all 12 have 0"),
    "text among numbers": ("fraud", fraud_file(GOOD + "ten,near,0\n"), r"row 42, column 'amount': 'ten' is no number"),
    "no such column": ("fraud", "amount,country\n1,near\n", r"has no column 'fraud'; there are: amount, country"),
    "empty file": ("fraud", "", r"is empty: a header row"),
    "missing target": ("forecast", "a,arr_delay\n1,2\n2,NA\n", r"row 3, column 'arr_delay': the value is missing"),
    "one value": ("forecast", "a,arr_delay\n" + "1,2\n" * 20, r"column 'arr_delay' is 2 in all rows"),
    "few rows": ("forecast", "a,arr_delay\n1,2\n", r"too few to keep a fifth"),
    "short text": ("language", "abc", r"holds 3 characters"),
    "rating in words": ("recommendation", "user,item,rating\n1,1,good\n", r"row 2, column 'rating': 'good' is no number"),
    "a pair twice": ("recommendation", "user,item,rating\n1,1,3\n2,1,4\n1,1,5\n", r"rating 3: user 1 has rated '1' before"),
    "no user": ("recommendation", "user,item,rating\n1,1,3\n,1,4\n", r"row 3, column 'user': the value is missing"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_an_error_before_training_that_says_where(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, content, words = BAD_INPUT[case]
    (tmp_path / "bad.csv").write_text(content)
    with pytest.raises(DataError, match=words):
        small.run_demo(name, ["--data", str(tmp_path / "bad.csv"), "--run-dir", str(tmp_path / "run")], 1, monkeypatch)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", DATA)
def test_a_path_that_is_not_there_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigurationError, match=r"no file or folder .*missing"):
        small.run_demo(name, ["--data", str(tmp_path / "missing")], 1, monkeypatch)


def test_images_that_do_not_fit_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = small.clothes(tmp_path / "clothes")
    file = folder / "train-labels-idx1-ubyte.gz"
    whole = file.read_bytes()
    for damage, words in ((whole[:-9], "cannot be read"), (b"text", "cannot be read")):
        file.write_bytes(damage)
        with pytest.raises(DataError, match=words):
            small.run_demo("vision", ["--data", str(folder)], 1, monkeypatch)
    (folder / "t10k-labels-idx1-ubyte.gz").rename(file)
    with pytest.raises(DataError, match=r"train has images \[120, 28, 28\] and labels \[40\]"):
        small.run_demo("vision", ["--data", str(folder)], 1, monkeypatch)
