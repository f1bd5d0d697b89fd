from __future__ import annotations

import uuid
import webbrowser
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from tests.report.made_up import write_run
from unisono.checkpoint.store import Store
from unisono.launch import cli


def report(*args: str) -> Result:
    return CliRunner().invoke(cli.main, ["report", *args])


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What would have been opened in a browser."""
    seen: list[str] = []
    monkeypatch.setattr(webbrowser, "open", lambda url: seen.append(url) or True)
    return seen


def test_a_report_goes_into_the_run_directory(tmp_path: Path, opened: list[str]) -> None:
    folder = write_run(tmp_path / "run")
    result = report(str(folder), "--open")
    assert (result.exit_code, result.output) == (0, f"{folder}/report.html\n")
    assert (folder / "report.html").read_text().startswith("<!doctype html>")
    assert opened == [(folder / "report.html").as_uri()]


def test_a_comparison_goes_into_the_current_folder_or_where_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    runs = [str(write_run(tmp_path / name)) for name in ("a", "b")]
    assert report(*runs).output == f"{tmp_path}/comparison.html\n"
    assert report(*runs, "-o", "new/both.html").output == "new/both.html\n"
    assert (tmp_path / "new/both.html").read_text() == (tmp_path / "comparison.html").read_text()


def test_a_run_anywhere_gets_its_report_there(tmp_path: Path, opened: list[str]) -> None:
    url = f"memory://{uuid.uuid4().hex}/run"
    for file in write_run(tmp_path / "run").iterdir():
        Store(url).write(file.name, file.read_bytes())
    result = report(url, "--open")
    assert (result.exit_code, opened) == (1, [])
    assert "no browser could be opened" in result.output
    assert Store(url).exists("report.html")


def test_what_is_no_run_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    for name, message in (("none", "does not exist"), ("file", "is not a folder"), ("empty", "holds no files of a run")):
        result = report(str(tmp_path / name))
        assert result.exit_code == 1
        assert message in " ".join(result.output.split())
    assert report().exit_code == 2
