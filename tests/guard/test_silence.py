"""A worker that does not arrive is named by the others: who, where, since when, and its stacks."""

from __future__ import annotations

import gc
import multiprocessing
import os
import re
import select
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from tests.launch.conftest import Launcher, assert_gone, launcher
from unisono import Callback, Trainer
from unisono.collective import Collective
from unisono.collective.base import Lookout
from unisono.errors import ConfigurationError, WorkerFailure
from unisono.guard.silence import SilenceWatch
from unisono.observe.timing import StepClock
from unisono.testing import run_threads

__all__ = ["launcher"]

TRANSPORTS = ["gloo", "shared memory"]
HANGS_IN = 3  # step


class Net(nn.Module):
    """Hangs in forward, on one worker."""

    def __init__(self, hang: Callable[[], None] | None) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 1)
        self.hang = hang
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.hang is not None and self.calls == HANGS_IN:
            self.hang()
        out: Tensor = self.linear(x)
        return out


def make(collective: Collective, hang: Callable[[], None] | None = None, **settings: Any) -> Trainer:
    torch.manual_seed(0)
    model = Net(hang)
    return Trainer(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        lambda model, batch: model(batch[0]).square().mean(),
        batch_size=collective.size,
        microbatches=collective.size,
        collective=collective,
        **settings,
    )


def data(collective: Collective, steps: int = 8) -> TensorDataset:
    return TensorDataset(torch.ones(steps * collective.size, 4))


class Others:
    """The processes of the other workers: whoever hangs goes on once they have had their say, which ends them."""

    def __init__(self, pids: list[int]) -> None:
        self.pids = pids
        self._ends = list(map(os.pidfd_open, pids))

    def gone(self, limit_s: float) -> bool:
        for end in self._ends:
            poll = select.poll()
            poll.register(end, select.POLLIN)
            if not poll.poll(limit_s * 1000):
                return False
        return True


Hang = Callable[[Others], None]


def sleeps(others: Others) -> None:
    assert others.gone(30)


def spins(others: Others) -> None:
    """Holds the interpreter nearly all the time, in C."""
    while not others.gone(0):
        sum(range(30_000_000))


def is_stopped(others: Others) -> None:
    """Stops this process, and has it go on once the others are gone."""
    wait = "".join(f"while kill -0 {pid} 2> /dev/null; do sleep 0.1; done; " for pid in others.pids)
    subprocess.Popen(["sh", "-c", f"{wait} kill -CONT {os.getpid()}"], close_fds=True)
    os.kill(os.getpid(), signal.SIGSTOP)


def outcome(collective: Collective, hang: Hang, odd: int, timeout_s: float) -> tuple[str, Any, float]:
    """What a worker ended with, and how long after the last step that it did."""
    steps = [time.monotonic()]

    class Times(Callback):
        def on_step(self, trainer: Any, result: Any) -> None:
            steps.append(time.monotonic())

    pids = [int(text) for text in collective.all_gather_bytes(b"%d" % os.getpid())]
    others = Others([pid for pid in pids if pid != os.getpid()])
    mine = partial(hang, others) if collective.rank == odd else None
    trainer = make(collective, mine, timeout_s=timeout_s, callbacks=[Times()])
    try:
        trainer.fit(data(collective), 1)
    except WorkerFailure as error:
        return str(error), (error.rank, error.step, error.traceback == str(error)), time.monotonic() - steps[-1]
    finally:
        collective.barrier = lambda: None  # type: ignore[method-assign]  # there is nobody left to meet
    return "", None, 0.0


def hanging(
    run_workers: Callable[..., Any],
    transport: Any,
    hang: Hang,
    *,
    size: int = 2,
    odd: int = 1,
    timeout_s: float = 1.0,
) -> list[Any]:
    outcomes = run_workers(size, outcome, hang, odd, timeout_s, transport=transport)
    others = [one for rank, one in enumerate(outcomes) if rank != odd]
    for _, _, seconds in others:
        assert timeout_s * 0.9 < seconds < timeout_s + 3
    return [*others, outcomes[odd]]


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_worker_that_sleeps_in_its_model_is_named_with_step_phase_and_stack(
    transport: Any, run_workers: Callable[..., Any]
) -> None:
    (text, facts, _), (own, _, _) = hanging(run_workers, transport, sleeps)
    assert facts == (1, HANGS_IN, True)
    assert re.search(r"worker 1 \(host \S+, process \d+\) did not arrive within 1 s: worker 0 waited for it in step 3", text)
    assert re.search(r"It is in step 3, in phase 'compute', for [12]\.\d s, and its process is sleeping", text)
    assert re.search(r"test_silence.py\", line \d+ in sleeps\n.*test_silence.py\", line \d+ in forward", text)
    assert text.count("in sleeps") == 1
    assert "lost contact" in own


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_worker_that_holds_the_interpreter_shows_its_stack_all_the_same(
    transport: Any, run_workers: Callable[..., Any]
) -> None:
    (text, facts, _), _ = hanging(run_workers, transport, spins)
    assert facts == (1, HANGS_IN, True)
    assert "its process is running" in text
    assert re.search(r"line \d+ in spins\n", text)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_worker_that_was_stopped_is_said_to_be(transport: Any, run_workers: Callable[..., Any]) -> None:
    (text, facts, _), _ = hanging(run_workers, transport, is_stopped)
    assert facts == (1, HANGS_IN, True)
    assert "in phase 'compute'" in text
    assert "its process is stopped, for instance by SIGSTOP: kill -CONT continues it. A stopped process shows no stacks" in text
    assert "Stacks of" not in text


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_of_several_workers_those_who_wait_are_not_blamed(transport: Any, run_workers: Callable[..., Any]) -> None:
    *others, _ = hanging(run_workers, transport, sleeps, size=3, odd=0)
    told = [(text, facts) for text, facts, _ in others if "did not arrive" in text]
    assert told
    for text, facts in told:
        assert facts == (0, HANGS_IN, True)
        assert text.count("in sleeps") == 1
    assert all("lost contact" in text for text, _, _ in others if "did not arrive" not in text)


