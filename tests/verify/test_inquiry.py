"""Scripts that cannot be verified, or not as one would expect: it is said plainly, and nothing is left behind."""

from __future__ import annotations

import io
import tempfile
import textwrap
from pathlib import Path

import pytest
from rich.console import Console

from unisono.verify.inquiry import VerifyReport, inquire
from unisono.verify.report import show
from unisono.verify.servers import ForkServers

PRELUDE = """
import sys, torch, unisono
from torch import nn
from torch.nn import functional as F

def loss(model, batch):
    return F.mse_loss(model(batch[0]), batch[1], reduction="sum"), len(batch[0])

def trainer(**settings):
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    return unisono.Trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), loss, batch_size=8, microbatches=4, **settings)

data = torch.utils.data.TensorDataset(torch.linspace(0, 1, 48).view(16, 3), torch.linspace(1, 0, 16).view(16, 1))
"""


class Verifier:
    def __init__(self, folder: Path, servers: ForkServers) -> None:
        self.folder, self._servers = folder, servers

    def __call__(self, script: str, *args: str, steps: int = 3) -> VerifyReport:
        path = self.folder / "script.py"
        path.write_text(PRELUDE + textwrap.dedent(script))
        return inquire(str(path), args, workers=(2,), steps=steps, servers=self._servers)


@pytest.fixture
def verify(tmp_path: Path, servers: ForkServers, monkeypatch: pytest.MonkeyPatch) -> Verifier:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    return Verifier(tmp_path, servers)


def scratch_is_empty(verify: Verifier) -> bool:
    return not list((verify.folder / "scratch").iterdir())


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("print('hello')", "makes no unisono.Trainer"),
        ("trainer()", "trains no step"),
        ("raise RuntimeError('out of luck')", "out of luck"),
        ("sys.exit('no data here')", "no data here"),
        ("import surely_not_installed", "surely_not_installed"),
        ("def broken(:", "SyntaxError"),
        ("trainer(colour='blue')", "colour"),
    ],
)
def test_a_script_that_trains_nothing_could_not_be_told(verify: Verifier, script: str, words: str) -> None:
    report = verify(script)
    assert report.verdict == "unknown"
    assert words in report.problem
    assert report.runs == 1
    assert scratch_is_empty(verify)


def test_a_traceback_ends_in_the_users_code(verify: Verifier) -> None:
    report = verify("def helper():\n    return 1 / 0\nhelper()")
    assert "in helper" in report.problem
    assert "runpy" not in report.problem


def test_two_trainers_are_both_looked_at(verify: Verifier) -> None:
    report = verify("trainer().fit(data, 1)\nsecond = trainer(seed=1)\nsecond.fit(data, 2)")
    assert (report.verdict, report.steps) == ("equal", 2 + 3)
    assert any("makes 2 trainers" in note for note in report.notes)


def test_arguments_reach_the_script(verify: Verifier) -> None:
    report = verify("assert sys.argv[1:] == ['--epochs', '2'], sys.argv\ntrainer().fit(data, int(sys.argv[2]))", "--epochs", "2")
    assert (report.verdict, report.args) == ("equal", ("--epochs", "2"))


def test_training_that_ends_before_the_steps_asked_for_is_noted(verify: Verifier) -> None:
    report = verify("trainer().fit(data, 1)", steps=50)
    assert (report.verdict, report.steps) == ("equal", 2)
    assert any("ends after 2 steps" in note for note in report.notes)


def test_files_that_the_script_writes_are_named_and_run_directories_are_left_alone(verify: Verifier) -> None:
    results, run_dir = verify.folder / "results.txt", verify.folder / "run"
    run_dir.mkdir()
    (run_dir / "manifest.json").write_text("somebody's")
    report = verify(f"trainer(run_dir={str(run_dir)!r}).fit(data, 4)\nopen({str(results)!r}, 'w').write('done')")
    assert report.verdict == "equal"
    assert any(str(results) in note for note in report.notes)
    assert [(path.name, path.read_text()) for path in run_dir.iterdir()] == [("manifest.json", "somebody's")]
    assert scratch_is_empty(verify)


def test_a_failure_after_training_is_noted_and_what_came_before_is_compared(verify: Verifier) -> None:
    report = verify("trainer().fit(data, 4)\nassert False, 'accuracy too low'")
    assert report.verdict == "equal"
    assert any("accuracy too low" in note for note in report.notes)


def test_a_script_that_fails_on_several_workers_only_is_different_and_its_rank_is_named(verify: Verifier) -> None:
    report = verify("""
        import os
        if os.environ["RANK"] == "1":
            raise ValueError("I am the second")
        trainer().fit(data, 1)
    """)
    assert report.verdict == "different"
    assert [cause.name for cause in report.causes] == ["rank_dependent"]
    difference = report.comparisons[-1].difference
    assert difference is not None
    assert (difference.stage, difference.rank) == ("failure", 1)
    assert "I am the second" in difference.what


def test_more_workers_than_microbatches_are_not_compared(verify: Verifier, servers: ForkServers) -> None:
    verify("trainer().fit(data, 1)")
    report = inquire(str(verify.folder / "script.py"), workers=(2, 9), steps=1, servers=servers)
    assert report.verdict == "equal"
    assert "4 microbatches" in report.comparisons[-1].skipped
    assert shown(report).splitlines()[-1].startswith("Equal: the same bits on 1 and 2 workers, and what a plain loop computes")


def test_where_no_other_number_of_workers_can_be_compared_it_could_not_be_told(verify: Verifier, servers: ForkServers) -> None:
    verify("trainer().fit(data, 1)")
    report = inquire(str(verify.folder / "script.py"), workers=(8, 9), steps=1, servers=servers)
    assert report.verdict == "unknown"
    assert shown(report).splitlines()[-1].startswith("Could not tell: no other number of workers was compared")


def shown(report: VerifyReport) -> str:
    console = Console(file=io.StringIO(), width=200)
    show(report, console)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_two_faults_are_both_named(verify: Verifier) -> None:
    report = verify("""
        import os, time
        class Half(unisono.Callback):
            def on_step(self, trainer, result):
                if os.environ["RANK"] == "0":
                    with torch.no_grad():
                        trainer.model.bias *= 0.5
        one = trainer(callbacks=[Half()])
        data = torch.utils.data.TensorDataset(data.tensors[0] * (time.time() % 7), data.tensors[1])
        one.fit(data, 2)
    """)
    assert report.verdict == "different"
    assert [cause.name for cause in report.causes] == ["clock", "callback_on_some_workers"]
    assert report.reference is not None
    assert report.reference.beyond == (), "with both taken away it is what a plain loop computes"


def test_a_cause_that_cannot_be_found_is_not_made_up(verify: Verifier) -> None:
    report = verify("""
        noise = open("/dev/urandom", "rb").read(1)[0]
        data = torch.utils.data.TensorDataset(data.tensors[0] + noise, data.tensors[1])
        trainer().fit(data, 1)
    """)
    assert (report.verdict, report.causes) == ("different", ())
    assert report.comparisons[0].search is not None
    assert "same_hash" in report.comparisons[0].search.tried
    assert "differ already" in report.comparisons[1].skipped


def test_a_script_that_makes_its_own_process_group_is_verified(verify: Verifier) -> None:
    report = verify("""
        torch.distributed.init_process_group("gloo")
        trainer().fit(data, 1)
        torch.distributed.destroy_process_group()
    """)
    assert (report.verdict, report.problem) == ("equal", "")
