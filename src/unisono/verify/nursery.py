"""Processes from which workers are forked: PyTorch is imported once, and a run of the script starts in milliseconds.

``python -P -m unisono.verify.nursery`` imports everything, then forks a child for each line it reads, and reports each end. It
computes nothing itself, so there are no threads that a fork would lose. When its input ends it ends all that it started.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any

_PRELOADED = (
    "numpy",
    "torch",
    "torch._dynamo",
    "torch.distributed",
    "rich.console",
    "unisono.training.trainer",
    "unisono.verify.child",
)
_GRACE_S = 5.0


class Nursery:
    """The end that asks. All methods are *local*.

    Args:
        environment: Variables of the new interpreter, beside those of this process; an empty one is not set.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "unisono.verify.nursery"],
            env={name: value for name, value in {**os.environ, **environment}.items() if value or name not in environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self._lock = threading.Lock()
        self._waiting: dict[int, Future[int]] = {}
        self._number = 0
        threading.Thread(target=self._listen, daemon=True).start()

    def fork(self, spec: Mapping[str, Any]) -> tuple[int, Future[int]]:
        """Starts a child that does what ``spec`` says (see ``child.run``); its number, and its exit status to come."""
        with self._lock:
            self._number += 1
            ended: Future[int] = Future()
            self._waiting[self._number] = ended
            self._say({"fork": spec, "number": self._number})
            return self._number, ended

    def kill(self, number: int) -> None:
        """Ends a child and everything it has started."""
        with self._lock:
            self._say({"kill": number})

    def preload(self, modules: Sequence[str]) -> None:
        """Imports modules that the script will need anyway. One that cannot be imported is left to the script."""
        with self._lock:
            self._say({"preload": list(modules)})

    def close(self) -> None:
        """Ends all children, then the nursery itself."""
        with self._lock, contextlib.suppress(OSError):
            if self._process.stdin is not None:
                self._process.stdin.close()
        try:
            self._process.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def _say(self, message: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError, ValueError):
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        with contextlib.suppress(ValueError):
            for line in self._process.stdout:
                number, status = json.loads(line)
                self._waiting.pop(number).set_result(status)
        for ended in list(self._waiting.values()):  # the nursery is gone
            ended.cancel()


class Nurseries:
    """Nurseries by what their interpreters must be like, made when they are first needed. Used as a context."""

    def __init__(self) -> None:
        self._made: dict[tuple[Any, ...], Nursery] = {}
        self._preloaded: list[str] = []
        self._lock = threading.Lock()

    def __enter__(self) -> Nurseries:
        return self

    def __exit__(self, *_: object) -> None:
        for nursery in self._made.values():
            nursery.close()

    def get(self, number: int, environment: Mapping[str, str]) -> Nursery:
        """*local*. The nursery number ``number`` of those whose environment has these variables."""
        key = (number, *sorted(environment.items()))
        with self._lock:
            if key not in self._made:
                self._made[key] = Nursery(environment)
                self._made[key].preload(self._preloaded)
            return self._made[key]

    def preload(self, modules: Sequence[str]) -> None:
        """*local*. Imports modules in all nurseries, those to come included."""
        with self._lock:
            new = [name for name in modules if name not in self._preloaded]
            self._preloaded += new
            for nursery in self._made.values():
                nursery.preload(new)


class _Server:
    """The end that forks."""

    def __init__(self) -> None:
        # Children must hold neither: the end of either stream means that somebody is gone.
        self._orders = os.dup(0)
        self._answers = os.dup(1)
        os.dup2(os.open(os.devnull, os.O_RDWR), 0)
        os.dup2(2, 1)
        self._numbers: dict[int, int] = {}

    def serve(self) -> None:
        woken, wakes = os.pipe()
        for end in (woken, wakes):
            os.set_blocking(end, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wakes, warn_on_full_buffer=False)
        pending = b""
        while True:
            ready, _, _ = select.select([self._orders, woken], [], [])
            if woken in ready:
                with contextlib.suppress(BlockingIOError):
                    os.read(woken, 4096)
                self._bury()
            if self._orders in ready:
                data = os.read(self._orders, 1 << 16)
                if not data:
                    break
                *lines, pending = (pending + data).split(b"\n")
                for line in lines:
                    self._obey(json.loads(line), (woken, wakes))
        for pid in self._numbers:
            _end(pid)
        os._exit(0)  # there is nothing to tidy up, and that takes a second

    def _obey(self, order: dict[str, Any], private: tuple[int, int]) -> None:
        if "preload" in order:
            for name in order["preload"]:
                with contextlib.suppress(Exception):
                    importlib.import_module(name)
        elif "kill" in order:
            for pid, number in self._numbers.items():
                if number == order["kill"]:
                    _end(pid)
        else:
            from unisono.verify.watch import users_modules

            users_modules()  # found once, each child remembers whose the files are
            gc.freeze()  # a collection in the child would touch, and so copy, all the memory that it shares with us
            pid = os.fork()
            if pid == 0:
                gc.enable()
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for descriptor in (self._orders, self._answers, *private):
                    os.close(descriptor)
                from unisono.verify import child

                child.run(order["fork"])  # never returns
            self._numbers[pid] = order["number"]

    def _bury(self) -> None:
        while self._numbers:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            number = self._numbers.pop(pid, None)
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, signal.SIGKILL)  # loader processes that it left behind
            if number is not None:
                answer = json.dumps([number, os.waitstatus_to_exitcode(status)]) + "\n"
                os.write(self._answers, answer.encode())


def _end(pid: int) -> None:
    """Each child leads a session of its own (it makes it first thing)."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def main() -> None:
    gc.disable()
    for name in _PRELOADED:
        importlib.import_module(name)
    _Server().serve()


if __name__ == "__main__":
    main()