def blamed(collective: Collective, waits_for: list[int], peer: int) -> int | None:
    """Whom worker 2 blames for the absence of ``peer`` when the others wait as told."""
    watch = SilenceWatch.begin(collective, 30.0)
    watch.wait_for(waits_for[collective.rank])
    collective.lookout = Lookout()  # the barriers below must not change what is shown
    collective.barrier()
    found = watch.silence(2, peer, 1.0).rank if collective.rank == 2 else None
    collective.barrier()
    return found


@pytest.mark.parametrize(
    ("waits_for", "peer", "guilty"),
    [([-1, 0, 1], 1, 0), ([-1, 0, 0], 0, 0), ([1, 0, 1, -1], 1, 3), ([2, -1, 0], 0, 1)],
    ids=["a chain", "directly", "two in a circle", "who waits for the one who asks"],
)
def test_blame_follows_who_waits_for_whom(waits_for: list[int], peer: int, guilty: int, run_workers: Callable[..., Any]) -> None:
    assert run_workers(len(waits_for), blamed, waits_for, peer, transport="shared memory")[2] == guilty


def stacks_of_all_threads(collective: Collective) -> str:
    """Two of three workers look at the third at the same moment."""
    watch = SilenceWatch.begin(collective, 30.0)
    done = threading.Event()

    def idle() -> None:
        done.wait(60)

    thread = threading.Thread(target=idle)
    thread.start()
    collective.barrier()
    text = str(watch.silence(collective.rank, 0, 1.0)) if collective.rank else ""
    collective.barrier()
    done.set()
    thread.join()
    return text


def test_all_threads_are_shown_and_once_to_each_who_asks(run_workers: Callable[..., Any]) -> None:
    for text in run_workers(3, stacks_of_all_threads, transport="shared memory")[1:]:
        assert text.count("in idle") == 1
        assert text.count("in stacks_of_all_threads") == 1


def boards() -> list[Path]:
    """Descriptors of this process that belong to boards."""
    return [fd for fd in Path("/proc/self/fd").iterdir() if fd.is_symlink() and "unisono-board" in str(fd.readlink())]


ONE_BOARD = 3  # itself, its mapping's, and that of the stacks


def what_is_left(collective: Collective) -> tuple[int, int]:
    before = caught()
    for _ in range(2):
        trainers = [make(collective, timeout_s=30.0) for _ in range(3)]
        for trainer in trainers:
            trainer.fit(data(collective, 2), 1)
        del trainer, trainers
    gc.collect()
    return len(boards()), (int(before, 16) ^ int(caught(), 16)).bit_count()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_many_trainers_leave_the_board_of_one_and_its_signal(transport: Any, run_workers: Callable[..., Any]) -> None:
    for descriptors, signals in run_workers(2, what_is_left, transport=transport):
        assert descriptors == ONE_BOARD  # the collective keeps the last one
        assert signals == 1


def caught() -> str:
    """The signals that this process has handlers for, hexadecimal."""
    return next(line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("SigCgt"))


def _tell(pipe: Any) -> None:
    pipe.send((len(boards()), caught()))


def forked(collective: Collective) -> tuple[int, int, bool]:
    before = caught()
    watch = SilenceWatch.begin(collective, 30.0)
    mine, theirs = multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(target=_tell, args=(theirs,))
    child.start()
    in_child, caught_in_child = mine.recv()
    child.join()
    here = len(boards())
    watch.wait_for(-1)
    return here, in_child, caught_in_child == before


def test_a_forked_loader_process_holds_no_board_and_answers_no_signal(run_workers: Callable[..., Any]) -> None:
    for here, in_child, quiet in run_workers(2, forked):
        assert here == ONE_BOARD
        assert in_child == 0
        assert quiet


