"""The examples of streamed data, as files that run: one digest alone, on several workers, and with a worker killed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.forked import start_script
from tests.test_readme import unisono
from unisono.system.fork_server import ForkServer

EXAMPLES = Path(__file__).parents[2] / "examples" / "streams"
STEPS = 14

KILLED = """
import os, pathlib, runpy, signal, sys
import unisono

class Kills(unisono.Callback):
    "Worker 1 ends in the middle, once, and says nothing."
    edits_weights = False

    def on_step(self, trainer, result):
        if result.step == 6 and trainer.world.rank == 1 and not pathlib.Path("killed").exists():
            pathlib.Path("killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)

runpy.run_path(sys.argv[1])["main"](sys.argv[2:], [Kills()])
"""


def summary(run_dir: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((run_dir / "summary.json").read_text())
    return found


@pytest.mark.parametrize("name", ["gzip_lines"])
def test_an_example_gives_one_digest_alone_and_when_a_worker_is_killed(
    name: str, tmp_path: Path, warm_commands: ForkServer | None
) -> None:
    script, texts = EXAMPLES / f"{name}.py", str(tmp_path / "texts")
    arguments = (texts, "--steps", str(STEPS), "--run-dir")
    alone = start_script(warm_commands, script, *arguments, "alone", folder=tmp_path, together=False)
    _, errors = alone.communicate(timeout=100)
    assert (alone.returncode, errors) == (0, "")
    expected = summary(tmp_path / "alone")
    assert expected["steps"] == STEPS
    killed = tmp_path / "killed.py"
    killed.write_text(KILLED)

    unisono(["run", "--workers", "3", str(killed), str(script), *arguments, "run"], tmp_path / "together", warm_commands)

    found = summary(tmp_path / "together" / "run")
    assert (tmp_path / "together" / "killed").exists()
    lines = (tmp_path / "together" / "run" / "metrics.jsonl").read_text().splitlines()
    assert any("SIGKILL" in json.loads(line).get("reason", "") for line in lines)
    assert found["weights_sha256"] == expected["weights_sha256"]
