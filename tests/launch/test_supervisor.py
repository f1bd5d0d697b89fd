"""`unisono run` on scripts that can go on without one of their workers: who is replaced, and when the run ends."""

from __future__ import annotations

import os
import pty
import signal
import textwrap

import pytest

from tests.launch.conftest import Launch, Launcher, assert_gone

ELASTIC = """
import datetime, torch.distributed as dist
from unisono.world import World

world = World.from_environment()
host, port = world.store.split(":")
store = dist.TCPStore(host, int(port), is_master=False, timeout=datetime.timedelta(seconds=60))
store = dist.PrefixStore(f"unisono/{world.attempt}", store)
store.set("elastic", "1")
kind = "joiner" if world.joins else "founder"
tell(kind, world.attempt, world.uid, os.getpid())

def until(*keys):
    store.wait([*keys])

if world.founders:
    store.set("here/" + world.uid, "1")
for uid in world.founders:  # who dies by itself, dies when all are there; the test may kill one as soon as it has spoken
    while not store.check(["here/" + uid]) and not store.check(["dead/" + uid]):
        signal.sigtimedwait([signal.SIGUSR1], 0.005)
"""


def run(launcher: Launcher, body: str, *, workers: int = 2, options: tuple[str, ...] = ()) -> Launch:
    return launcher.run(ELASTIC + textwrap.dedent(body), workers=workers, options=options)


def hear_workers(launch: Launch, count: int) -> dict[str, int]:
    """The next workers that report themselves, each as "founder 0 0.1"."""
    told = [launch.hear() for _ in range(count)]
    launch.know(int(words[-1]) for words in told)
    return {" ".join(words[:-1]): int(words[-1]) for words in told}


def test_a_killed_worker_is_named_to_the_others_and_another_takes_its_place(launcher: Launcher) -> None:
    launch = run(
        launcher,
        """
        if world.uid == "0.1":
            signal.pause()
        if not world.joins:
            until("dead/0.1")
            tell(store.get("dead/0.1").decode(), world.founders)
            until("over")
        else:
            tell(world.founders, rank, size, world.local_rank)
            store.set("over", "1")
        """,
        workers=3,
    )
    workers = hear_workers(launch, 3)
    assert set(workers) == {"founder 0 0.0", "founder 0 0.1", "founder 0 0.2"}
    os.kill(workers["founder 0 0.1"], signal.SIGKILL)
    told = sorted(" ".join(launch.hear()) for _ in range(4))  # the new worker may speak before the others do
    *_, pid_of_new = told[1].split()
    launch.know([int(pid_of_new)])
    said = "was killed by SIGKILL ('0.0', '0.1', '0.2')"
    assert told == ["() 1 3 1", f"joiner 0 0.3 {pid_of_new}", said, said]
    status, out, err = launch.finish()
    assert (status, out) == (0, "")
    pid = workers["founder 0 0.1"]
    assert f"unisono: worker 1 (pid {pid}) was killed by SIGKILL; a new one starts (restart 1 of 3)\n" in err
    assert list(launch.temporary.iterdir()) == []


def test_a_worker_that_is_told_to_leave_is_not_replaced(launcher: Launcher) -> None:
    launch = run(
        launcher,
        """
        if rank == 1:
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(0 if not store.check(["stop"]) else 1))
            tell("ready")
            signal.pause()
        until("dead/0.1")
        tell(store.get("dead/0.1").decode())
        signal.sigtimedwait([signal.SIGUSR1], 0.5)
        store.set("over", "1")
        """,
    )
    told = [launch.hear() for _ in range(3)]
    (pid,) = [int(words[-1]) for words in told if words[:-1] == ["founder", "0", "0.1"]]
    os.kill(pid, signal.SIGTERM)
    assert launch.hear() == ["ended", "with", "status", "0"]
    status, _, err = launch.finish()
    assert (status, err.count("\n")) == (0, 0)


def test_an_error_of_one_worker_is_survived_and_the_same_error_again_ends_the_run(launcher: Launcher) -> None:
    launch = run(
        launcher,
        """
        if rank == 1:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            raise ValueError("bad sample 7")
        signal.pause()
        """,
    )
    workers = hear_workers(launch, 3)
    assert set(workers) == {"founder 0 0.0", "founder 0 0.1", "joiner 0 0.2"}
    status, _, err = launch.finish(limit_s=10.0)
    assert status == 1
    assert err.count("failed: ValueError: bad sample 7; a new one starts (restart 1 of 3)") == 1
    assert err.count("worker 1 of 2 on ") == err.count("Traceback") == 1
    assert_gone(launch.known)


