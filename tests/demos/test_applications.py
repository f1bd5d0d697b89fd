"""Each demo on data cut down to a second: one digest on any number of workers, results beside baselines, predictions."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.demos import small
from unisono.checkpoint.store import Store
from unisono.demos import forecast
from unisono.demos._tables import Table
from unisono.errors import CheckpointError, ConfigurationError, DataError
from unisono.report.attachments import read_attachments
from unisono.report.figure import Figure

DATA: dict[str, Callable[[Path], Path]] = {
    "vision": small.clothes,
    "language": small.text,
    "recommendation": small.ratings,
    "fraud": small.payments,
    "forecast": small.flights,
}
SHORT = {
    "vision": ["--epochs", "3", "--batch-size", "50"],
    "language": ["--epochs", "3", "--batch-size", "32", "--preset", "nanogpt"],
    "recommendation": ["--epochs", "3", "--batch-size", "100"],
    "fraud": ["--epochs", "3", "--batch-size", "100"],
    "forecast": ["--epochs", "3", "--batch-size", "100"],
}
FILES = {"vision": "clothes", "language": "text.txt", "recommendation": "ratings.csv", "fraud": "pay.csv", "forecast": "fly.csv"}


TRAINED: dict[str, list[str]] = {}
"""What a prediction of each demo needs, once it has been trained by one worker."""


def prediction(data: Path, run_dir: Path) -> list[str]:
    return ["--data", str(data), "--run-dir", str(run_dir), "--predict"]


def evaluations(run_dir: Path) -> list[dict[str, float]]:
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line.get("event") == "evaluation"]


def digest(run_dir: Path) -> str:
    found = hashlib.sha256((run_dir / "model.safetensors").read_bytes()).hexdigest()
    assert json.loads((run_dir / "summary.json").read_text())["weights_sha256"] == found
    return found


@pytest.mark.parametrize("name", DATA)
def test_a_demo_has_one_digest_on_1_2_and_3_workers_and_reports_beside_baselines(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = DATA[name](tmp_path / FILES[name])
    digests, measured = set(), []
    for workers in (1, 2, 3):
        run_dir = tmp_path / str(workers)
        small.run_demo(name, ["--data", str(data), "--run-dir", str(run_dir), *SHORT[name]], workers, monkeypatch)
        assert json.loads((run_dir / "summary.json").read_text())["workers"] == workers
        digests.add(digest(run_dir))
        measured.append(evaluations(run_dir))
    assert len(digests) == 1
    TRAINED[name] = prediction(data, tmp_path / "1")
    assert measured[0] == measured[1] == measured[2]
    steps = json.loads((tmp_path / "1" / "summary.json").read_text())["steps"]
    assert {steps * 2 // 3, steps} <= {line["step"] for line in measured[0]}
    shown = capsys.readouterr().out
    assert shown.count("this run") >= 3
    pictures = read_attachments(Store(tmp_path / "3"))
    figures = [one.picture for one in pictures if isinstance(one.picture, Figure)]
    assert any(trace["type"] == "bar" for figure in figures for trace in figure.data)
    assert len(pictures) >= 2


def test_language_has_one_digest_in_bf16_too_and_another_than_in_fp32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = small.text(tmp_path / "text.txt")
    digests = []
    for number, (workers, precision) in enumerate([(1, "bf16"), (2, "bf16"), (3, "bf16"), (1, "fp32")]):
        run_dir = tmp_path / str(number)
        options = ["--data", str(data), "--run-dir", str(run_dir), "--epochs", "1", "--precision", precision]
        small.run_demo("language", options, workers, monkeypatch)
        digests.append(digest(run_dir))
    assert digests[0] == digests[1] == digests[2] != digests[3]
    weights = load_file(tmp_path / "0" / "model.safetensors").values()
    assert {weight.dtype for weight in weights} == {torch.float32}


def trained(name: str, tmp_path: Path, patch: pytest.MonkeyPatch) -> list[str]:
    """Trains briefly, if no test has yet; the options that a prediction needs."""
    if name not in TRAINED:
        data, run_dir = DATA[name](tmp_path / FILES[name]), tmp_path / "run"
        small.run_demo(name, ["--data", str(data), "--run-dir", str(run_dir), *SHORT[name]], 1, patch)
        TRAINED[name] = prediction(data, run_dir)
    return TRAINED[name]


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
    with pytest.raises(DataError, match=r"no\.png is not a readable image"):
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


FLIGHT = "year,month,day,sched_dep_time,dep_delay,sched_arr_time,arr_delay,carrier,origin,dest,distance\n"
GOOD = "10,near,0\n900,far,1\n" * 20
BAD_INPUT = {
    "one fraud to learn from": (
        "fraud",
        fraud_file("10,near,0\n900,far,1\n" + "10,near,0\n" * 50 + GOOD[:100]),
        r"with 1 of the rarer",
    ),
    "ten rows to train on": ("fraud", fraud_file("10,near,0\n900,far,1\n" * 6), r"9 rows to train on"),
    "label beyond 0 and 1": ("fraud", fraud_file(GOOD + "1,near,2\n"), r"row 42, column 'fraud': 2 is not a label"),
    "labels of one class": ("fraud", fraud_file("10,near,0\n" * 50), r"train on \(the first in time\) all 40 have 0"),
    "one class in the test": ("fraud", fraud_file(GOOD + "10,near,0\n" * 20), r"test on \(the last in time\) all 12 have 0"),
    "text among numbers": ("fraud", fraud_file(GOOD + "ten,near,0\n"), r"row 42, column 'amount': 'ten' is not a number"),
    "no such column": ("fraud", "amount,country\n1,near\n", r"has no column 'fraud'; there are: amount, country"),
    "empty file": ("fraud", "", r"is empty: a header row"),
    "missing target": ("forecast", "a,arr_delay\n1,2\n2,NA\n", r"row 3, column 'arr_delay': the value is missing"),
    "one value": ("forecast", "a,arr_delay\n" + "1,2\n" * 20, r"column 'arr_delay' is 2 in all rows"),
    "few rows": ("forecast", "a,arr_delay\n1,2\n", r"too few to keep a fifth"),
    "short text": ("language", "abc", r"holds 3 characters"),
    "rating in words": ("recommendation", "user,item,rating\n1,1,good\n", r"row 2, column 'rating': 'good' is not a number"),
    "a pair twice": ("recommendation", "user,item,rating\n1,1,3\n2,1,4\n1,1,5\n", r"rating 3: user 1 has rated '1' before"),
    "nothing liked": ("recommendation", "user,item,rating\n1,1,1\n1,2,1\n2,1,1\n2,2,5\n3,1,1\n", r"none is 4 or more"),
    "one item": ("recommendation", "user,item,rating\n" + "".join(f"{u},1,3\n" for u in range(9)), r"ratings of one item only"),
    "no date": (
        "forecast",
        FLIGHT + "2013,13,45,600,5,900,7,AA,JFK,LAX,9\n",
        r"row 2, column 'month': 13 is not a whole number from 1",
    ),
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


def movielens(folder: Path, **changed: str) -> Path:
    """A folder like MovieLens 100k's: three users, two films."""
    folder.mkdir(exist_ok=True)
    flags = "|".join("0" * 19)
    whole = {
        "data": "1\t1\t3\t0\n1\t2\t4\t0\n2\t1\t5\t0\n2\t2\t4\t0\n3\t1\t1\t0\n",
        "user": "1|24|M|writer|1\n2|30|F|other|2\n3|40|F|other|3\n",
        "item": f"1|A (1990)|x||y|{flags}\n2|B (1991)|x||y|{flags}\n",
    }
    for name, content in (whole | changed).items():
        (folder / f"u.{name}").write_text(content)
    return folder


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"data": "1\t1\t3\t0\n1\t9\t3\t0\n"}, r"u\.data, row 2, column item: '9' is not among the 2 films"),
        ({"data": "7\t1\t3\t0\n"}, r"u\.data, row 1, column user: '7' is not among the 3 users"),
        ({"data": "1\t1\tinf\t0\n"}, r"u\.data, rating 1: inf is not a rating"),
        ({"data": "1\t1\n"}, r"u\.data, row 1, column rating: 'nothing' is not a number"),
        ({"data": ""}, r"u\.data holds no ratings"),
        ({"user": "1|old|M|writer|1\n"}, r"u\.user, row 1, column age: 'old' is not a number"),
        ({"user": "1|24\n"}, r"u\.user, row 1 has 2 fields instead of 5"),
        ({"item": "1|A\n"}, r"u\.item, row 1 has 2 fields instead of 24"),
    ],
)
def test_a_damaged_movielens_is_an_error_that_says_where(
    changed: dict[str, str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError, match=words):
        small.run_demo("recommendation", ["--data", str(movielens(tmp_path / "ml", **changed))], 1, monkeypatch)


def test_weights_of_other_data_and_damaged_files_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    run.mkdir()
    options = ["--data", str(movielens(tmp_path / "ml")), "--run-dir", str(run), "--predict", "1"]
    (run / "application.json").write_text('{"demo": "recommendation"}')
    save_file({"weight": torch.zeros(3)}, run / "model.safetensors")
    with pytest.raises(ConfigurationError, match=r"those of another model .* pass the --data that they were trained with"):
        small.run_demo("recommendation", options, 1, monkeypatch)
    (run / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match="cannot read 7 bytes as safetensors"):
        small.run_demo("recommendation", options, 1, monkeypatch)
    (run / "application.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"application\.json .* is damaged .it holds a list"):
        small.run_demo("recommendation", options, 1, monkeypatch)


def test_images_that_do_not_fit_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = small.clothes(tmp_path / "clothes")
    file = folder / "train-labels-idx1-ubyte.gz"
    whole = file.read_bytes()
    for damage, words in ((whole[:-9], "cannot be read"), (b"text", "cannot be read")):
        file.write_bytes(damage)
        with pytest.raises(DataError, match=words):
            small.run_demo("vision", ["--data", str(folder)], 1, monkeypatch)
    file.write_bytes(gzip.compress(gzip.decompress(whole)[:8] + bytes(120)))
    with pytest.raises(DataError, match="all 120 labels of train are 0"):
        small.run_demo("vision", ["--data", str(folder)], 1, monkeypatch)
    (folder / "t10k-labels-idx1-ubyte.gz").rename(file)
    with pytest.raises(DataError, match=r"train has images \[120, 28, 28\] and labels \[40\]"):
        small.run_demo("vision", ["--data", str(folder)], 1, monkeypatch)
