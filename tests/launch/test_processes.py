"""The workers' processes: from the fork server as from a fresh interpreter, and once more in the place of a dead one."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import textwrap
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.launch.conftest import Launcher, assert_gone
from unisono.launch.processes import WorkerProcesses
from unisono.system import fork_server
from unisono.system.fork_server import ForkServer
from unisono.system.reaper import Reaper

pytestmark = pytest.mark.skipif(not fork_server.is_possible(), reason="no fork server on this system")

FACTS = """
import sys, os
modules = sys.modules.copy()
import faulthandler, gc, json, multiprocessing, resource, signal, threading

def stream(file):
    return [
        repr(file), repr(file.buffer), file.line_buffering, file.write_through, file.errors, file.newlines, file.isatty(),
        file.buffer.seekable(), file.fileno(),
    ]

facts = {
    "argv": sys.argv, "orig_argv": sys.orig_argv, "path": sys.path, "flags": repr(sys.flags), "name": __name__, "file": __file__,
    "streams": [stream(file) for file in (sys.stdin, sys.stdout, sys.stderr, sys.__stdin__, sys.__stdout__, sys.__stderr__)],
    "mask": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
    "handlers": [repr(signal.getsignal(signum)).partition(" at ")[0] for signum in signal.valid_signals()],
    "wakeup": signal.set_wakeup_fd(-1),
    "environment": {key: value for key, value in os.environ.items() if key != "UNISONO_LAUNCHER_PID"},
    "descriptors": sorted(os.listdir("/proc/self/fd")), "command": open("/proc/self/cmdline").read(),
    "session": os.getsid(0) == os.getpid() == os.getpgid(0), "folder": os.getcwd(), "umask": os.umask(0o22),
    "collector": [gc.isenabled(), gc.get_threshold()], "faulthandler": faulthandler.is_enabled(),
    "threads": [thread.name for thread in threading.enumerate()], "main": threading.current_thread() is threading.main_thread(),
    "family": [multiprocessing.current_process().name, multiprocessing.parent_process(), multiprocessing.get_start_method()],
    "limits": resource.getrlimit(resource.RLIMIT_NOFILE), "recursion": sys.getrecursionlimit(), "hooks": repr(sys.excepthook),
}
with open(sys.argv[1], "w") as file:
    json.dump(facts, file, default=str)
