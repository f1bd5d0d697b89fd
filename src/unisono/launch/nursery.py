"""A process that has imported PyTorch already, and forks a worker from itself whenever it is asked for one.

A new interpreter needs seconds until PyTorch is there, and two hundred megabytes that are the same in every worker. Here it is
imported once, while the launcher is busy with imports of its own; a worker then starts in milliseconds, and shares what it
does not change. `parent` is what runs inside.

A child is to be what a new interpreter would be: its own session, environment, streams, random state and end. Three things
differ, for all that is imported already:

- Variables that are read while PyTorch or NumPy load must be set before `unisono run`; a script that sets them before its own
  `import torch` comes too late. Those that matter: OMP_NUM_THREADS and the like (use --threads), GOMP_... and KMP_... (places
  of threads), OPENBLAS_..., TORCH_LOGS, TORCH_TRACE, TORCH_COMPILE_..., TORCHDYNAMO_..., TORCHINDUCTOR_..., PYTORCH_JIT,
  TORCH_DEVICE_BACKEND_AUTOLOAD. A script may set what is read at first use: CUDA_VISIBLE_DEVICES, NCCL_..., CUBLAS_...
- A path that a script puts first in `sys.path` does not replace a module that is already imported. Modules beside the script do:
  where one of them would, the nursery refuses.
- All children have the hash seed of the nursery, which is another one in each nursery unless PYTHONHASHSEED is set.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unisono.errors import WorkerFailure
from unisono.launch.guard import Guard, end_processes
from unisono.launch.messages import receive, send
from unisono.launch.report import nursery_report
from unisono.launch.statuses import STOP_SIGNALS

BLOCKED_SIGNALS = STOP_SIGNALS
"""Children start with these blocked: they are to unblock them once they can handle them."""

_LAST_S = 5.0
"""How long a process that has closed its end may take to be gone, in seconds."""


class Refusal(Exception):
    """The nursery cannot make a child that is like a new interpreter; its text says why. Start a new interpreter."""


def is_possible() -> bool:
    """Whether this system can have a nursery: Linux 5.3 or later. *local*"""
    if sys.platform != "linux" or not hasattr(os, "pidfd_open"):
        return False
    try:
        os.close(os.pidfd_open(os.getpid()))
    except OSError:
        return False
    return True


class Child:
    """A process that the nursery has started, as `subprocess.Popen` would show it. All methods are *local*."""

    def __init__(self, nursery: Nursery, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        """Exit status, -N if signal N killed it, None as far as is known it runs. -9 if the nursery died before it could tell."""
        self._nursery = nursery
        self._descriptor: int | None = None
        with contextlib.suppress(ProcessLookupError):  # someone has killed it already, which the nursery is about to tell
            self._descriptor = os.pidfd_open(pid)

    def poll(self) -> int | None:
        """Its exit status; None if it runs."""
        self._nursery.listen()
        return self.returncode

    def send_signal(self, signum: signal.Signals) -> None:
        """Send it a signal. Nothing happens if it has ended."""
        if self._descriptor is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._descriptor, signum)

    @property
    def runs(self) -> bool:
        """Whether it lives, by the kernel's account."""
        if self._descriptor is None:
            return False
        return not _is_ready(self._descriptor, 0)

    def bury(self, status: int) -> None:
        """The nursery's last word on it."""
        self.returncode = status
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