def test_a_time_limit_below_a_second_is_refused() -> None:
    for wrong in (0.5, float("nan"), float("inf")):
        with pytest.raises(ConfigurationError, match="timeout_s must be 1 or more seconds"):
            run_threads(1, lambda collective, wrong=wrong: make(collective, timeout_s=wrong))  # type: ignore[misc]


def test_the_clock_shows_phase_step_and_since_when() -> None:
    now = [10.0]
    shown = [0.0] * 3
    clock = StepClock(clock=lambda: now[0], shown=shown)
    clock.at(7)
    with clock.phase("compute"):
        now[0] = 12.0
        with clock.phase("waiting"):
            assert shown == [3, 12.0, 7]
        assert shown == [1, 12.0, 7]
    assert shown == [4, 12.0, 7]
    with clock.pause():
        now[0] = 20.0
        assert shown == [5, 12.0, 7]
    now[0] = 21.0
    clock.start("data")
    assert shown == [0, 21.0, 7]
    clock.stop()
    clock.lap()
    assert shown[2] == 8


# ---------------------------------------------------------------------- under the launchers

SCRIPT = """
import time
import torch, unisono
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 1)
        self.calls = 0
    def forward(self, x):
        self.calls += 1
        if self.calls == 3 and ("again" in sys.argv or (rank == 1 and not os.environ.get("UNISONO_JOINS"))):
            hang()
        return self.linear(x)

def hang():
    tell(os.getpid())
    time.sleep(100)

def fail():
    tell("fails")
    raise KeyError("missing label")

if "fail" in sys.argv:
    hang = fail
torch.manual_seed(0)
model = Net()
trainer = unisono.Trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), lambda m, b: m(b[0]).square().mean(),
                          batch_size=size, microbatches=size, timeout_s=1.0, run_dir=sys.argv[1])
trainer.fit(torch.utils.data.TensorDataset(torch.ones((800 if "once" in sys.argv else 8) * size, 4)), 1)
"""


def test_under_the_launcher_the_silent_worker_is_named_and_left_behind(launcher: Launcher, tmp_path: Path) -> None:
    launch = launcher.run(SCRIPT, str(tmp_path / "run"), "once", workers=3)
    silent = launch.hear_processes(1)
    assert_gone(silent, limit_s=1.0 + 5.0)
    status, out, err = launch.finish()
    assert status == 0
    assert f"process {silent[0].pid}) did not arrive within 1 s" in out
    assert "in phase 'compute'" in out
    assert out.count("in hang") == 1
    assert f"process {silent[0].pid}) was killed by SIGKILL" in out or f"process {silent[0].pid}) was lost" in out
    assert f"(pid {silent[0].pid}) was killed by SIGKILL; a new one starts (restart 1 of 3)" in err


def torchrun(launcher: Launcher, *args: str) -> Any:
    path = str(launcher.write(SCRIPT))
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", path, *args]
    return launcher.command(*command)


def test_under_torchrun_a_worker_that_raises_ends_all_within_five_seconds(launcher: Launcher, tmp_path: Path) -> None:
    launch = torchrun(launcher, str(tmp_path / "run"), "fail")
    assert launch.hear() == ["fails"]
    status, out, err = launch.finish(limit_s=5.0)
    assert status == 1
    assert (out + err).count("KeyError: 'missing label'") == 1


def test_under_the_launcher_an_error_that_comes_again_ends_all_within_five_seconds(launcher: Launcher, tmp_path: Path) -> None:
    launch = launcher.run(SCRIPT, str(tmp_path / "run"), "fail", "again", workers=3)
    assert launch.hear() == ["fails"]
    status, out, err = launch.finish(limit_s=5.0)
    assert status == 1
    assert (out + err).count("Traceback") == 1
    assert "KeyError: 'missing label'" in err
    assert "in fail" in err
    assert "lost contact" not in err


def test_under_the_launcher_an_error_that_does_not_come_again_is_survived(launcher: Launcher, tmp_path: Path) -> None:
    launch = launcher.run(SCRIPT, str(tmp_path / "run"), "fail", "once", workers=3)
    assert launch.hear() == ["fails"]
    status, _, err = launch.finish()
    assert status == 0
    assert "failed: KeyError: 'missing label'; a new one starts (restart 1 of 3)" in err


def test_under_torchrun_the_silent_worker_is_named(launcher: Launcher, tmp_path: Path) -> None:
    launch = torchrun(launcher, str(tmp_path / "run"))
    (silent,) = launch.hear_processes(1)
    others = [process for process in psutil.Process(launch.process.pid).children() if process.pid != silent.pid]
    assert_gone(others, limit_s=1.0 + 5.0)
    silent.kill()  # torchrun itself would wait half a minute for it
    status, out, err = launch.finish()
    assert status == 1
    assert f"process {silent.pid}) did not arrive within 1 s" in out + err
    assert "in hang" in out + err