"""


class Workers:
    """The real processes, without a launcher around them."""

    def __init__(self, folder: Path, *, preload: tuple[str, ...] | None) -> None:
        self.folder = folder
        self._ends = ExitStack()
        self._environment = {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
        reaper = self._ends.enter_context(Reaper())
        path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
        self._environment["PYTHONPATH"] = path
        server = ForkServer(
            environment=self._environment, preload=preload or (), reaper=reaper, label=["script.py", "some", "words"]
        )
        with pytest.MonkeyPatch.context() as patch:
            if preload is None:
                patch.setattr(fork_server, "is_possible", lambda: False)
            self._ends.enter_context(server)
        self.processes = WorkerProcesses(folder, reaper, server)

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self.processes.end(grace_s=0.0)
        self._ends.close()

    def run(self, code: str, *args: str, rank: int = 1) -> int | None:
        script = self.folder / "script.py"
        script.write_text(textwrap.dedent(code))
        self.processes.start(rank, [str(script), *args], self._environment)
        deadline_s = time.monotonic() + 60.0
        while self.processes.running and time.monotonic() < deadline_s:
            signal.sigtimedwait([], 0.02)
            self.processes.poll()
        return self.processes.statuses[-1]


def facts(tmp_path: Path, name: str, **options: Any) -> dict[str, Any]:
    folder = tmp_path / name
    folder.mkdir()
    with Workers(folder, **options) as workers:
        assert workers.run(FACTS, str(folder / "facts")) == 0, (folder / "worker-1.log").read_text()
    found: dict[str, Any] = json.loads((folder / "facts").read_text().replace(str(folder), "FOLDER"))
    return found


def test_a_forked_worker_finds_what_it_finds_in_a_fresh_interpreter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))
    forked = facts(tmp_path, "forked", preload=("multiprocessing", "unisono.launch.worker"))
    fresh = facts(tmp_path, "fresh", preload=None)
    # What was said when the server started is what ps shows; and the test's own module path stands in its environment.
    for found in (forked, fresh):
        found["environment"].pop("PYTHONPATH")
    assert (
        forked.pop("command").split("\0")[1:4] == fresh.pop("command").split("\0")[1:4] == ["-P", "-m", "unisono.launch.worker"]
    )
    assert forked.pop("orig_argv")[:4] == fresh.pop("orig_argv")[:4]
    assert forked == fresh


def test_a_worker_that_the_fork_server_refuses_starts_in_a_fresh_interpreter_and_the_log_says_why(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "threaded.py").write_text(
        "import signal, threading\nthreading.Thread(target=signal.sigwait, args=[{signal.SIGUSR1}], daemon=True).start()"
    )
    caplog.set_level(logging.DEBUG, logger="unisono")
    with Workers(tmp_path, preload=("threaded",)) as workers:
        assert workers.run("import sys; sys.exit('threaded' in sys.modules)") == 0
    assert caplog.messages == [
        "unisono.launch.worker:forked starts in a new interpreter: threads run beside the one that would fork: 1"
    ]


@pytest.mark.parametrize("preload", [None, ("unisono.launch.worker",)])
def test_a_worker_may_start_again_in_the_place_of_one_that_failed(tmp_path: Path, preload: tuple[str, ...] | None) -> None:
    with Workers(tmp_path, preload=preload) as workers:
        assert workers.run("print('first', flush=True); raise ValueError('at first')") == 1
        assert [failure.record.message for failure in workers.processes.failures() if failure.record] == ["at first"]
        assert workers.run("print('second')") == 0
        assert workers.processes.failures() == []
        assert workers.processes.statuses == [0]
    assert (tmp_path / "worker-1.log").read_text() == "first\nsecond\n"


def test_a_killed_fork_server_ends_the_run_and_its_workers_and_is_named(launcher: Launcher) -> None:
    launch = launcher.run(
        """
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        tell(os.getpid())
        while True:
            signal.pause()
        """
    )
    workers = launch.hear_processes(2)
    (server,) = [child for child in psutil.Process(launch.process.pid).children() if "unisono.system.parent" in child.cmdline()]
    assert {worker.ppid() for worker in workers} == {server.pid}
    server.kill()
    status, out, err = launch.finish(limit_s=10.0)
    assert status == 1
    assert err.count(f"the process from which workers start (pid {server.pid}) was killed by SIGKILL") == 1
    assert "Traceback" not in out + err
    assert_gone([*workers, server])
    assert list(launch.temporary.iterdir()) == []


def test_a_stop_of_all_processes_at_once_leaves_the_saving_to_the_workers(launcher: Launcher) -> None:
    launch = launcher.run(
        """
        from unisono.system.signals import StopRequest
        with StopRequest() as stop:
            tell(os.getpid())
            while stop.requested is None:
                signal.sigtimedwait([signal.SIGUSR1], 0.05)
            tell("saved", rank)
            raise SystemExit(128 + stop.requested)
        """
    )
    launch.hear_processes(2)
    for process in psutil.Process(launch.process.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # the launcher passes the stop on, too
            process.terminate()  # as a service manager does
    launch.process.terminate()
    assert launch.hear_all(2) == {("saved", "0"), ("saved", "1")}
    assert launch.finish()[0] == 128 + 15


def test_rank_0_reads_the_input_of_the_launcher_also_in_the_debugger(launcher: Launcher) -> None:
    script = launcher.write(
        """
        if rank == 0:
            print("read", input())
            secret = 42
            breakpoint()
            print("after", sys.stdin.readline().strip())
        """
    )
    command = [sys.executable, "-m", "unisono.launch", "run", "--workers", "2", str(script)]
    done = subprocess.run(command, input="a line\np secret * 2\ncontinue\nlast\n", capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "read a line" in done.stdout
    assert "(Pdb) 84" in done.stdout
    assert "after last" in done.stdout
