"""`unisono run`, when a worker fails: everyone ends soon, and the cause is told once."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from tests.launch.conftest import Launcher, assert_gone


@pytest.mark.alone
def test_a_failing_worker_ends_all_within_five_seconds_with_its_own_traceback_once(launcher: Launcher) -> None:
    launch = launcher.run(
        """
        dist = gloo()
        import torch
        if rank == 2:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        tell(os.getpid())
        dist.barrier()
        if rank == 1:
            def load():
                raise KeyError("missing label")
            tell("fails")
            load()
        if rank == 2:
            while True:
                pass
        dist.all_reduce(torch.ones(1))
        """,
        workers=3,
    )
    workers = launch.hear_processes(3)
    assert launch.hear() == ["fails"]
    began_s = time.monotonic()
    status, _, err = launch.finish(limit_s=5.0)
    assert_gone(workers, limit_s=max(0.1, began_s + 5.0 - time.monotonic()))
    assert status == 1
    assert err.count("Traceback") == err.count("KeyError: 'missing label'") == 1
    assert "worker 1 of 3 on " in err
    assert "in load" in err
    assert "runpy" not in err
    assert "closed by peer" not in err.lower()


def test_a_killed_worker_is_named_and_not_those_that_lost_contact_with_it(launcher: Launcher) -> None:
    launch = launcher.run(
        """
        dist = gloo()
        import torch
        dist.barrier()
        if rank == 1:
            print("last words", flush=True)
            tell(os.getpid())
            os.kill(os.getpid(), signal.SIGKILL)
        dist.all_reduce(torch.ones(1))
        """,
        workers=3,
    )
    pid = launch.hear()[0]
    status, _, err = launch.finish(limit_s=5.0)
    assert status == 128 + 9
    assert "worker 1 of 3 on " in err
    assert f"(pid {pid}) was killed by SIGKILL" in err
    assert "  last words" in err
    assert "the run is over: the other workers go on without one only once all have made a Trainer" in err
    assert "Traceback" not in err
    (folder,) = launch.temporary.iterdir()
    assert (folder / "worker-1.log").read_text() == "last words\n"


def test_a_cause_that_is_recorded_after_its_consequence_is_still_found(launcher: Launcher, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "farewell")
    launch = launcher.run(
        """
        from unisono.errors import WorkerFailure
        if rank == 0:
            open(sys.argv[1]).read()
            raise WorkerFailure("worker 0 lost contact with another worker")
        try:
            raise ValueError("the cause")
        finally:  # a slow farewell, while the others notice first
            open(sys.argv[1], "w").close()
            signal.sigtimedwait([signal.SIGUSR1], 0.5)
        """,
        str(tmp_path / "farewell"),
    )
    status, _, err = launch.finish()
    assert status == 1
    assert "worker 1 of 2" in err
    assert err.count("ValueError: the cause") == 1
    assert "lost contact" not in err


def test_a_lost_contact_without_known_cause_is_reported(launcher: Launcher) -> None:
    launch = launcher.run(
        """
        from unisono.errors import WorkerFailure
        if rank == 1:
            raise WorkerFailure("lost contact with worker 0", step=12)
        signal.pause()
        """
    )
    status, _, err = launch.finish()
    assert status == 1
    assert "failed in step 12: WorkerFailure: lost contact with worker 0" in err


def test_an_error_of_all_workers_is_told_once_and_without_traceback_if_it_is_ours(launcher: Launcher) -> None:
    launch = launcher.run("from unisono.world import World; World.from_environment().at_most(1)", workers=3)
    status, out, err = launch.finish()
    assert status == 1
    assert err.count("3 workers but only 1 microbatches") == 1
    assert "ConfigurationError" in err
    assert "Traceback" not in out + err


def test_the_exit_status_of_a_script_is_kept(launcher: Launcher) -> None:
    launch = launcher.run(
        """
        if rank == 1:
            sys.exit(3)
        signal.pause()
        """
    )
    status, _, err = launch.finish()
    assert status == 3
    assert err.count("ended with exit status 3") == 1
    assert "Traceback" not in err


def test_the_message_of_an_exit_is_told_once(launcher: Launcher) -> None:
    status, out, err = launcher.run("sys.exit('no such data set')").finish()
    assert status == 1
    assert (out + err).count("no such data set") == 1
    assert "Traceback" not in err


def test_a_worker_that_hangs_on_its_way_out_is_ended(launcher: Launcher) -> None:
    launch = launcher.run(
        """
        import atexit, threading
        threading.Thread(target=signal.sigwait, args=[{signal.SIGUSR1}]).start()
        atexit.register(signal.sigtimedwait, [signal.SIGUSR1], 60)
        raise ValueError("the cause")
        """,
        workers=1,
    )
    status, _, err = launch.finish()
    assert status == 1
    assert err.count("ValueError: the cause") == 1
