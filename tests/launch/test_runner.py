"""`unisono run`, when all goes well; where it matters how an interpreter starts, in new interpreters as on a desk."""

from __future__ import annotations

import contextlib
import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.launch.conftest import Launcher, assert_gone


@pytest.fixture
def cold_launcher(tmp_path: Path) -> Iterator[Launcher]:
    with contextlib.closing(Launcher(tmp_path)) as launcher:
        yield launcher


WORLD = """
import json, torch
from unisono.world import World
import torch.distributed as dist

world = World.from_environment()
dist.init_process_group("gloo", init_method=world.init_method, rank=world.rank, world_size=world.size)
total = torch.tensor([world.rank])
dist.all_reduce(total)
assert dist.get_world_size() == world.size
tell(world.rank, world.size, world.local_rank, world.local_size, total.item(), world.launcher.replace(" ", "-"))
dist.barrier()
dist.destroy_process_group()
"""


def expected_world(size: int, launcher: str) -> set[tuple[str, ...]]:
    total = sum(range(size))
    return {tuple(map(str, (rank, size, rank, size, total, launcher))) for rank in range(size)}


def test_unisono_run_starts_workers_that_can_talk(cold_launcher: Launcher) -> None:
    launch = cold_launcher.run(WORLD, workers=3)
    assert launch.hear_all(3) == expected_world(3, "unisono-run")
    status, out, err = launch.finish()
    assert (status, out) == (0, "")
    assert "Traceback" not in err


def test_the_same_script_runs_under_torchrun(cold_launcher: Launcher) -> None:
    script = str(cold_launcher.write(WORLD))
    launch = cold_launcher.command("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3", script)
    assert launch.hear_all(3) == expected_world(3, "torchrun")
    assert launch.finish()[0] == 0


def test_the_script_runs_as_under_plain_python_and_only_rank_0_is_heard(cold_launcher: Launcher) -> None:
    cold_launcher.write("answer = 42", "neighbour.py")
    launch = cold_launcher.run(
        """
        import neighbour
        print("hello from", rank, "of", size, sys.argv[1:], neighbour.answer, __name__, __file__)
        print("words of warning from", rank, file=sys.stderr)
        tell(rank, os.environ["OMP_NUM_THREADS"], os.environ["MKL_NUM_THREADS"], os.environ["UNISONO_THREADS"])
        """,
        "--epochs",
        "3",
        "--workers",
        options=("--threads", "2"),
    )
    assert launch.hear_all(2) == {("0", "2", "2", "2"), ("1", "2", "2", "2")}
    status, out, err = launch.finish()
    assert status == 0
    script = cold_launcher.folder / "script.py"
    assert out == f"hello from 0 of 2 ['--epochs', '3', '--workers'] 42 __main__ {script}\n"
    assert err.splitlines()[-1] == "words of warning from 0"
    assert "from 1" not in err
    assert list(launch.temporary.iterdir()) == []


def test_rank_0_has_the_terminal_of_the_launcher(cold_launcher: Launcher) -> None:
    script = cold_launcher.write("print('terminal:', sys.stdout.isatty(), rank)")
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "unisono.launch", "run", "--workers", "2", str(script)]
    done = subprocess.run(command, stdout=theirs, stderr=subprocess.PIPE, timeout=60)
    os.close(theirs)
    shown = os.read(ours, 4096).decode()
    os.close(ours)
    assert (done.returncode, shown) == (0, "terminal: True 0\r\n"), done.stderr


def test_workers_that_nobody_asked_for_leave_when_there_are_too_few_microbatches(cold_launcher: Launcher) -> None:
    script = cold_launcher.write(WORLD.replace("World.from_environment()", "World.from_environment().at_most(2)"))
    code = f"""if True:
        from unisono.launch.config import LaunchConfig
        from unisono.launch.runner import run
        raise SystemExit(run(LaunchConfig(script={str(script)!r}, workers=3, workers_defaulted=True, threads=1, grace_s=9)))
    """
    launch = cold_launcher.command("-c", code)
    assert launch.hear_all(2) == expected_world(2, "unisono-run")
    assert launch.finish()[0] == 0


def test_spawned_loader_workers_find_the_classes_of_the_script(launcher: Launcher) -> None:
    launch = launcher.run(
        """
        from torch.utils.data import DataLoader, Dataset

        class Squares(Dataset):
            def __len__(self):
                return 8
            def __getitem__(self, index):
                return index * index

        if __name__ == "__main__":
            loader = DataLoader(Squares(), batch_size=4, num_workers=1, multiprocessing_context="spawn")
            tell(sum(batch.sum().item() for batch in loader))
        """,
        workers=1,
    )
    assert launch.hear() == ["140"]
    assert launch.finish()[0] == 0


def test_what_a_worker_leaves_running_is_ended(launcher: Launcher, tmp_path: Path) -> None:
    gates = [tmp_path / f"gate-{rank}" for rank in range(2)]
    for gate in gates:
        os.mkfifo(gate)
    launch = launcher.run(
        """
        import subprocess
        child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
        tell(child.pid)
        open(f"{sys.argv[1]}/gate-{os.environ['RANK']}").read()  # until the test has seen the child
        """,
        str(tmp_path),
    )
    children = launch.hear_processes(2)
    for gate in gates:
        gate.open("w").close()
    assert launch.finish()[0] == 0
    assert_gone(children, limit_s=1.0)


def test_all_processes_vanish_when_the_launcher_is_killed(launcher: Launcher) -> None:
    launch = launcher.run(
        """
        import multiprocessing

        def stay():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            tell(os.getpid())
            while True:
                pass

        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        multiprocessing.get_context("fork").Process(target=stay, daemon=True).start()
        tell(os.getpid())
        signal.pause()
        """
    )
    workers = launch.hear_processes(4)
    guards = [child for child in psutil.Process(launch.process.pid).children() if child not in workers]
    launch.process.kill()
    assert_gone(workers + guards)


def test_the_command_answers_without_torch() -> None:
    code = "import sys, unisono.launch.cli, unisono.launch.runner; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, cwd=Path(__file__).parent).returncode == 0
