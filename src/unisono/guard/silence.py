"""A worker that does not arrive is named by those who wait for it: where it is, what it does, and its stacks.

Whoever hangs cannot speak for itself. So each worker keeps a small *board*, memory that the others can open through
``/proc/PID/fd`` while it hangs: the step, the phase, and whom it waits for. And it registers a signal on which Python's
``faulthandler`` writes the stacks of all threads into a second such memory, also while C code holds the interpreter. Neither
needs a thread, a file with a name, or the hanging worker's consent.

Workers of another host (or container) cannot be looked at: of them is said what is known, and where to look.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import fcntl
import json
import mmap
import os
import signal
import socket
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from unisono.collective.base import Collective, Lookout, LostWorker
from unisono.observe.timing import OUTSIDE, PAUSED, PHASE, PHASES, SINCE, STEP, Shown

_WAITS_FOR = STEP + 1
_CELLS = _WAITS_FOR + 1
_CELL_BYTES = 8  # a float64
_NAME = "unisono-board"
_DUMP_S = 1.0
"""How long a worker that runs may take to write its stacks."""
_SETTLED_S = 0.05
_POLL_S = 0.005
_FRESH_S = 10.0
"""Stacks of this age serve all who ask: they wait for the same worker."""
_TEXT_BYTES = 32 * 1024

_PHASE_TEXTS = {
    **{number: f"phase {name!r}" for number, name in enumerate(PHASES)},
    OUTSIDE: "no phase (a callback, a checkpoint, or code around the step)",
    PAUSED: "an evaluation",
}
_STATES = {
    "R": "running",
    "S": "sleeping",
    "D": "in disk sleep",
    "T": "stopped",
    "t": "held by a debugger",
    "Z": "dead",
    "X": "dead",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Identity:
    """Which process a worker is, and how to look at it."""

    host: str
    place: str
    """The machine since its last start, and the process namespace: where ``pid`` means this process."""
    pid: int
    started: int
    """When, in clock ticks since the machine's start: tells it from a later process of the same number."""
    board: int = -1
    """File descriptor of its board; -1 if it has none."""
    stacks: int = -1
    """File descriptor of the memory for its stacks."""
    signum: int = 0
    """The signal on which it writes them; 0 if there is none."""


class Board:
    """This worker's board, and what it needs to show its stacks. *Local.*

    Raises:
        OSError: The system has no such memory.
    """

    def __init__(self) -> None:
        self.board = os.memfd_create(_NAME, os.MFD_CLOEXEC)
        self.stacks = os.memfd_create(_NAME, os.MFD_CLOEXEC)
        self.signum = _free_signal()
        if self.signum:
            faulthandler.register(self.signum, file=self.stacks, all_threads=True)
        self._end = weakref.finalize(self, _end, self.board, self.stacks, self.signum)
        os.ftruncate(self.board, mmap.PAGESIZE)
        self._map = mmap.mmap(self.board, mmap.PAGESIZE)
        self.cells = memoryview(self._map).cast("d")
        self.cells[_WAITS_FOR] = -1
        # A forked loader process is no worker: it must hold nothing open and answer no signal.
        myself = weakref.ref(self)
        os.register_at_fork(after_in_child=lambda: _forget(myself))

    @classmethod
    def make(cls) -> Board | None:
        """A board; None where the system has no such memory."""
        with contextlib.suppress(OSError, AttributeError):
            return cls()
        return None

    def forget(self) -> None:
        """What a forked child does with its parent's board."""
        self._end()
        self.cells.release()
        self._map.close()


