"""What the script does that a result may depend on, noted with the line that does it; and the changes that hide it.

Installed in a worker's process before the script runs: who reads the rank, a clock or the operating system's randomness, who
seeds, who changes the number of threads, who talks to other workers, who writes files. Only calls by the user's own code count:
libraries read clocks all the time.
"""

from __future__ import annotations

import functools
import inspect
import linecache
import os
import random
import socket
import sys
import sysconfig
import time
from collections.abc import Callable, Set
from datetime import UTC
from datetime import datetime as real
from pathlib import Path
from types import FrameType, FunctionType, ModuleType
from typing import Any

import numpy as np
import torch
from torch.distributed import distributed_c10d

from unisono.verify.job import Change
from unisono.verify.record import Note

_LIBRARIES = tuple(
    {
        os.path.realpath(folder) + os.sep
        for name in ("stdlib", "platstdlib", "purelib", "platlib")
        if (folder := sysconfig.get_path(name)) is not None
    }
)
_OURS = str(Path(__file__).resolve().parent.parent) + os.sep
_DEMOS = str(Path(_OURS) / "demos") + os.sep
_ALONE = {
    **dict.fromkeys(("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "SLURM_PROCID", "SLURM_LOCALID"), "0"),
    **dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE", "ROLE_WORLD_SIZE", "SLURM_NTASKS"), "1"),
}
"""Variables that tell a worker who it is, and what they hold for one that is alone."""
UNWATCHED = frozenset({
    "barrier", "monitored_barrier", "destroy_process_group", "new_subgroups", "shrink_group", "get_rank", "get_world_size",
    "get_backend", "get_backend_config", "get_group_rank", "get_global_rank", "get_process_group_ranks",
    "isend", "irecv", "batch_isend_irecv",
})  # fmt: skip
"""Functions of torch.distributed that take a group of workers, but give none of their values; and those that return before the
values are there (P2POp knows the first two by identity, so they cannot be wrapped)."""
_OS = ("/os.py", "/_collections_abc.py")
_FIRST_CLOCK_S = 1.7e9
_CLOCK_SHIFT_S = 86_399.123457
_MOST_SITES = 50
_Finds = Callable[[FrameType], FrameType | None]


@functools.cache
def is_users(filename: str) -> bool:
    """Whether a source file belongs to the user: no library, not unisono (its demos play the user)."""
    if filename.startswith("<"):
        return False
    path = os.path.realpath(filename)
    if path.startswith(_OURS):
        return path.startswith(_DEMOS)
    return not path.startswith(_LIBRARIES)


def users_modules() -> list[ModuleType]:
    """The modules that belong to the user, of all that are imported."""
    return [
        module
        for module in list(sys.modules.values())
        if isinstance(module, ModuleType) and is_users(module.__dict__.get("__file__") or "<none>")
    ]


def users_frame(frame: FrameType | None, *, through: Callable[[str], bool] = lambda _: True) -> FrameType | None:
    """The innermost frame of the user's code, if all frames between are files that ``through`` allows."""
    while frame is not None and not is_users(frame.f_code.co_filename):
        if not through(frame.f_code.co_filename):
            return None
        frame = frame.f_back
    return frame


def place(frame: FrameType | None) -> dict[str, Any]:
    """File, line and text of where a frame stands: fields of a `Note`."""
    if frame is None:
        return {}
    file, line = frame.f_code.co_filename, frame.f_lineno
    return {"file": file, "line": line, "code": linecache.getline(file, line).strip()}


@functools.cache
def collectives() -> tuple[str, ...]:
    """Names of the functions of torch.distributed by which workers exchange values, as the installed PyTorch has them."""
    return tuple(
        name
        for name in distributed_c10d.__all__
        if name not in UNWATCHED
        and type(function := getattr(distributed_c10d, name)) is FunctionType
        and "group" in inspect.signature(function).parameters
    )


class ScriptWatch:
    """Notes and changes for one process.

    Args:
        changes: The experiment.
        shift: Number of clock shifts: runs of the same job see different times.
        scratch: Files below are ours.
    """

    def __init__(self, changes: Set[Change], *, shift: int, scratch: Path) -> None:
        self.changes = changes
        self.phase = "script"
        self.notes: dict[str, list[Note]] = {}
        self._shift_s = shift * _CLOCK_SHIFT_S
        self._scratch = str(scratch)
        self._ticks = 0

    def note(self, kind: str, what: str, frame: FrameType | None, **more: Any) -> None:
        """Remembers that the user's code did something, once a line and phase."""
        entry = Note(what=what, phase=self.phase, **place(frame), **more)
        known = self.notes.setdefault(kind, [])
        if entry not in known and len(known) < _MOST_SITES:
            known.append(entry)

    def hides_rank(self) -> bool:
        return Change.HIDE_RANK in self.changes

    def install(self) -> None:
        """Takes effect for the rest of the process's life."""
        self._watch_rank()
        self._watch_clocks()
        self._watch_entropy()
        self._watch_seeds()
        self._wrap(torch, "set_num_threads", "threads", self._unless(Change.HOLD_THREADS, None))
        if Change.DETERMINISTIC in self.changes:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True, warn_only=True)
        self._wrap(torch, "use_deterministic_algorithms", "deterministic", self._unless(Change.DETERMINISTIC, None))
        for name in collectives():
            self.watch_call(torch.distributed, name, f"torch.distributed.{name}()")
        sys.addaudithook(self._audit)

    # ------------------------------------------------------------------ functions that the user's code calls

    def _wrap(self, module: Any, name: str, kind: str, instead: Callable[..., Any], finds: _Finds | None = None) -> None:
        """Notes calls of a function by the user's code, for which ``instead(original, *args)`` answers.

        Args:
            finds: The frame of the user's code that makes a call, or None if libraries do so for themselves; by default the
                caller must be the user's.
        """
        original = getattr(module, name)

        @functools.wraps(original)
        def function(*args: Any, **kwargs: Any) -> Any:
            caller = sys._getframe(1)
            user = finds(caller) if finds is not None else caller if is_users(caller.f_code.co_filename) else None
            if user is None or self.phase == "trainer":
                return original(*args, **kwargs)
            self.note(kind, f"{module.__name__}.{name}()", user)
            return instead(original, *args, **kwargs)

        setattr(module, name, function)

    def _unless(self, change: Change, value: Any) -> Callable[..., Any]:
        return lambda call, *args, **kwargs: value if change in self.changes else call(*args, **kwargs)

    def watch_call(self, owner: Any, name: str, what: str) -> None:
        """Notes what a function that talks to other workers gave the user's code."""
        original = getattr(owner, name)

        @functools.wraps(original)
        def function(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            caller = sys._getframe(1)
            if is_users(caller.f_code.co_filename):
                filled = [*args, *kwargs.values()][:1]
                self.note("talk", what, caller, order=len(self.notes.get("talk", ())), result=_short([filled, result]))
            return result

        setattr(owner, name, function)

    def _watch_rank(self) -> None:
        watch = self

        class Environment(type(os.environ)):  # type: ignore[misc]
            def __getitem__(self, key: str) -> str:
                value: str = super().__getitem__(key)
                if key not in _ALONE or watch.phase == "trainer":
                    return value
                user = users_frame(sys._getframe(1), through=lambda at: at.startswith((_OURS, "<frozen")) or at.endswith(_OS))
                if user is None:
                    return value
                watch.note("rank", f"os.environ[{key!r}]", user)
                return _ALONE[key] if watch.hides_rank() else value

        os.environ.__class__ = Environment
        self._wrap(torch.distributed, "get_rank", "rank", self._unless(Change.HIDE_RANK, 0))
        self._wrap(torch.distributed, "get_world_size", "rank", self._unless(Change.HIDE_RANK, 1))

    # ------------------------------------------------------------------ clocks

    def _watch_clocks(self) -> None:
        for name in ("time", "perf_counter", "monotonic"):
            self._wrap(time, name, "clock", lambda clock: self._clock(clock, 1))
            self._wrap(time, f"{name}_ns", "clock", lambda clock: self._clock(clock, 10**9))
        watch = self

        class Kind(type):
            def __instancecheck__(cls, value: object) -> bool:
                return isinstance(value, real)

            def __subclasscheck__(cls, kind: type) -> bool:
                return issubclass(kind, real)

        class Datetime(real, metaclass=Kind):
            @classmethod
            def now(cls, tz: Any = None) -> Any:
                return real.fromtimestamp(watch._now("datetime.now()", sys._getframe(1)), tz)

            @classmethod
            def today(cls) -> Any:
                return real.fromtimestamp(watch._now("datetime.today()", sys._getframe(1)))

            @classmethod
            def utcnow(cls) -> Any:
                return real.fromtimestamp(watch._now("datetime.utcnow()", sys._getframe(1)), UTC).replace(tzinfo=None)

        Datetime.__name__ = Datetime.__qualname__ = "datetime"
        Datetime.__module__ = "datetime"
        sys.modules["datetime"].datetime = Datetime  # type: ignore[attr-defined]

    def _clock(self, clock: Callable[[], Any], unit: int) -> Any:
        now = clock()
        if Change.STOP_TIME not in self.changes:
            return now + type(now)(self._shift_s * unit)
        self._ticks += 1  # a clock that stands still would divide somebody by zero
        return type(now)((_FIRST_CLOCK_S + self._ticks * 1e-3) * unit)

    def _now(self, what: str, caller: FrameType) -> float:
        if not is_users(caller.f_code.co_filename):
            return time.time()
        self.note("clock", what, caller)
        return float(self._clock(time.time, 1))

    # ------------------------------------------------------------------ randomness

    def _watch_entropy(self) -> None:
        watch, fixed = self, random.Random(20).randbytes

        def library(file: str) -> bool:
            return not file.startswith(_OURS) and "multiprocessing" not in file and "tempfile" not in file

        self._wrap(
            os,
            "urandom",
            "entropy",
            lambda urandom, size: fixed(size) if self._fixes_entropy() else urandom(size),
            finds=lambda frame: users_frame(frame, through=library),
        )
        random._urandom = os.urandom  # type: ignore[attr-defined]
        self._wrap(os, "getpid", "entropy", self._unless(Change.FIX_ENTROPY, 4242))
        self._wrap(socket, "gethostname", "entropy", self._unless(Change.FIX_ENTROPY, "host"))
        plain = random.Random.__init__

        def init(self: random.Random, x: Any = None) -> None:
            caller = sys._getframe(1)
            if x is None and is_users(caller.f_code.co_filename):
                watch.note("entropy", "random.Random()", caller)
                x = 7 if watch._fixes_entropy() else None
            plain(self, x)

        random.Random.__init__ = init  # type: ignore[method-assign]
        if self._fixes_entropy():
            random.seed(7)
            np.random.seed(7)
            torch.default_generator.manual_seed(7)

    def _fixes_entropy(self) -> bool:
        return Change.FIX_ENTROPY in self.changes

    def _watch_seeds(self) -> None:
        torchs = str(Path(torch.__file__).parent) + os.sep
        functions = [
            *[(module, name) for module in (torch, torch.random) for name in ("manual_seed", "seed")],
            *[(torch.cuda, "manual_seed"), (torch.cuda, "manual_seed_all"), (np.random, "seed"), (random, "seed")],
        ]

        def seed(original: Any, *args: Any, **kwargs: Any) -> Any:
            if args == (None,) or not (args or kwargs):
                self.note("entropy", "seed()", users_frame(sys._getframe(1)))
                if self._fixes_entropy():
                    return original(7) if original.__module__ != torch.random.__name__ else torch.manual_seed(7)
            if self.phase != "script" and Change.IGNORE_SEEDS in self.changes:
                return torch.default_generator if original.__name__ == "manual_seed" else None
            return original(*args, **kwargs)

        def finds(frame: FrameType) -> FrameType | None:
            return users_frame(frame, through=lambda file: not file.startswith((_OURS, torchs)))

        for module, name in functions:
            self._wrap(module, name, "seed", seed, finds)

    # ------------------------------------------------------------------ files

    def _audit(self, event: str, args: tuple[Any, ...]) -> None:
        if event != "open" or not isinstance(args[0], (str, os.PathLike)) or not isinstance(args[1], str):
            return
        path = str(Path(args[0]).absolute())
        if not set(args[1]) & set("wax+") or path.startswith((self._scratch, "/dev/", "/proc/")):
            return
        user = users_frame(sys._getframe(1), through=lambda file: not file.startswith(_OURS))
        if user is not None:
            self.note("writes", path, user)


def _short(value: Any) -> str:
    """A value that two runs can be compared by."""
    if isinstance(value, torch.Tensor):
        return str(value.detach().reshape(-1)[:8].tolist())
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_short(item) for item in value) + "]"
    return repr(value)[:200] if isinstance(value, (int, float, str, bytes, dict, type(None))) else type(value).__name__
