"""The folder that a newcomer opens: each application is there, as a file that runs."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

from tests.forked import start_script
from unisono import demos
from unisono.system.fork_server import ForkServer

ROOT = Path(__file__).parent.parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def test_the_examples_are_the_demos() -> None:
    assert demos.__file__ is not None
    there = Path(demos.__file__).parent
    assert [example.name for example in EXAMPLES] == sorted(file.name for file in there.glob("[!_]*.py"))
    for example in EXAMPLES:
        assert example.is_symlink()
        assert not example.readlink().is_absolute()
        assert example.read_text() == (there / example.name).read_text()


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.stem)
def test_an_example_says_which_options_it_takes(
    example: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [str(example), "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(example), run_name="__main__")
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: {example.name} ")
    assert all(option in shown for option in ("--epochs", "--seed", "--run-dir"))


@pytest.mark.parametrize(("name", "said"), [("digits", "test accuracy"), ("contrastive", "learned")])
def test_an_example_trains_as_a_plain_script(name: str, said: str, tmp_path: Path, warm_commands: ForkServer | None) -> None:
    script = ROOT / "examples" / f"{name}.py"
    process = start_script(warm_commands, script, "--epochs", "1", "--run-dir", "run", folder=tmp_path, together=False)
    shown, errors = process.communicate(timeout=100)
    assert (process.returncode, errors) == (0, "")
    assert said in shown
    assert (tmp_path / "run" / "model.safetensors").exists()
