"""A worker that does not arrive is named by those who wait for it: where it is, what it does, and its stacks.

A hung worker cannot report its own state. So each worker keeps a *status board*, memory that the other processes of the host can
open through ``/proc/PID/fd``: its step, its phase, and the rank that it waits for. It also registers a signal on which
``faulthandler`` writes the stacks of all threads into a second such memory, even while C code holds the interpreter. This takes
no thread and no named file, and works while the worker hangs.

A worker on another host (or in another container) cannot be inspected: the error says what is known, and where to look.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import fcntl
import mmap
import os
import re
import signal
import socket
import time
import weakref
from pathlib import Path
from typing import IO, NamedTuple

from unisono.collective.base import Collective, Lookout, LostWorker
from unisono.observe.timing import OUTSIDE, PAUSED, PHASE, PHASES, SINCE, STEP, Shown
from unisono.system.process import Process, state_of

_WAITS_FOR = STEP + 1
_CELLS = _WAITS_FOR + 1
_BOARD_BYTES = _CELLS * 8  # float64
_NAME = "unisono-board"
_DUMP_S = 1.0
"""How long a running worker may take to write its stacks."""
_SETTLED_S = 0.05
_POLL_S = 0.005
_FRESH_S = 10.0
"""Stacks of at most this age are reused: several workers ask at the same time."""
_TEXT_BYTES = 32 * 1024

_PHASE_TEXTS = {
    **{number: f"phase {name!r}" for number, name in enumerate(PHASES)},
    OUTSIDE: "no phase (a callback, a checkpoint, or code around the step)",
    PAUSED: "an evaluation",
}
_STATES = {"R": "running", "S": "sleeping", "D": "in disk sleep", "T": "stopped", "t": "held by a debugger"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class WorkerProcess(Process):
    """Which process a worker is, and how to look at it."""

    host: str
    board: int = -1
    """File descriptor of its status board; -1 if it has none."""
    stacks: int = -1
    """File descriptor of the memory that it writes its stacks to."""
    signum: int = 0
    """The signal on which it writes them; 0 if there is none."""


class StatusBoard:
    """The status board of this worker, and the memory for its stacks. *Local.*

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
        # A forked data loader is not a worker: it must hold no descriptor open and answer no signal.
        myself = weakref.ref(self)
        os.register_at_fork(after_in_child=lambda: board.forget() if (board := myself()) else None)

    @classmethod
    def make(cls) -> StatusBoard | None:
        """A new board; None where the system has no such memory."""
        with contextlib.suppress(OSError, AttributeError):
            return cls()
        return None

    def forget(self) -> None:
        """What a forked child does with its parent's board."""
        self._end()
        self.cells.release()
        self._map.close()


def _end(board: int, stacks: int, signum: int) -> None:
    if signum:
        faulthandler.unregister(signum)
    os.close(board)
    os.close(stacks)


class SilenceWatch(Lookout):
    """Shows what this worker does, and finds out what a silent worker does. Made by ``begin``.

    Args:
        rank: This worker's rank.
        workers: All workers, by rank; none where all are in this process.
        board: This worker's status board, if it has one.
    """

    def __init__(self, rank: int, workers: list[WorkerProcess], board: StatusBoard | None) -> None:
        self._rank = rank
        self._workers = workers
        self._board = board  # kept alive
        self._cells = board.cells if board is not None else memoryview(bytearray(_BOARD_BYTES)).cast("d")

    @classmethod
    def begin(cls, collective: Collective, timeout_s: float, board: StatusBoard | None = None) -> SilenceWatch:
        """*collective*. From now on a worker that keeps another waiting for longer than ``timeout_s`` is inspected and named.

        Workers in one process keep the limit with which their ``Meeting`` was made; they need no inspection.

        Args:
            board: This worker's status board, if it has one already.
        """
        if not collective.apart or (collective.size == 1 and board is None):
            return cls(collective.rank, [], None)
        board = board or StatusBoard.make()
        access = {} if board is None else {"board": board.board, "stacks": board.stacks, "signum": board.signum}
        mine = {"host": socket.gethostname(), **dataclasses.asdict(Process.this()), **access}
        workers = [WorkerProcess(**fields) for fields in collective.all_gather_json(mine)]
        watch = cls(collective.rank, workers, board)
        collective.limit(timeout_s, watch)
        return watch

    @property
    def shown(self) -> Shown:
        """Where this worker's ``StepClock`` shows what it is doing."""
        return self._cells

    def identity(self, rank: int) -> str:
        """*local*. Host and process of a worker, for messages."""
        if rank >= len(self._workers):
            return f"host {socket.gethostname()}, process {os.getpid()}"
        return f"host {self._workers[rank].host}, process {self._workers[rank].pid}"

    def wait_for(self, peer: int) -> None:
        self._cells[_WAITS_FOR] = peer

    def silence(self, rank: int, peer: int, timeout_s: float) -> LostWorker:
        culprit = self._culprit(peer)
        worker = self._workers[culprit]
        look = self._look(worker)
        step = int(self._cells[STEP])
        text = "\n".join(
            [
                f"worker {culprit} ({self.identity(culprit)}) did not arrive within {timeout_s:g} s: worker {rank} waited for it"
                f"{f' in step {step}' if step else ' before the first step'}. {look.text}",
                *([f"Stacks of its Python threads, innermost call first:\n{look.stacks}"] if look.stacks else []),
                "If it was only slow: Trainer(timeout_s=...) must exceed the longest time that a worker may keep others waiting",
            ]
        )
        failure = LostWorker(text, rank=culprit, host=worker.host, step=look.step or step or None, traceback=text)
        failure.silent = True
        return failure

    def _look(self, worker: WorkerProcess) -> _Look:
        if not self._is_near(worker):
            done = max(0, int(self._cells[STEP]) - 1)
            return _Look(
                f"It has done {done} steps. It cannot be looked at from here (another host or container): look at its "
                f"output there, and at its stacks, for instance with py-spy dump --pid {worker.pid}"
            )
        try:
            return _look_at(worker)
        except OSError as error:
            return _Look(f"Its process cannot be looked at ({error})")

    def _is_near(self, worker: WorkerProcess) -> bool:
        """Whether it runs where this process can look at it."""
        return worker.board >= 0 and bool(worker.place) and worker.place == self._workers[self._rank].place

    def _culprit(self, peer: int) -> int:
        """Follows who waits for whom, from ``peer`` on, to a worker that waits for nobody."""
        seen = {self._rank}
        while peer not in seen:
            seen.add(peer)
            following = self._awaited_by(peer)
            if following is None:
                return peer
            peer = following
        # A cycle, or a chain that ends at this worker: the culprit is one that waits for nobody.
        others = [rank for rank in range(len(self._workers)) if rank != self._rank]
        return next((rank for rank in others if self._awaited_by(rank) is None), others[0])

    def _awaited_by(self, rank: int) -> int | None:
        """The rank that a worker waits for, as far as can be seen from here."""
        if not self._is_near(self._workers[rank]):
            return None
        try:
            awaited = int(_read_board(self._workers[rank])[_WAITS_FOR])
        except OSError:
            return None
        return awaited if 0 <= awaited < len(self._workers) else None


