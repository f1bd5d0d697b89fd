"""`unisono run`, when a person or a scheduler asks it to stop."""

from __future__ import annotations

import signal
import time

import pytest

from tests.launch.conftest import Launcher, assert_gone

SAVES = """
import time
from unisono.system.signals import StopRequest

with StopRequest() as stop:
    tell(os.getpid())
    while stop.requested is None:
        signal.sigtimedwait([signal.SIGUSR1], 0.05)
    tell("saved", rank, stop.requested.name)
    raise SystemExit(128 + stop.requested)
"""


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_lets_every_worker_save_and_leaves_quietly(launcher: Launcher, signum: signal.Signals) -> None:
    launch = launcher.run(SAVES)
    workers = launch.hear_processes(2)
    if signum == signal.SIGINT:
        launch.signal_group(signum)
    else:
        launch.process.send_signal(signum)
    assert launch.hear_all(2) == {("saved", "0", signum.name), ("saved", "1", signum.name)}
    status, out, err = launch.finish()
    assert status == 128 + signum
    assert "Traceback" not in out + err
    assert "failed" not in err
    assert_gone(workers)
    assert list(launch.temporary.iterdir()) == []


def test_a_stop_that_reaches_one_worker_only_still_lets_all_save(launcher: Launcher) -> None:
    launch = launcher.run(SAVES)
    launch.hear_processes(2)[0].terminate()
    assert len(launch.hear_all(2)) == 2
    status, _, err = launch.finish()
    assert status == 128 + signal.SIGTERM
    assert "Traceback" not in err


def test_plain_scripts_stop_without_a_traceback(launcher: Launcher) -> None:
    launch = launcher.run("tell(os.getpid()); signal.pause()")
    workers = launch.hear_processes(2)
    launch.signal_group(signal.SIGINT)
    status, out, err = launch.finish()
    assert status == 128 + signal.SIGINT
    assert "Traceback" not in out + err
    assert "KeyboardInterrupt" not in out + err
    assert_gone(workers)


def test_a_worker_that_waits_for_one_that_died_of_the_stop_is_ended(launcher: Launcher) -> None:
    launch = launcher.run(
        """
        if rank == 0:
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        tell(os.getpid())
        signal.pause()
        """
    )
    workers = launch.hear_processes(2)
    launch.process.send_signal(signal.SIGINT)
    assert launch.finish(limit_s=20.0)[0] == 128 + signal.SIGINT
    assert_gone(workers)


def test_a_failure_while_stopping_is_reported(launcher: Launcher) -> None:
    launch = launcher.run(
        SAVES.replace("    raise SystemExit(", "    if rank:\n        raise OSError('disk full')\n    raise SystemExit(")
    )
    launch.hear_processes(2)
    launch.process.terminate()
    status, _, err = launch.finish()
    assert status == 1
    assert err.count("OSError: disk full") == 1


def test_workers_that_do_not_stop_are_ended_after_the_grace(launcher: Launcher) -> None:
    launch = launcher.run(
        "signal.signal(signal.SIGTERM, signal.SIG_IGN); tell(os.getpid()); signal.pause()", options=("--grace", "0.3")
    )
    workers = launch.hear_processes(2)
    launch.process.terminate()
    status, _, err = launch.finish(limit_s=10.0)
    assert status == 128 + signal.SIGTERM
    assert "0.3 s after the stop" in err
    assert_gone(workers)


def test_a_later_second_ctrl_c_ends_workers_at_once(launcher: Launcher) -> None:
    launch = launcher.run(
        """
        signal.signal(signal.SIGINT, lambda *_: tell("asked"))
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        tell(os.getpid())
        while True:
            signal.pause()
        """
    )
    workers = launch.hear_processes(2)
    launch.signal_group(signal.SIGINT)
    launch.hear_all(2)
    deadline_s = time.monotonic() + 20.0
    while launch.process.poll() is None:  # as an impatient person: within 2 s it is the same Ctrl-C, then it is not
        assert time.monotonic() < deadline_s
        launch.signal_group(signal.SIGINT)
        signal.sigtimedwait([], 0.5)
    status, out, err = launch.finish()
    assert status == 128 + signal.SIGINT
    assert "Traceback" not in out + err
    assert_gone(workers)
