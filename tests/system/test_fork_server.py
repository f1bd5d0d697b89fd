"""The fork server: a child of it is what a new interpreter would be, or it is refused."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.launch.conftest import assert_gone
from unisono.errors import WorkerFailure
from unisono.system.fork_server import BLOCKED_SIGNALS, Child, ForkServer, Refusal, is_possible, wait_for_end
from unisono.system.reaper import Reaper, end_processes

pytestmark = pytest.mark.skipif(not is_possible(), reason="no fork server on this system")

CHORES = """
import atexit, json, os, random, signal, sys

def note(*words):
    with open(os.environ["NOTES"], "a") as notes:
        notes.write(json.dumps(words) + "\\n")

atexit.register(lambda: note("atexit", os.getpid()))

def ends(spec):
    exec(spec["code"])

def waits(spec):
    signal.pause()

def draws(spec):
    import numpy, torch, multiprocessing
    note(random.random(), numpy.random.rand(), torch.initial_seed(), multiprocessing.current_process().authkey.hex())

def tells(spec):
    print(sys.stdin.readline().strip(), dict(os.environ), os.getsid(0) == os.getpid())
    print(sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])), file=sys.stderr)
"""

Make = Callable[..., ForkServer]


class Place:
    """Where the test's module lies, and what its functions note down."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.notes_file = folder / "notes"
        self.notes_file.touch()
        (folder / "chores.py").write_text(CHORES)

    @property
    def notes(self) -> list[list[Any]]:
        return [json.loads(line) for line in self.notes_file.read_text().splitlines()]

    @property
    def environment(self) -> dict[str, str]:
        path = os.pathsep.join([str(self.folder), *filter(None, [os.environ.get("PYTHONPATH")])])
        return {"PYTHONPATH": path, "NOTES": str(self.notes_file), "OMP_NUM_THREADS": "1"}


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.fixture
def make(place: Place) -> Iterator[Make]:
    """Makes fork servers, which end with the test."""
    with ExitStack() as ends:
        reaper = ends.enter_context(Reaper())

        def make(*preload: str, reaper: Reaper = reaper, **environment: str) -> ForkServer:
            server = ForkServer(environment={**place.environment, **environment}, preload=preload, reaper=reaper)
            return ends.enter_context(server)

        yield make


def start(server: ForkServer, place: Place, function: str, *, streams: Mapping[int, int] | None = None, **spec: Any) -> Child:
    return server.start(
        f"chores:{function}",
        spec,
        fresh=None,
        environment={**os.environ, **place.environment},
        streams={1: 1, 2: 2} if streams is None else streams,
        folder=place.folder,
    )


def finish(server: ForkServer, child: Child) -> int:
    while child.returncode is None:
        server.listen(limit_s=None)
    return child.returncode


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("pass", 0),
        ("sys.exit(3)", 3),
        ("sys.exit('words')", 1),
        ("raise ValueError('not a status')", 1),
        ("os.kill(os.getpid(), signal.SIGKILL)", -9),
        ("import threading; threading.Thread(target=os._exit, args=[7]).start()", 7),
    ],
)
def test_a_child_ends_with_the_status_that_an_interpreter_would_have(make: Make, place: Place, code: str, status: int) -> None:
    server = make()
    with Path(os.devnull).open("wb") as nothing:
        child = start(server, place, "ends", code=code, streams={1: 1, 2: nothing.fileno()})
        assert finish(server, child) == status


def test_the_functions_for_the_end_run_once_in_each_child_and_never_in_the_server(make: Make, place: Place) -> None:
    server = make("chores")
    children = [start(server, place, "ends", code="pass") for _ in range(2)]
    for child in children:
        finish(server, child)
    server._channel.shutdown(socket.SHUT_WR)  # it ends by itself, not killed as by close()
    while server.status is None:
        server.listen(limit_s=None)
    assert server.status == 0
    assert sorted(place.notes) == sorted(["atexit", child.pid] for child in children)