@pytest.mark.parametrize("workers", [1, 3])
def test_an_error_of_all_workers_ends_the_run_at_once(launcher: Launcher, workers: int) -> None:
    launch = run(launcher, "raise ValueError('batch_size is wrong')", workers=workers)
    hear_workers(launch, workers)
    status, _, err = launch.finish()
    assert status == 1
    assert err.count("ValueError: batch_size is wrong") == 1
    assert "starts" not in err


def test_when_all_are_killed_at_once_all_start_again(launcher: Launcher) -> None:
    launch = run(
        launcher,
        """
        if world.attempt == 0:
            signal.pause()
        print("rank", rank, "speaks", flush=True)
        store.set("over", "1")
        """,
        options=("--max-restarts", "1"),
    )
    for pid in hear_workers(launch, 2).values():
        os.kill(pid, signal.SIGKILL)
    again = hear_workers(launch, 2)
    assert set(again) == {"founder 1 0.2", "founder 1 0.3"}
    status, out, err = launch.finish()
    assert (status, out) == (0, "rank 0 speaks\n")
    assert "was killed by SIGKILL; all workers start again from the last checkpoint (restart 1 of 1)" in err


def test_a_worker_that_cannot_go_on_without_another_makes_all_start_again(launcher: Launcher) -> None:
    launch = run(
        launcher,
        """
        if world.uid == "0.0":
            os.kill(os.getpid(), signal.SIGKILL)
        if world.attempt == 0 and rank == 1:
            until("dead/0.0")
            os._exit(79)
        if world.attempt == 0:
            signal.signal(signal.SIGTERM, lambda *_: tell("nobody asks it"))
            signal.pause()
        store.set("over", "1")
        """,
        workers=3,
    )
    hear_workers(launch, 3)
    first = list(launch.known)
    while "founder 1" not in next(iter(hear_workers(launch, 1))):
        pass  # a newcomer may have been started before the others knew that they cannot go on
    hear_workers(launch, 2)
    assert_gone(first)
    status, _, err = launch.finish()
    assert status == 0
    assert "worker 0 (pid" in err
    assert "all workers start again from the last checkpoint" in err


def test_a_stop_is_announced_before_it_is_passed_on_and_nobody_is_replaced(launcher: Launcher) -> None:
    launch = run(
        launcher,
        """
        def leave(signum, frame):
            announced = int(store.get("stop"))
            if rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            until("dead/0.1")
            tell("saved", announced)
            sys.exit(128 + announced)

        signal.signal(signal.SIGINT, leave)
        tell("ready")
        while True:
            signal.pause()
        """,
    )
    ready = {tuple(launch.hear())[:1] for _ in range(4)}
    assert ready == {("founder",), ("ready",)}
    launch.process.send_signal(signal.SIGINT)
    assert launch.hear() == ["saved", "2"]
    status, _, err = launch.finish()
    assert status == 128 + signal.SIGINT
    assert "starts" not in err


@pytest.mark.parametrize("fresh", [False, True])
def test_every_worker_can_speak_to_the_person(launcher: Launcher, fresh: bool) -> None:
    script = launcher.write(
        "def tell(*words): pass\n"
        + ELASTIC
        + textwrap.dedent("""
        assert not any(map(os.get_inheritable, world.terminal))
        if rank == 1:
            for ours, theirs in zip(world.terminal, (1, 2)):
                os.dup2(ours, theirs)
            print("worker 1 speaks", sys.stdout.isatty())
        store.set("over", "1")
        """)
    )
    if fresh:  # the fork server refuses a folder with such a file
        (launcher.folder / "rich.py").touch()
    ours, theirs = pty.openpty()
    launch = launcher.command("-m", "unisono.launch", "run", "--workers", "2", str(script), terminal=theirs)
    os.close(theirs)
    status = launch.finish()[0]
    shown = os.read(ours, 4096).decode()
    os.close(ours)
    assert (status, shown) == (0, "worker 1 speaks True\r\n")


def test_a_worker_left_behind_under_sigstop_does_not_keep_the_run_from_ending(launcher: Launcher) -> None:
    launch = run(
        launcher,
        """
        if rank == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        signal.sigtimedwait([signal.SIGUSR1], 0.3)
        store.set("over", "1")
        """,
    )
    hear_workers(launch, 2)
    assert launch.finish(limit_s=20.0)[0] == 0
    assert_gone(launch.known)
