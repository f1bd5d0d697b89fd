"""What a person types: options, defaults, and mistakes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import unisono as package
from tests.launch.conftest import Launcher
from unisono.launch import cli, runner
from unisono.launch.config import LaunchConfig
from unisono.world import usable_cores


@pytest.fixture
def script(tmp_path: Path) -> str:
    path = tmp_path / "train.py"
    path.write_text("")
    return str(path)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[LaunchConfig]:
    """What would have been run: no worker starts."""
    seen: list[LaunchConfig] = []

    def run(config: LaunchConfig) -> int:
        seen.append(config)
        return 5

    monkeypatch.setattr(runner, "run", run)
    for name in ("UNISONO_THREADS", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    return seen


def unisono(*args: str) -> Result:
    return CliRunner().invoke(cli.main, args)


def test_by_default_there_are_as_many_workers_as_usable_cores(script: str, runs: list[LaunchConfig]) -> None:
    result = unisono("run", script)
    assert (result.exit_code, result.output) == (5, "")
    (settings,) = runs
    assert (settings.workers, settings.workers_defaulted, settings.threads) == (usable_cores(), True, 1)


def test_where_there_are_gpus_each_has_a_worker(script: str, runs: list[LaunchConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "room_for_workers", lambda threads: 3)
    unisono("run", script)
    unisono("run", "--workers", "1:2", script)
    unisono("run", "--workers", "5", script)
    assert [(settings.workers, settings.workers_defaulted) for settings in runs] == [(3, True), (2, True), (5, False)]


def test_threads_share_the_cores(script: str, runs: list[LaunchConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    unisono("run", "--threads", str(usable_cores()), script)
    monkeypatch.setenv("OMP_NUM_THREADS", str(usable_cores()))
    unisono("run", script)
    assert [(settings.workers, settings.threads) for settings in runs] == [(1, usable_cores())] * 2


def test_more_threads_than_cores_are_allowed_and_said(script: str, runs: list[LaunchConfig]) -> None:
    result = unisono("run", "--workers", "3", "--threads", str(usable_cores()), script)
    assert "share" in result.stderr
    assert result.stderr.count("\n") == 1
    assert (runs[0].workers, runs[0].workers_defaulted) == (3, False)


def test_options_behind_the_script_are_the_scripts(script: str, runs: list[LaunchConfig]) -> None:
    unisono("run", "--workers", "1", script, "--workers", "7", "--help", "-x")
    assert (runs[0].workers, runs[0].args) == (1, ("--workers", "7", "--help", "-x"))


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["SCRIPT", "--workers", "2"], "unisono: --workers after the script goes to the script; "),
        (["SCRIPT", "--epochs", "3", "--workers=2"], "unisono: --workers after the script goes to the script; "),
        (
            ["SCRIPT", "--trace", "--threads=2", "--trace"],
            "unisono: --trace, --threads after the script go to the script; ",
        ),
    ],
)
def test_an_option_of_unisono_behind_the_script_is_pointed_out(
    script: str, runs: list[LaunchConfig], args: list[str], said: str
) -> None:
    result = unisono("run", *[script if arg == "SCRIPT" else arg for arg in args])
    assert result.stderr == said + "options of unisono run come before it\n"
    assert runs[0].args == tuple(args[1:])


@pytest.mark.parametrize(
    "args",
    [
        ["SCRIPT", "--epochs", "3", "--help", "-x", "workers"],
        ["--workers", "1", "SCRIPT", "--workers", "7"],
        ["SCRIPT", "--", "--workers", "7"],
        ["SCRIPT", "--wait", "3"],
    ],
)
def test_an_option_that_is_meant_for_the_script_is_not_remarked_on(
    script: str, runs: list[LaunchConfig], args: list[str]
) -> None:
    Path(script).write_text('parser.add_argument("--wait")')
    assert unisono("run", *[script if arg == "SCRIPT" else arg for arg in args]).stderr == ""


@pytest.mark.parametrize(
    ("workers", "started", "minimum"),
    [("1:1000", usable_cores(), 1), ("1:1", 1, 1), ("1000:2000", 1000, 1000), (str(usable_cores()), usable_cores(), 1)],
)
def test_a_range_of_workers_takes_the_cores_that_are_there(
    script: str, runs: list[LaunchConfig], workers: str, started: int, minimum: int
) -> None:
    unisono("run", "--workers", workers, script)
    assert (runs[0].workers, runs[0].minimum, runs[0].workers_defaulted) == (started, minimum, ":" in workers)


def test_how_a_run_goes_on_without_a_worker_can_be_chosen(script: str, runs: list[LaunchConfig]) -> None:
    unisono("run", script)
    unisono("run", "--max-restarts", "7", "--wait", "1.5", "--meet", "node1:29400", "--hosts", "2", script)
    assert [(run.max_restarts, run.wait_s, run.meet, run.hosts) for run in runs] == [
        (3, 300.0, None, 1),
        (7, 1.5, ("node1", 29400), 2),
    ]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["run"], "Missing argument 'SCRIPT'"),
        (["run", "missing.py"], "'missing.py' does not exist"),
        (["run", "/"], "is a directory"),
        (["run", "--workers", "0", "SCRIPT"], "--workers"),
        (["run", "--workers", "8:2", "SCRIPT"], "'8:2' is neither"),
        (["run", "--workers", "0:2", "SCRIPT"], "'0:2' is neither"),
        (["run", "--workers", "two", "SCRIPT"], "'two' is neither"),
        (["run", "--max-restarts", "-1", "SCRIPT"], "--max-restarts"),
        (["run", "--wait", "-1", "SCRIPT"], "--wait"),
        (["run", "--meet", "node1", "SCRIPT"], "'node1' is not an address such as node1:29400"),
        (["run", "--meet", "node1:70000", "SCRIPT"], "'node1:70000' is not an address"),
        (["run", "--hosts", "2", "SCRIPT"], "--hosts 2 needs --meet"),
        (["run", "--threads", "0", "SCRIPT"], "--threads"),
        (["run", "--grace", "-1", "SCRIPT"], "--grace"),
        (["run", "--wrokers", "2", "SCRIPT"], "No such option"),
        (["demo", "nonsense"], "no demo 'nonsense'"),
        (["rnu"], "No such command"),
    ],
)
def test_mistakes_are_named(script: str, args: list[str], words: str) -> None:
    result = unisono(*[script if arg == "SCRIPT" else arg for arg in args])
    assert result.exit_code == 2
    assert words in result.stderr


def test_a_wrong_variable_is_named(script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "many")
    result = unisono("run", script)
    assert result.exit_code == 2
    assert "OMP_NUM_THREADS='many'" in result.stderr


def test_a_demo_runs_as_a_script_does(tmp_path: Path, runs: list[LaunchConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("digits.py", "__init__.py"):
        (tmp_path / name).write_text("")
    monkeypatch.setattr(cli, "_DEMOS", tmp_path)
    unisono("demo", "digits", "--workers", "1", "--epochs", "3", "more")
    assert (runs[0].script, runs[0].workers) == (str(tmp_path / "digits.py"), 1)
    assert runs[0].args == ("--epochs", "3", "more")
    assert "there are: digits\n" in unisono("demo", "letters").stderr


def test_the_demos_are_named_where_a_person_looks_for_them() -> None:
    names = "contrastive, digits, forecast, fraud, language, recommendation, vision"
    for args in (["--help"], ["demo", "--help"], ["demo"]):
        result = unisono(*args)
        assert names in " ".join((result.stdout + result.stderr).split()), args


@pytest.mark.parametrize("args", [["digits", "--help"], ["-h", "digits"], ["digits", "--workers", "2", "-h"]])
def test_the_help_of_a_demo_is_its_own(args: list[str], runs: list[LaunchConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["unisono"])
    result = unisono("demo", *args)
    assert (result.exit_code, runs) == (0, [])
    assert result.stdout.startswith("usage: unisono demo digits [-h] [--epochs EPOCHS]")
    assert result.stdout.endswith("unisono demo --help lists them.\n")


def test_the_list_of_commands_has_whole_sentences() -> None:
    listed = unisono("--help").stdout.partition("Commands:\n")[2]
    assert "..." not in listed
    assert listed.count(".\n") == len(cli.main.commands)


def test_the_version_is_told() -> None:
    assert unisono("--version").output == f"unisono {package.__version__}\n"


def test_the_command_is_a_module_as_well() -> None:
    done = subprocess.run([sys.executable, "-m", "unisono", "run"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "Missing argument 'SCRIPT'" in done.stderr


def test_a_demo_is_copied_to_be_changed_and_no_file_is_overwritten(
    tmp_path: Path, runs: list[LaunchConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = unisono("demo", "digits", "--copy")
    assert (result.exit_code, runs) == (0, [])
    assert (tmp_path / "digits.py").read_text() == (cli._DEMOS / "digits.py").read_text()
    (tmp_path / "digits.py").write_text("mine")
    again = unisono("demo", "digits", "--copy")
    assert again.exit_code == 2
    assert "digits.py is there already" in again.stderr
    assert (tmp_path / "digits.py").read_text() == "mine"


def test_ctrl_c_before_the_run_listens_for_it_ends_the_command_as_a_shell_expects(
    script: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(config: LaunchConfig) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "run", interrupted)
    assert unisono("run", script).exit_code == 130


# ---- scripts that make no Trainer ----

NOTE = "unisono: the script made no unisono.Trainer: each of the 2 workers ran all of it\n"
GROUP = """
import os, torch.distributed as dist
dist.init_process_group("gloo", store=dist.FileStore(__file__ + ".store", 2), rank=int(os.environ["RANK"]), world_size=2)
dist.barrier()  # else one may be gone before the other has connected to it
dist.destroy_process_group()
"""


@pytest.mark.parametrize(
    "code",
    ["print('trained')", "import sys\ndef main():\n    print('trained')\nif __name__ == '__main__':\n    sys.exit(main())"],
)
def test_work_that_every_worker_did_is_pointed_out(launcher: Launcher, code: str) -> None:
    assert plain(launcher, code) == (0, "trained\n", NOTE)


def test_one_worker_that_did_all_the_work_is_not_remarked_on(launcher: Launcher) -> None:
    assert plain(launcher, "print('trained')", workers=1) == (0, "trained\n", "")


@pytest.mark.parametrize(
    "code",
    [
        pytest.param("from mine import *", id="torch.distributed in a module of one's own, ended before the script"),
        pytest.param("import os; print('I am', os.environ['RANK'])", id="its rank"),
        pytest.param("import unisono; print(unisono.World.from_environment().rank)", id="its world"),
        pytest.param("import argparse; argparse.ArgumentParser().parse_args(['--help'])", id="help"),
    ],
)
def test_a_script_that_knows_of_its_fellows_is_not_remarked_on(launcher: Launcher, code: str) -> None:
    (launcher.folder / "mine.py").write_text(GROUP)
    status, _, err = plain(launcher, code)
    assert status == 0
    assert "made no unisono.Trainer" not in err


def test_a_script_with_a_trainer_is_not_remarked_on(launcher: Launcher) -> None:
    code = """