def test_a_child_has_its_own_environment_streams_and_session_and_blocks_stops(make: Make, place: Place) -> None:
    server = make("chores", ONLY_THE_SERVERS="1")
    inputs, words = os.pipe()
    os.write(words, b"hello\n")
    out, err = (os.open(place.folder / name, os.O_RDWR | os.O_CREAT) for name in ("out", "err"))
    child = server.start(
        "chores:tells",
        {},
        fresh=None,
        environment={"NOTES": str(place.notes_file), "MY_RANK": "5"},
        streams={0: inputs, 1: out, 2: err},
    )
    assert finish(server, child) == 0
    for descriptor in (inputs, words, out, err):
        os.close(descriptor)
    environment = {"NOTES": str(place.notes_file), "MY_RANK": "5"}
    assert (place.folder / "out").read_text() == f"hello {environment} True\n"
    assert (place.folder / "err").read_text() == f"{sorted(BLOCKED_SIGNALS)}\n"


def test_streams_that_are_not_given_are_closed(make: Make, place: Place) -> None:
    server = make()
    code = "open_now = os.listdir('/proc/self/fd'); note(sys.stdin, sys.stdout, sys.stderr, len(open_now))"
    child = start(server, place, "ends", code=code, streams={})
    assert finish(server, child) == 0
    assert place.notes[0] == [None, None, None, 1]  # the one that lists them


def test_a_child_holds_nothing_of_the_server_or_of_its_siblings(make: Make, place: Place) -> None:
    server = make()
    start(server, place, "waits")
    child = start(server, place, "ends", code="note(sorted(map(int, os.listdir('/proc/self/fd'))))")
    assert finish(server, child) == 0
    assert place.notes[0] == [[0, 1, 2]]  # 0, which was not given, is the listing itself


def test_random_numbers_differ_between_children(make: Make, place: Place) -> None:
    server = make("chores", "numpy", "torch", "multiprocessing")
    for child in [start(server, place, "draws") for _ in range(2)]:
        assert finish(server, child) == 0
    first, second = (note for note in place.notes if note[0] != "atexit")
    assert all(one != other for one, other in zip(first, second, strict=True))


def test_no_child_is_forked_beside_a_thread(make: Make, place: Place) -> None:
    (place.folder / "threaded.py").write_text(
        "import signal, threading\nthreading.Thread(target=signal.sigwait, args=[{signal.SIGUSR1}], daemon=True).start()"
    )
    with pytest.raises(Refusal, match="threads run beside the one that would fork: 1"):
        start(make("threaded"), place, "ends", code="pass")


def test_threads_that_end_for_a_fork_are_no_reason_to_refuse(make: Make, place: Place) -> None:
    server = make("numpy", OMP_NUM_THREADS="2", OPENBLAS_NUM_THREADS="2")
    code = "import numpy; square = numpy.ones((300, 300)); note((square @ square).sum())"
    child = start(server, place, "ends", code=code)
    assert finish(server, child) == 0
    assert place.notes[0] == [300.0**3]


def test_no_child_is_forked_after_an_import_that_failed(make: Make, place: Place) -> None:
    (place.folder / "broken.py").write_text("raise ZeroDivisionError('half way')")
    with pytest.raises(Refusal, match="broken could not be imported: ZeroDivisionError: half way"):
        start(make("broken"), place, "ends", code="pass")


@pytest.mark.parametrize("file", ["calendar.py", "calendar/__init__.py"])
def test_no_child_is_forked_whose_folder_shadows_what_is_imported(make: Make, place: Place, tmp_path: Path, file: str) -> None:
    server = make("calendar")
    start(server, place, "ends", code="pass")
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).touch()
    with pytest.raises(Refusal, match=r"comes before the calendar that is already imported"):
        start(server, place, "ends", code="pass")


def test_folders_that_imports_make_in_advance_are_removed(make: Make, place: Place) -> None:
    (place.folder / "maker.py").write_text("import os\nos.makedirs('" + str(place.folder / "cache/inner") + "')")
    server = make("maker")
    finish(server, start(server, place, "ends", code="pass"))
    assert not (place.folder / "cache").exists()


