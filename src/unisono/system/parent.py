"""Inside the fork server: the process that imports once and forks a child for each order. See `fork_server` for the other end.

It only ever imports and forks. Nothing is computed here, so there are no threads that a fork would lose, and no device is
opened that a child could not use; both are looked at before each fork, and an order is refused rather than obeyed wrongly.

A child goes back up to `main` and does what it was asked there. So it ends as any Python program does: threads are waited
for, atexit functions run, streams are flushed, and the exit status is what the interpreter makes of it. The server itself
leaves without any of this: what the imports have registered is for the children to run.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import importlib
import importlib.machinery
import io
import itertools
import multiprocessing
import os
import select
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from unisono.system.messages import receive, send
from unisono.system.reaper import end_processes

_NAME = "unisono.system.parent"
"""As long as "unisono.launch.worker", which `ps` shows in its place for a worker (see `_retitle`)."""
_DEVICES = ("/dev/nvidia", "/dev/kfd", "/dev/dri/", "/dev/accel")
"""Files that a GPU's driver keeps open once a process has begun to use it."""


class _Parent:
    """The loop that forks."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._children: dict[int, int] = {}
        """Number of each living child, by the descriptor that tells its end."""
        self._broken: str | None = None
        """Why this process must not fork."""

    def serve(self) -> Callable[[], object] | None:
        """Obeys orders until the asking end is gone: None. In a forked child: what it is to do."""
        poll = select.poll()
        poll.register(self._channel, select.POLLIN)
        while True:
            for descriptor, _ in poll.poll():
                if descriptor in self._children:
                    poll.unregister(descriptor)
                    self._bury(descriptor)
                    continue
                received = receive(self._channel)
                if received is None:
                    end_processes(self._children.values())
                    return None
                order, descriptors = received
                if "preload" in order:
                    self._preload(order["preload"], optional=order["optional"], then=order["then"])
                    continue
                if (refusal := self._refusal(order)) is not None:
                    self._tell({"refused": refusal})
                elif (pid := self._fork()) == 0:
                    return self._become(order, descriptors)
                elif pid is not None:
                    ended = os.pidfd_open(pid)
                    self._children[ended] = pid
                    poll.register(ended, select.POLLIN)
                for handed in descriptors:
                    os.close(handed)

    def _preload(self, modules: Sequence[str], *, optional: bool, then: str | None) -> None:
        with _without_trace():
            for name in modules:
                try:
                    importlib.import_module(name)
                except Exception as error:  # the script must see the whole error itself, from its beginning
                    if not optional:
                        self._broken = f"{name} could not be imported: {type(error).__name__}: {error}"
                        return
            if then is not None:
                _function(then)()
        # Some libraries (OpenBLAS within NumPy) start threads when they load, and end them when a process forks, to start
        # them again where they are needed. After a first fork only those are left that would be lost.
        for stream in (sys.stdout, sys.stderr):
            stream.flush()  # once, and not again by each child
        if (pid := os.fork()) == 0:
            os._exit(0)
        os.waitpid(pid, 0)
        # What lives now lives for ever. The collector would write to all of it, in each child, and so copy it.
        gc.freeze()

    def _refusal(self, order: Mapping[str, Any]) -> str | None:
        """Why a child would not be what a new interpreter is; None if it would."""
        threads = sum(1 for _ in Path("/proc/self/task").iterdir()) - 1
        if threads:
            return f"threads run beside the one that would fork: {threads}"
        for file in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(OSError):  # the one that listed them is closed again
                if (target := str(file.readlink())).startswith(_DEVICES):
                    return f"an import has opened {target}"
        return self._broken or (_shadow(Path(order["folder"])) if order["folder"] else None)

    def _fork(self) -> int | None:
        try:
            return os.fork()
        except OSError as error:
            self._tell({"refused": f"no fork: {error}"})
            return None

    def _become(self, order: Mapping[str, Any], descriptors: list[int]) -> Callable[[], object]:
        """Makes this new child what a new interpreter would be."""
        os.setsid()  # before its number is known: from then on its group may be ended
        self._tell({"started": os.getpid()})
        self._channel.close()
        for ended in self._children:
            os.close(ended)
        *given, go = descriptors
        streams, handed = given[: len(order["streams"])], iter(given[len(order["streams"]) :])
        if not os.read(go, 1):
            os._exit(1)  # the asking end is gone, and its reaper may not know of this process
        os.close(go)
        os.environ.clear()
        os.environ.update(order["environment"])
        for name, count in order["handed"].items():
            os.environ[name] = ",".join(str(descriptor) for descriptor in itertools.islice(handed, count))
        _take_streams(dict(zip(order["streams"], streams, strict=True)))
        _seed()
        gc.enable()
        module = order["function"].partition(":")[0]
        sys.orig_argv = [module if word == _NAME else word for word in sys.orig_argv]
        _retitle(sys.orig_argv)
        return functools.partial(_function(order["function"]), order["spec"])

    def _bury(self, ended: int) -> None:
        os.close(ended)
        pid, status = os.waitpid(self._children.pop(ended), 0)
        self._tell({"ended": pid, "status": os.waitstatus_to_exitcode(status)})

    def _tell(self, message: Mapping[str, Any]) -> None:
        with contextlib.suppress(OSError):  # the asking end is gone, as the next poll will find
            send(self._channel, message)


def _function(name: str) -> Callable[..., object]:
    """What "module:function" names."""
    module, _, function = name.partition(":")
    found: Callable[..., object] = getattr(importlib.import_module(module), function)
    return found


@contextlib.contextmanager
def _without_trace() -> Iterator[None]:
    """Removes the folders that imports make in case they are needed, as torch._inductor its cache: most runs need none."""
    made: list[Any] = []
    make = os.mkdir

    def note(path: Any, *args: Any, **options: Any) -> None:
        make(path, *args, **options)
        made.append(path)

    os.mkdir = note
    try:
        yield
    finally:
        os.mkdir = make
        for folder in reversed(made):
            with contextlib.suppress(OSError):  # in use already
                Path(folder).rmdir()


def _shadow(folder: Path) -> str | None:
    """Why a script of this folder would import something else than what is already imported here; None if it would not."""
    for name, file in _importable(folder):
        spec = getattr(sys.modules.get(name), "__spec__", None)
        if name == "__main__" or spec is None or spec.origin in ("built-in", "frozen"):  # no folder can shadow these
            continue
        if spec.origin is None or Path(spec.origin).resolve() != file.resolve():
            return f"{file} comes before the {name} that is already imported ({spec.origin})"
    return None


def _importable(folder: Path) -> Iterator[tuple[str, Path]]:
    suffixes = importlib.machinery.all_suffixes()
    try:
        entries = sorted(folder.iterdir())
    except OSError:  # nor could an import read it
        return
    for entry in entries:
        name = entry.name.partition(".")[0]
        if entry.name in [name + suffix for suffix in suffixes] and entry.is_file():
            yield name, entry
        for package in [entry / f"__init__{suffix}" for suffix in suffixes]:
            if package.is_file():
                yield name, package


def _retitle(command: Sequence[str]) -> None:
    """What `ps` shows, where there is room for it: in the memory that held the parent's own command."""
    text = b"".join(os.fsencode(word) + b"\0" for word in command)
    with contextlib.suppress(OSError, ValueError, IndexError):
        # proc(5): fields 48 and 49 are where that memory starts and ends; the second field is a name that may hold spaces.
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        start, end = int(fields[48 - 3]), int(fields[49 - 3])
        if len(text) == end - start:
            ctypes.memmove(start, text, len(text))