class Watch(Lookout):
    """Shows what this worker does, and finds out what a silent one does. Made by ``begin``.

    Args:
        rank: This worker's number.
        workers: All workers, by rank; none where all are in this process.
        board: This worker's board, if it has one.
    """

    def __init__(self, rank: int, workers: list[Identity], board: Board | None) -> None:
        self._rank = rank
        self._workers = workers
        self._board = board
        self._cells = board.cells if board is not None else memoryview(bytearray(_CELLS * _CELL_BYTES)).cast("d")

    @classmethod
    def begin(cls, collective: Collective, timeout_s: float, board: Board | None = None) -> Watch:
        """*collective*. From now on a worker that another one waits for longer than ``timeout_s`` is looked at and named.

        Workers in one process keep the limit with which their ``Meeting`` was made, and need not be looked at.

        Args:
            board: This worker's board, if it has one already.
        """
        if not collective.apart or (collective.size == 1 and board is None):
            return cls(collective.rank, [], None)
        board = board or Board.make()
        mine = json.dumps(dataclasses.asdict(_identity(board))).encode()
        workers = [Identity(**json.loads(text)) for text in collective.all_gather_bytes(mine)]
        watch = cls(collective.rank, workers, board)
        collective.limit(timeout_s, watch)
        return watch

    @property
    def shown(self) -> Shown:
        """Where this worker's ``StepClock`` shows what it is doing."""
        return self._cells

    def identity(self, rank: int) -> str:
        """*local*. Host and process of a worker, for a person."""
        if rank >= len(self._workers):
            return f"host {socket.gethostname()}, process {os.getpid()}"
        return f"host {self._workers[rank].host}, process {self._workers[rank].pid}"

    def wait_for(self, peer: int) -> None:
        self._cells[_WAITS_FOR] = peer

    def silence(self, rank: int, peer: int, timeout_s: float) -> LostWorker:
        culprit = self._culprit(peer)
        worker = self._workers[culprit]
        look = self._look(worker)
        step = look.step or int(self._cells[STEP])
        text = "\n".join(
            [
                f"worker {culprit} ({self.identity(culprit)}) did not arrive within {timeout_s:g} s: worker {rank} waited for it"
                f"{f' in step {int(self._cells[STEP])}' if self._cells[STEP] else ' before the first step'}. {look.text}",
                *([f"Stacks of its Python threads, innermost call first:\n{look.stacks}"] if look.stacks else []),
                "If it was only slow: Trainer(timeout_s=...) must exceed the longest time that a worker may keep others waiting",
            ]
        )
        failure = LostWorker(text, rank=culprit, host=worker.host, step=step or None, traceback=text)
        failure.silent = True
        return failure

    def _look(self, worker: Identity) -> _Look:
        if worker.place != self._workers[self._rank].place:
            done = max(0, int(self._cells[STEP]) - 1)
            return _Look(
                text=f"It has done {done} steps. It cannot be looked at from here (another host or container): look at its "
                f"output there, and at its stacks, for instance with py-spy dump --pid {worker.pid}"
            )
        try:
            return _look_at(worker)
        except OSError as error:
            return _Look(text=f"Its process cannot be looked at ({error})")

    def _culprit(self, peer: int) -> int:
        """Who keeps ``peer`` waiting, if it waits itself, and so on."""
        seen = {self._rank}
        while peer not in seen:
            seen.add(peer)
            following = self._awaited_by(peer)
            if following is None:
                return peer
            peer = following
        # They wait for each other, or for someone who waits for this worker. Whoever does not wait is to blame.
        others = [rank for rank in range(len(self._workers)) if rank != self._rank]
        return next((rank for rank in others if self._awaited_by(rank) is None), others[0])

    def _awaited_by(self, rank: int) -> int | None:
        worker = self._workers[rank]
        if worker.place != self._workers[self._rank].place:
            return None
        try:
            awaited = int(_read_board(worker)[_WAITS_FOR])
        except OSError:
            return None
        return awaited if 0 <= awaited < len(self._workers) else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Look:
    """What a look at a worker showed."""

    text: str
    step: int | None = None
    stacks: str = ""


def _look_at(worker: Identity) -> _Look:
    """*local*. Looks at a worker of this host.

    Raises:
        OSError: This worker may not.
    """
    try:
        state, started = _process(worker.pid)
    except FileNotFoundError:
        state, started = "X", worker.started
    if started != worker.started or state in "ZX":
        return _Look(text="Its process has ended; look for its own error")
    cells = _read_board(worker)
    step = int(cells[STEP])
    text = (
        f"It {f'is in step {step}' if step else 'has not begun its first step'}, in {_PHASE_TEXTS[int(cells[PHASE])]}, for "
        f"{time.perf_counter() - cells[SINCE]:.1f} s, and its process is {_STATES.get(state, state)}"
    )
    if state in "Tt":
        how = "by SIGSTOP or the like: kill -CONT lets it go on" if state == "T" else "which must let it go"
        return _Look(text=f"{text}, {how}. A stopped process shows no stacks", step=step)
    stacks = _stacks(worker)
    if not stacks:
        state, _ = _process(worker.pid)
        why = "stuck in the kernel, mostly by a disk or a network file system" if state == "D" else "it did not answer"
        text += f". It shows no stacks: {why}"
    return _Look(text=text, step=step, stacks=stacks)