def test_a_child_that_the_reaper_did_not_know_yet_ends_without_a_deed(make: Make, place: Place) -> None:
    class Interrupted(Reaper):
        """As if the asking process ended just before it told its reaper."""

        def add(self, pid: int) -> None:
            if known:
                raise KeyboardInterrupt
            known.append(pid)

    known: list[int] = []
    with Interrupted() as reaper:
        server = make(reaper=reaper)
        with pytest.raises(KeyboardInterrupt):
            start(server, place, "ends", code="note('a deed')")
        (child,) = server._children.values()
        assert finish(server, child) == 1
        assert place.notes == []
        server.close()


def test_a_killed_server_is_a_failure_and_the_ends_of_its_children_are_still_seen(make: Make, place: Place) -> None:
    server = make()
    child = start(server, place, "waits")
    os.kill(server.pid, signal.SIGKILL)
    while server.status is None:
        server.listen(limit_s=None)
    assert child.poll() is None
    assert "was killed by SIGKILL" in str(server.failure)
    process = psutil.Process(child.pid)
    child.send_signal(signal.SIGKILL)
    assert_gone([process])
    assert child.poll() == -signal.SIGKILL
    with pytest.raises(WorkerFailure, match="was killed by SIGKILL"):
        start(server, place, "waits")


def test_a_server_that_is_left_ends_its_children(make: Make, place: Place) -> None:
    server = make()
    child = start(server, place, "waits")
    processes = [psutil.Process(child.pid), psutil.Process(server.pid)]
    server.close()
    assert_gone(processes)


def test_modules_can_be_imported_later_and_one_that_fails_is_left_to_the_children(make: Make, place: Place) -> None:
    (place.folder / "broken.py").write_text("raise ZeroDivisionError")
    (place.folder / "later.py").write_text("calls = []\ndef warm_up():\n    calls.append('warm')")
    server = make()
    server.preload(["broken", "later"], then="later:warm_up")
    child = start(server, place, "ends", code="note('broken' in sys.modules, sys.modules['later'].calls)")
    assert finish(server, child) == 0
    assert place.notes[0] == [False, ["warm"]]


def test_where_a_fork_is_refused_a_new_interpreter_does_the_same(make: Make, place: Place) -> None:
    (place.folder / "broken.py").write_text("raise ZeroDivisionError")
    server, nothing = make("broken"), os.open(os.devnull, os.O_RDWR)
    child = server.start(
        "chores:ends",
        {"code": "note(os.getppid(), os.getsid(0) == os.getpid(), *sorted(signal.pthread_sigmask(0, []))); sys.exit(3)"},
        environment={**os.environ, **place.environment},
        streams=dict.fromkeys(range(3), nothing),
    )
    os.close(nothing)
    while child.poll() is None:
        wait_for_end([child], 60.0)
    assert child.returncode == 3
    assert place.notes[0] == [os.getpid(), True, *BLOCKED_SIGNALS]


def test_several_threads_may_start_children_and_wait_for_them(make: Make, place: Place) -> None:
    server = make("chores")

    def run(status: int) -> int:
        child = start(server, place, "ends", code=f"sys.exit({status})")
        while child.poll() is None:
            wait_for_end([child], 60.0)
        assert child.returncode is not None
        return child.returncode

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(run, range(40))) == list(range(40))


def test_a_child_ends_with_everything_that_it_started(make: Make, place: Place) -> None:
    server = make("chores")
    code = "import subprocess; note(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(99)']).pid); signal.pause()"
    child, other = start(server, place, "ends", code=code), start(server, place, "waits")
    while not place.notes:
        wait_for_end([child], 0.01)
    processes = [psutil.Process(child.pid), psutil.Process(place.notes[0][0])]
    end_processes([child.pid])
    assert_gone(processes)
    assert finish(server, child) == -signal.SIGKILL
    assert other.poll() is None