def _take_streams(given: Mapping[int, int]) -> None:
    """Standard input, output and error: the descriptors, and Python's objects as a new interpreter makes them."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        before = getattr(sys, name)
        stream = None
        if number in given:
            os.dup2(given[number], number)
            stream = _stream(number, before)
        else:
            os.close(number)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    for descriptor in given.values():
        os.close(descriptor)


def _stream(number: int, before: io.TextIOWrapper) -> io.TextIOWrapper:
    """As CPython's create_stdio: the descriptor may have become a terminal, a pipe or a file."""
    writes, unbuffered = number > 0, sys.__stdout__.write_through  # type: ignore[union-attr]
    binary: Any = open(number, "wb" if writes else "rb", buffering=0 if writes and unbuffered else -1, closefd=False)  # noqa: SIM115
    getattr(binary, "raw", binary).name = before.name
    stream = io.TextIOWrapper(
        binary,
        encoding=before.encoding,
        errors=before.errors,
        newline="\n" if writes else None,
        line_buffering=writes and not unbuffered and (binary.isatty() or number == 2),
        write_through=unbuffered,
    )
    stream.mode = before.mode  # type: ignore[misc]
    return stream


def _seed() -> None:
    """Randomness that a new process would have for itself. Python's own `random` sees to it by itself after a fork."""
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed()
    if torch := sys.modules.get("torch"):
        torch.default_generator.seed()  # not torch.seed(), which also seeds the GPUs: those start from a constant
    multiprocessing.current_process().authkey = os.urandom(32)


def main() -> None:
    """Serve until the input ends; then end what was started."""
    channel = socket.socket(fileno=os.dup(0))
    devnull = os.open(os.devnull, os.O_RDWR)
    os.dup2(devnull, 0)
    os.close(devnull)
    # A stop of the whole service, or of all that is named like the script, is the asking end's to handle.
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    gc.disable()  # until a child is made: see gc.freeze
    task = _Parent(channel).serve()
    if task is None:
        os._exit(0)
    task()


if __name__ == "__main__":
    main()