class Nursery:
    """The end that asks. Used as a context, by one thread at a time; all methods are *local*.

    Args:
        environment: Variables of the process itself, beside those of this one: what is read while libraries load.
        preload: Modules that it imports at once, in this order. If one cannot be imported, every start is refused.
        guard: Who ends the nursery and its children if this process is killed.
        label: Words that `ps` shows behind the name.
    """

    def __init__(
        self, *, environment: Mapping[str, str], preload: Sequence[str], guard: Guard, label: Sequence[str] = ()
    ) -> None:
        self._environment = environment
        self._modules = preload
        self._guard = guard
        self._label = label
        self._process: subprocess.Popen[bytes]
        self._children: dict[int, Child] = {}
        self._answers: list[Child | Refusal] = []
        self.failure: WorkerFailure | None = None
        """How it ended, if it did while it was needed: from then on nobody hears how children end."""
        self.status: int | None = None
        """Its exit status, -N if signal N killed it, None if it runs."""

    def __enter__(self) -> Nursery:
        self._channel, theirs = socket.socketpair()
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, BLOCKED_SIGNALS)  # a stop must not hit a bare interpreter
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "unisono.launch.parent", *self._label],
                env={**os.environ, **self._environment},
                stdin=theirs.fileno(),
                stdout=None if _is_open(1) else subprocess.DEVNULL,
                stderr=None if _is_open(2) else subprocess.DEVNULL,
                start_new_session=True,
            )
            self._guard.add(self._process.pid)
        finally:
            theirs.close()
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        with contextlib.suppress(OSError):  # it is gone, as the first start will find
            send(self._channel, {"preload": list(self._modules)})
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all children that still run, then the nursery. The second time it does nothing."""
        if self._channel.fileno() < 0:
            return
        end_processes(self._children)
        self._process.kill()  # nothing in it is worth waiting for; it may still be importing
        self.status = self._process.wait()
        self._channel.close()
        for child in list(self._children.values()):
            child.bury(-signal.SIGKILL)
        for pid in [*self._children, self._process.pid]:
            self._guard.remove(pid)

    @property
    def pid(self) -> int:
        """Its process number."""
        return self._process.pid

    @property
    def news(self) -> int:
        """A descriptor that can be read when there is something to `listen` to; for select and the like."""
        return self._channel.fileno()

    def start(
        self,
        function: str,
        spec: Mapping[str, Any],
        *,
        environment: Mapping[str, str],
        streams: Mapping[int, int],
        handed: Mapping[str, Sequence[int]] | None = None,
        folder: Path | None = None,
    ) -> Child:
        """Start a child, now or at any later time. It leads a session of its own, with BLOCKED_SIGNALS blocked.

        Args:
            function: What it does, as "module:function"; it is called with `spec`, and the child ends as a program does whose
                last line that was.
            spec: What JSON can say.
            environment: All its variables.
            streams: Our descriptors for its 0, 1 and 2; those not named are closed.
            handed: Further descriptors of ours for it to have. It finds their numbers, separated by commas, in the variable
                that each stands for.
            folder: Where it will look for modules first. If one there would shadow a module that is already imported, the
                start is refused.

        Raises:
            Refusal: It would not be like a new interpreter.
            WorkerFailure: The nursery has ended.
        """
        handed = handed or {}
        order = {
            "function": function,
            "spec": spec,
            "environment": dict(environment),
            "streams": list(streams),
            "handed": {name: len(descriptors) for name, descriptors in handed.items()},
            "folder": None if folder is None else str(folder),
        }
        waits, go = os.pipe()  # the child goes on only once it is guarded; if we are killed before, it ends
        try:
            with contextlib.suppress(OSError):
                send(self._channel, order, [*streams.values(), *itertools.chain(*handed.values()), waits])
            child = self._answer()
            self._guard.add(child.pid)
            with contextlib.suppress(BrokenPipeError):  # killed already
                os.write(go, b"g")
            return child
        finally:
            os.close(waits)
            os.close(go)

    def _answer(self) -> Child:
        self._answers.clear()
        while not self._answers and self.status is None:
            self.listen(wait=True)
        if not self._answers:
            raise self._fail()
        answer = self._answers.pop()
        if isinstance(answer, Refusal):
            raise answer
        return answer

    def listen(self, *, wait: bool = False) -> None:
        """Take in what the nursery tells; `wait` until it tells something."""
        while self.status is None and _is_ready(self._channel.fileno(), None if wait else 0):
            received = receive(self._channel)
            if received is None:
                self._has_ended()
                break
            self._take_in(received[0])
            wait = False
        if self.status is not None:  # nobody will tell how they end, but the kernel tells that they do
            for child in list(self._children.values()):
                if not child.runs:
                    self._children.pop(child.pid).bury(-signal.SIGKILL)

    def _take_in(self, message: Mapping[str, Any]) -> None:
        if "refused" in message:
            self._answers.append(Refusal(message["refused"]))
        elif "started" in message:
            child = self._children[message["started"]] = Child(self, message["started"])
            self._answers.append(child)
        elif message["ended"] in self._children:
            self._children.pop(message["ended"]).bury(message["status"])
        else:  # killed before it could say that it had started
            child = Child(self, message["ended"])
            child.bury(message["status"])
            self._answers.append(child)

    def _has_ended(self) -> None:
        try:
            self.status = self._process.wait(_LAST_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self.status = self._process.wait()
        if self._children:
            self._fail()

    def _fail(self) -> WorkerFailure:
        assert self.status is not None
        self.failure = self.failure or WorkerFailure(nursery_report(self._process.pid, self.status))
        return self.failure


def _is_ready(descriptor: int, limit_ms: int | None) -> bool:
    poll = select.poll()  # select() cannot look at descriptors from 1024 up
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(limit_ms))


def _is_open(descriptor: int) -> bool:
    try:
        return os.get_inheritable(descriptor)
    except OSError:
        return False


def standard_streams() -> dict[int, int]:
    """Those of this process that a program started by it would have, for `Nursery.start`. *local*"""
    return {descriptor: descriptor for descriptor in range(3) if _is_open(descriptor)}
