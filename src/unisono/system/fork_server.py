"""A process that has imported PyTorch already, and forks a child from itself whenever it is asked for one.

A new interpreter needs seconds until PyTorch is there, and two hundred megabytes that are the same in every worker. Here it is
imported once, while the caller is busy with imports of its own; a child then starts in milliseconds, and shares the memory that
it does not change. `parent` is what runs inside that process.

What a child runs is named as "package.module:function": the child imports the module (in `preload` it is imported before the
fork) and calls the function with `spec`, which is whatever JSON can say::

    with Reaper() as reaper, ForkServer(environment={}, preload=["torch", "my.module"], reaper=reaper) as server:
        child = server.start("my.module:run", {"rank": 0}, environment=os.environ, streams=standard_streams())
        wait_for_end([child], 60.0)
        if child.poll() is None:
            end_processes([child.pid])  # of `reaper`: the child and everything that it started
        else:
            end_groups([child.pid], grace_s=0.5)  # what it left running
        reaper.remove(child.pid)

The function finds BLOCKED_SIGNALS blocked, and unblocks them once it can handle them. It leads a session of its own, so that
its process number is also that of its group. It may return, raise, or call `os._exit`.

A child is to be what a new interpreter would be: its own session, environment, streams, random state and end. Where it would not
be (a thread runs in the server, an import has opened a GPU, a module beside the script would replace an imported one, the
system cannot do it), `start` starts a new interpreter instead. Three things differ all the same:

- Variables that are read while PyTorch or NumPy load must be set before `unisono run`; a script that sets them before its own
  `import torch` comes too late. Those that matter: OMP_NUM_THREADS and the like (use --threads), GOMP_... and KMP_... (places
  of threads), OPENBLAS_..., TORCH_LOGS, TORCH_TRACE, TORCH_COMPILE_..., TORCHDYNAMO_..., TORCHINDUCTOR_..., PYTORCH_JIT,
  TORCH_DEVICE_BACKEND_AUTOLOAD. A script may set what is read at first use: CUDA_VISIBLE_DEVICES, NCCL_..., CUBLAS_...
- A path that a script puts first in `sys.path` does not replace a module that is already imported.
- All children have the hash seed of the server, which is another one in each server unless PYTHONHASHSEED is set.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from unisono.errors import WorkerFailure
from unisono.system.messages import receive, send
from unisono.system.process import ending
from unisono.system.reaper import Reaper, end_processes
from unisono.system.signals import STOP_SIGNALS

BLOCKED_SIGNALS = STOP_SIGNALS
"""Children start with these blocked: they are to unblock them once they can handle them."""

_log = logging.getLogger(__name__)
_LAST_S = 5.0
"""How long a server that has closed its end of the channel may take to end, in seconds."""
_NEWS_S = 1.0
"""How long to wait for the server's word on a child that has ended, in seconds."""
_POLL_S = 0.02


class Refusal(Exception):
    """A forked child would not be like a new interpreter; the text says why. Start a new interpreter."""


def is_possible() -> bool:
    """Whether this system can have a fork server: Linux 5.3 or later. *local*"""
    if sys.platform != "linux" or not hasattr(os, "pidfd_open"):
        return False
    try:
        os.close(os.pidfd_open(os.getpid()))
    except OSError:
        return False
    return True


class Child:
    """A process that a fork server has started, as `subprocess.Popen` would show it. All methods are *local*.

    Args:
        pid: Its process number.
        source: What knows how it ends: its fork server, or the new interpreter's own `Popen`.
    """

    def __init__(self, pid: int, source: ForkServer | subprocess.Popen[bytes]) -> None:
        self.pid = pid
        self.returncode: int | None = None
        """Exit status, -N if signal N killed it, None as far as is known it runs. -9 if the server died before it could tell."""
        self._source = source
        self._descriptor: int | None = None
        if hasattr(os, "pidfd_open"):
            with contextlib.suppress(OSError):  # it has ended, as the server is about to tell; or Linux before 5.3
                self._descriptor = os.pidfd_open(pid)

    def poll(self) -> int | None:
        """Its exit status; None if it runs."""
        if self.returncode is not None:
            return self.returncode
        if isinstance(self._source, ForkServer):
            self._source.listen()
            if self.returncode is None and not self.runs:
                self._source.listen(limit_s=_NEWS_S)
        elif (status := self._source.poll()) is not None:
            self.bury(status)
        return self.returncode

    def send_signal(self, signum: signal.Signals) -> None:
        """Send it a signal. Nothing happens if it has ended."""
        if not isinstance(self._source, ForkServer):
            self._source.send_signal(signum)
        elif self._descriptor is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._descriptor, signum)

    @property
    def runs(self) -> bool:
        """Whether a forked child lives, by the kernel's account."""
        return self._descriptor is not None and not _is_ready(self._descriptor, 0.0)

    @property
    def ended(self) -> int | None:
        """A descriptor that can be read once it has ended, for select and the like; None if there is none."""
        return self._descriptor

    def bury(self, status: int) -> None:
        """It has ended with this status."""
        self.returncode = status
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def wait_for_end(children: Iterable[Child], limit_s: float) -> None:
    """Wait until one of these that run may have ended, which `poll` then tells; at most `limit_s` seconds. *local*"""
    poll = select.poll()  # select() cannot look at descriptors from 1024 up
    for child in children:
        if child.returncode is None:
            if (ended := child.ended) is None:
                limit_s = min(limit_s, _POLL_S)
            else:
                poll.register(ended, select.POLLIN)
    poll.poll(max(0.0, limit_s) * 1000)