import torch, unisono
model = torch.nn.Linear(2, 1)
loss = lambda model, batch: model(batch[0]).square().sum()
trainer = unisono.Trainer(model, torch.optim.SGD(model.parameters(), 0.1), loss, batch_size=4, microbatches=2)
trainer.fit(torch.utils.data.TensorDataset(torch.ones(8, 2)), epochs=1)
"""
    status, _, err = plain(launcher, code)
    assert status == 0, err
    assert "made no unisono.Trainer" not in err


def plain(launcher: Launcher, code: str, *, workers: int = 2) -> tuple[int, str, str]:
    """Status and output of a script that stands in its file as it is."""
    path = launcher.folder / "train.py"
    path.write_text(code)
    return launcher.command("-m", "unisono.launch", "run", "--workers", str(workers), str(path)).finish()


@pytest.mark.parametrize("closed", [1, 2])
def test_what_goes_to_a_closed_stream_goes_nowhere(launcher: Launcher, closed: int) -> None:
    script = launcher.write("print('out'); print('err', file=sys.stderr)")
    launch = launcher.command(
        "-m",
        "unisono.launch",
        "run",
        "--workers",
        "2",
        str(script),
        through=lambda line: ["sh", "-c", f'"$@" {closed}>&-', "sh", *line],
    )
    status, out, err = launch.finish()
    assert status == 0
    assert ("out" in out, "err" in err) == (closed != 1, closed != 2)