def _stacks(worker: Identity) -> str:
    """The stacks of its threads; "" if it does not show them in time."""
    if not worker.signum or not _catches(worker.pid, worker.signum):
        return ""
    until = time.monotonic() + _DUMP_S
    with _open(worker, worker.stacks) as file, _alone(file, until):
        state = os.fstat(file.fileno())
        begin = 0
        if not (state.st_size and time.time() - state.st_mtime < _FRESH_S):
            begin = state.st_size
            os.kill(worker.pid, worker.signum)
            _await_growth(file, begin, until)
        return os.pread(file.fileno(), _TEXT_BYTES, begin).decode(errors="replace").rstrip()


def _await_growth(file: IO[bytes], size: int, until: float) -> None:
    """Until the file has grown beyond ``size`` and stays as it is for a moment."""
    known, changed = size, time.monotonic()
    while time.monotonic() < until:
        now = os.fstat(file.fileno()).st_size
        if now != known:
            known, changed = now, time.monotonic()
        elif known > size and time.monotonic() - changed > _SETTLED_S:
            return
        time.sleep(_POLL_S)


@contextlib.contextmanager
def _alone(file: IO[bytes], until: float) -> Iterator[None]:
    """All the others look at the same moment: one asks for the stacks, and the rest read them. The file's end unlocks it."""
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() > until:
                break
            time.sleep(_POLL_S)
    yield


def _read_board(worker: Identity) -> memoryview[float]:
    with _open(worker, worker.board) as file:
        data = file.read(_CELLS * _CELL_BYTES)
    if len(data) < _CELLS * _CELL_BYTES:
        raise FileNotFoundError(f"process {worker.pid} has no board any more")
    return memoryview(data).cast("d")


def _open(worker: Identity, descriptor: int) -> IO[bytes]:
    """Opens memory that a worker told us about, if it is still the same process and the same memory."""
    place = Path(f"/proc/{worker.pid}/fd/{descriptor}")
    if _process(worker.pid)[1] != worker.started or _NAME not in str(place.readlink()):
        raise FileNotFoundError(f"process {worker.pid} has no board any more")
    return place.open("rb")


def _identity(board: Board | None) -> Identity:
    mine = Identity(host=socket.gethostname(), place=f"{os.getpid()} alone", pid=os.getpid(), started=0)
    if board is None:
        return mine
    with contextlib.suppress(OSError):
        mine = dataclasses.replace(
            mine,
            place=f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {Path('/proc/self/ns/pid').readlink()}",
            started=_process(os.getpid())[1],
            board=board.board,
            stacks=board.stacks,
            signum=board.signum,
        )
    return mine


def _process(pid: int) -> tuple[str, int]:
    """State of a process, a letter, and when it was started."""
    # Its name, in parentheses, may hold anything.
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return fields[0], int(fields[19])


def _catches(pid: int, signum: int) -> bool:
    """Whether the process has a handler for this signal: without one it would die of it."""
    return bool(_signal_sets(pid)["SigCgt"] >> (signum - 1) & 1)


def _free_signal() -> int:
    """A real-time signal that nobody here uses, from the end that libraries do not start from; 0 if there is none."""
    used = 0
    for known in _signal_sets(os.getpid()).values():
        used |= known
    free = (number for number in range(signal.SIGRTMAX, signal.SIGRTMIN - 1, -1) if not used >> (number - 1) & 1)
    return next(free, 0)


def _signal_sets(pid: int) -> dict[str, int]:
    """The signals that a process blocks, ignores and catches."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    pairs = (line.partition(":\t") for line in lines)
    return {name: int(value, 16) for name, _, value in pairs if name in ("SigBlk", "SigIgn", "SigCgt")}


def _end(board: int, stacks: int, signum: int) -> None:
    if signum:
        faulthandler.unregister(signum)
    os.close(board)
    os.close(stacks)


def _forget(reference: weakref.ref[Board]) -> None:
    board = reference()
    if board is not None:
        board.forget()
