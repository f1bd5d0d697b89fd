"""The run directory is measured through the door that checkpoints use, and left as it was."""

from __future__ import annotations

import secrets
from pathlib import Path

import fsspec
import pytest

from unisono.doctor.facts import StorageFacts
from unisono.doctor.storage import measured, sees


def measure(url: str) -> StorageFacts:
    with measured(url) as (facts, _):
        return facts


def test_a_new_directory_is_measured_and_gone_afterwards(tmp_path: Path) -> None:
    found = measure(str(tmp_path / "deep" / "runs"))
    assert found.error == ""
    assert (found.rate or 0) > 0
    assert (found.small_s or 0) > 0
    assert (found.free or 0) > 0
    assert list(tmp_path.iterdir()) == []


def test_what_was_there_stays(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("precious")
    (tmp_path / "empty").mkdir()
    measure(tmp_path.as_uri())
    assert {path.name for path in tmp_path.iterdir()} == {"model.safetensors", "empty"}
    assert (tmp_path / "model.safetensors").read_text() == "precious"


def test_what_somebody_else_has_put_into_a_new_directory_stays(tmp_path: Path) -> None:
    with measured(str(tmp_path / "runs")):
        (tmp_path / "runs" / "other.json").write_text("y")
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["other.json"]


def test_a_directory_that_cannot_be_written_says_why(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    found = measure(str(tmp_path / "file" / "runs"))
    assert found.error == f"File exists: {tmp_path / 'file'}"
    assert found.rate is None


def test_a_remote_directory_is_measured_and_gone_afterwards() -> None:
    name = f"doctor-{secrets.token_hex(4)}"
    found = measure(f"memory://{name}/runs")
    assert (found.error, found.free) == ("", None)
    assert (found.rate or 0) > 0
    assert not fsspec.filesystem("memory").exists(f"/{name}")


def test_an_unknown_protocol_says_why() -> None:
    assert "nonsense" in measure("nonsense://bucket/runs").error


@pytest.mark.parametrize("same", [True, False])
def test_who_looks_at_another_directory_does_not_see_the_file(tmp_path: Path, same: bool) -> None:
    with measured(str(tmp_path / "one")) as (_, name):
        assert sees(str(tmp_path / ("one" if same else "two")), name) is same
    assert not sees(str(tmp_path / "one"), name)