class ForkServer:
    """The end that asks. Used as a context; all methods are *local*, and any thread may call them.

    Args:
        environment: Variables of the server, beside those of this process: what is read while libraries load. An empty one
            is left out.
        preload: Modules that it imports at once, in this order. If one cannot be imported, every fork is refused.
        reaper: Ends the server and its children if this process is killed.
        label: Words that `ps` shows behind the name.
    """

    def __init__(
        self, *, environment: Mapping[str, str], preload: Sequence[str], reaper: Reaper, label: Sequence[str] = ()
    ) -> None:
        self._environment = environment
        self._modules = preload
        self._reaper = reaper
        self._label = label
        self._process: subprocess.Popen[bytes] | None = None
        self._children: dict[int, Child] = {}
        self._answers: list[Child | Refusal] = []
        self._lock = threading.RLock()
        self.failure: WorkerFailure | None = None
        """How it ended, if it did while it was needed: from then on it is unknown how forked children end."""
        self.status: int | None = None
        """Its exit status, -N if signal N killed it, None if it runs."""

    def __enter__(self) -> ForkServer:
        if not is_possible():
            return self
        self._channel, theirs = socket.socketpair()
        command = [sys.executable, "-P", "-m", "unisono.system.parent", *self._label]
        stdout, stderr = (None if _is_open(number) else subprocess.DEVNULL for number in (1, 2))
        with theirs:
            self._process = self._spawn(command, overlaid(self._environment), stdin=theirs.fileno(), stdout=stdout, stderr=stderr)
        self.preload(self._modules, optional=False)
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all children that still run, then the server. The second time it does nothing."""
        with self._lock:
            if self._process is None or self._channel.fileno() < 0:
                return
            end_processes(self._children)
            self._process.kill()  # nothing in it is worth waiting for; it may still be importing
            self.status = self._process.wait()
            self._channel.close()
            for child in list(self._children.values()):
                child.bury(-signal.SIGKILL)
            for pid in [*self._children, self._process.pid]:
                self._reaper.remove(pid)

    @property
    def pid(self) -> int | None:
        """Its process number; None where this system cannot have one."""
        return None if self._process is None else self._process.pid

    def preload(self, modules: Sequence[str], *, optional: bool = True, then: str | None = None) -> None:
        """Import modules that children will need anyway. It returns at once.

        Args:
            modules: Their names.
            optional: Whether one that cannot be imported is left to the children. If not, every fork is refused from then on.
            then: A function of the server, as "module:function", to call without arguments after the imports: what children
                would otherwise each compute.
        """
        if self._process is not None:
            with self._lock, contextlib.suppress(OSError):  # it is gone, as the next fork will find
                send(self._channel, {"preload": list(modules), "optional": optional, "then": then})

    def start(
        self,
        function: str,
        spec: Mapping[str, Any],
        *,
        environment: Mapping[str, str],
        streams: Mapping[int, int],
        handed: Mapping[str, Sequence[int]] | None = None,
        folder: Path | None = None,
        fresh: Sequence[str] | None = (),
    ) -> Child:
        """Start a child, now or at any later time. It leads a session of its own, with BLOCKED_SIGNALS blocked.

        Args:
            function: What it does, as "module:function"; it is called with `spec`, and the child ends as a program does whose
                last line that was.
            spec: What JSON can say.
            environment: All its variables.
            streams: Our descriptors for its 0, 1 and 2; those not named are closed (in a new interpreter: as ours).
            handed: Further descriptors of ours for it to have. It finds their numbers, separated by commas, in the variable
                that each stands for. (In a new interpreter they are inheritable.)
            folder: Where it will look for modules first. If one there would shadow a module that is already imported, the child
                is not forked.
            fresh: Arguments of the new interpreter where the child cannot be forked; without any it calls the function as well.
                None: it is not started then.

        Raises:
            Refusal: The child cannot be forked, and `fresh` is None.
            WorkerFailure: The server has ended.
        """
        handed = handed or {}
        descriptors = list(itertools.chain(*handed.values()))
        order = {
            "function": function,
            "spec": spec,
            "environment": dict(environment),
            "streams": list(streams),
            "handed": {name: len(numbers) for name, numbers in handed.items()},
            "folder": None if folder is None else str(folder),
        }
        try:
            return self._fork(order, [*streams.values(), *descriptors])
        except Refusal as refusal:
            if fresh is None:
                raise
            _log.debug("%s starts in a new interpreter: %s", function, refusal)
        module, _, name = function.partition(":")
        command = [sys.executable, "-P", *(fresh or ["-c", f"from {module} import {name}; {name}({dict(spec)!r})"])]
        environment = {**environment, **{name: ",".join(map(str, numbers)) for name, numbers in handed.items()}}
        stdin, stdout, stderr = (streams.get(number) for number in range(3))
        popen = self._spawn(command, environment, stdin=stdin, stdout=stdout, stderr=stderr, pass_fds=descriptors)
        return Child(popen.pid, popen)

    def _spawn(self, command: Sequence[str], environment: Mapping[str, str], **streams: Any) -> subprocess.Popen[bytes]:
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, BLOCKED_SIGNALS)  # a stop must not hit a bare interpreter
        try:
            popen = subprocess.Popen(command, env=environment, start_new_session=True, **streams)
            self._reaper.add(popen.pid)
            return popen
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)

    def _fork(self, order: Mapping[str, Any], descriptors: Sequence[int]) -> Child:
        if self._process is None:
            raise Refusal("this system cannot have a fork server")
        waits, go = os.pipe()  # the child goes on only once the reaper knows it; if we are killed before, it ends
        try:
            with self._lock:
                with contextlib.suppress(OSError):
                    send(self._channel, order, [*descriptors, waits])
                child = self._answer()
            self._reaper.add(child.pid)
            with contextlib.suppress(BrokenPipeError):  # killed already
                os.write(go, b"g")
            return child
        finally:
            os.close(waits)
            os.close(go)

    def _answer(self) -> Child:
        self._answers.clear()
        while not self._answers and self.status is None:
            self.listen(limit_s=None)
        if not self._answers:
            raise self._fail()
        answer = self._answers.pop()
        if isinstance(answer, Refusal):
            raise answer
        return answer

    def listen(self, *, limit_s: float | None = 0.0) -> None:
        """Take in what the server tells; wait up to `limit_s` seconds (None: for ever) until it tells something."""
        with self._lock:
            while self.status is None and _is_ready(self._channel.fileno(), limit_s):
                received = receive(self._channel)
                if received is None:
                    self._has_ended()
                    break
                self._take_in(received[0])
                limit_s = 0.0
            if self.status is not None:  # how they end is unknown, but the kernel tells that they do
                for child in list(self._children.values()):
                    if not child.runs:
                        self._children.pop(child.pid).bury(-signal.SIGKILL)

    def _take_in(self, message: Mapping[str, Any]) -> None:
        if "refused" in message:
            self._answers.append(Refusal(message["refused"]))
        elif "started" in message:
            child = self._children[message["started"]] = Child(message["started"], self)
            self._answers.append(child)
        elif message["ended"] in self._children:
            self._children.pop(message["ended"]).bury(message["status"])
        else:  # killed before it could say that it had started
            child = Child(message["ended"], self)
            child.bury(message["status"])
            self._answers.append(child)

    def _has_ended(self) -> None:
        assert self._process is not None
        try:
            self.status = self._process.wait(_LAST_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self.status = self._process.wait()
        if self._children:
            self._fail()

    def _fail(self) -> WorkerFailure:
        assert self.status is not None
        self.failure = self.failure or WorkerFailure(
            f"unisono: the process from which workers start (pid {self.pid}) {ending(self.status)}. "
            "Without it nothing reports how workers end, so they were ended too: start the run again"
        )
        return self.failure


def overlaid(variables: Mapping[str, str]) -> dict[str, str]:
    """The variables of this process with others laid over them; an empty one is left out. *local*"""
    return {name: value for name, value in {**os.environ, **variables}.items() if value or name not in variables}


def _is_ready(descriptor: int, limit_s: float | None) -> bool:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(None if limit_s is None else limit_s * 1000))


def _is_open(descriptor: int) -> bool:
    try:
        return os.get_inheritable(descriptor)
    except OSError:
        return False


def standard_streams() -> dict[int, int]:
    """Those of this process that a program started by it would have, for `ForkServer.start`. *local*"""
    return {descriptor: descriptor for descriptor in range(3) if _is_open(descriptor)}