class _Look(NamedTuple):
    """What a look at a worker showed."""

    text: str
    step: int | None = None
    stacks: str = ""


def _look_at(worker: WorkerProcess) -> _Look:
    """Looks at a worker of this host.

    Raises:
        OSError: This process may not.
    """
    if worker.is_dead:
        return _Look("Its process has ended; look for its own error")
    cells = _read_board(worker)
    step = int(cells[STEP])
    state, _ = state_of(worker.pid)
    text = (
        f"It {f'is in step {step}' if step else 'has not begun its first step'}, in {_PHASE_TEXTS[int(cells[PHASE])]}, for "
        f"{time.perf_counter() - cells[SINCE]:.1f} s, and its process is {_STATES.get(state, state)}"
    )
    if state in "Tt":
        how = "for instance by SIGSTOP: kill -CONT continues it" if state == "T" else "which must continue it"
        return _Look(f"{text}, {how}. A stopped process shows no stacks", step)
    stacks = _stacks(worker)
    if not stacks:
        stuck = state_of(worker.pid)[0] == "D"
        why = "stuck in the kernel, usually because of a disk or a network file system" if stuck else "it did not answer"
        text += f". It shows no stacks: {why}"
    return _Look(text, step, stacks)


def _stacks(worker: WorkerProcess) -> str:
    """The stacks of its threads; "" if it does not show them in time."""
    # Without a handler the process would die of the signal.
    if not worker.signum or not _signal_sets(worker.pid)["Cgt"] >> (worker.signum - 1) & 1:
        return ""
    until = time.monotonic() + _DUMP_S
    with _open(worker, worker.stacks) as file:
        _lock(file, until)  # several workers look at the same time: one asks for the stacks, and the rest read them
        state = os.fstat(file.fileno())
        begin = 0
        if not (state.st_size and time.time() - state.st_mtime < _FRESH_S):
            begin = state.st_size
            os.kill(worker.pid, worker.signum)
            _wait_for_text(file, begin, until)
        return os.pread(file.fileno(), _TEXT_BYTES, begin).decode(errors="replace").rstrip()


def _lock(file: IO[bytes], until: float) -> None:
    """Locks the file if that is possible in time; closing it unlocks it."""
    while time.monotonic() <= until:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            time.sleep(_POLL_S)


def _wait_for_text(file: IO[bytes], size: int, until: float) -> None:
    """Until the file has grown beyond ``size`` and then stays as it is for a moment."""
    known, changed = size, time.monotonic()
    while time.monotonic() < until:
        now = os.fstat(file.fileno()).st_size
        if now != known:
            known, changed = now, time.monotonic()
        elif known > size and time.monotonic() - changed > _SETTLED_S:
            return
        time.sleep(_POLL_S)


def _read_board(worker: WorkerProcess) -> memoryview[float]:
    with _open(worker, worker.board) as file:
        data = file.read(_BOARD_BYTES)
    if len(data) < _BOARD_BYTES:
        raise FileNotFoundError(f"process {worker.pid} no longer has a status board")
    return memoryview(data).cast("d")


def _open(worker: WorkerProcess, descriptor: int) -> IO[bytes]:
    """Opens memory that a worker told us about, if it is still the same process and the same memory."""
    path = Path(f"/proc/{worker.pid}/fd/{descriptor}")
    if worker.is_dead or _NAME not in str(path.readlink()):
        raise FileNotFoundError(f"process {worker.pid} no longer has a status board")
    return path.open("rb")


def _free_signal() -> int:
    """A real-time signal that this process does not use yet, from the high end, where libraries do not start; 0 if all are."""
    used = 0
    for signals in _signal_sets(os.getpid()).values():
        used |= signals
    free = (number for number in range(signal.SIGRTMAX, signal.SIGRTMIN - 1, -1) if not used >> (number - 1) & 1)
    return next(free, 0)


def _signal_sets(pid: int) -> dict[str, int]:
    """The signals that a process blocks ("Blk"), ignores ("Ign") and catches ("Cgt"), as bits."""
    found = re.findall(r"^Sig(Blk|Ign|Cgt):\s*(\w+)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return {name: int(bits, 16) for name, bits in found}
