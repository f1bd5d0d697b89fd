"""What the script does that a result may depend on, noted with the line that does it; and the changes that hide it.

Installed in a worker's process before the script runs: who reads the rank, a clock or the operating system's randomness, who
seeds, who changes the number of threads, who talks to other workers, who writes files. Only calls by the user's own code count:
libraries read clocks all the time.
"""

from __future__ import annotations

import functools
import linecache
import os
import random
import secrets
import socket
import sys
import sysconfig
import time
import uuid
from collections.abc import Callable, Set
from datetime import UTC
from datetime import datetime as real
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

import numpy as np
import torch

from unisono.verify.job import Change

_LIBRARIES = tuple(
    {
        os.path.realpath(folder) + os.sep
        for name in ("stdlib", "platstdlib", "purelib", "platlib")
        if (folder := sysconfig.get_path(name)) is not None
    }
)
_OURS = str(Path(__file__).resolve().parent.parent) + os.sep
_DEMOS = str(Path(_OURS) / "demos") + os.sep
_RANKS = {"RANK": "0", "LOCAL_RANK": "0", "GROUP_RANK": "0", "ROLE_RANK": "0", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
_SIZES = {"WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "ROLE_WORLD_SIZE": "1", "SLURM_NTASKS": "1"}
_OS = ("/os.py", "/_collections_abc.py")
_FIRST_CLOCK_S = 1.7e9
_CLOCK_SHIFT_S = 86_399.123457
_MOST_SITES = 50


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


def place(frame: FrameType) -> dict[str, Any]:
    """File, line and text of where a frame stands."""
    file, line = frame.f_code.co_filename, frame.f_lineno
    return {"file": file, "line": line, "code": linecache.getline(file, line).strip(), "function": frame.f_code.co_name}


class Watch:
    """Notes and changes for one process.

    Args:
        changes: The experiment.
        rank: This worker.
        size: How many there are.
        shift: Number of clock shifts: runs of the same job see different times.
        scratch: Files below are ours.
    """

    def __init__(self, changes: Set[Change], *, rank: int, size: int, shift: int, scratch: Path) -> None:
        self.changes = changes
        self.phase = "script"
        self.notes: dict[str, list[dict[str, Any]]] = {}
        self._rank, self._size = rank, size
        self._shift_s = shift * _CLOCK_SHIFT_S
        self._scratch = str(scratch)
        self._ticks = 0
        self._began_s = time.time()

    def note(self, kind: str, what: str, frame: FrameType | None, **more: Any) -> None:
        """Remembers that the user's code did something, once a line and phase."""
        where = place(frame) if frame is not None else {"file": "", "line": 0, "code": "", "function": ""}
        entry = {"what": what, "phase": self.phase, **where, **more}
        known = self.notes.setdefault(kind, [])
        if entry not in known and len(known) < _MOST_SITES:
            known.append(entry)

    # ------------------------------------------------------------------

    def install(self) -> None:
        """Takes effect for the rest of the process's life."""
        self._watch_rank()
        self._watch_clocks()
        self._watch_entropy()
        self._watch_seeds()
        self._watch_switches()
        self._watch_talk()
        sys.addaudithook(self._audit)

    def hides_rank(self) -> bool:
        return Change.HIDE_RANK in self.changes

    def sees_rank(self, what: str, frame: FrameType | None) -> bool:
        """Notes a look at the rank; whether the user's code took it."""
        if self.phase == "trainer":
            return False
        user = users_frame(frame, through=lambda file: file.startswith((_OURS, "<frozen")) or file.endswith(_OS))
        if user is None:
            return False
        self.note("rank", what, user)
        return True

    def _watch_rank(self) -> None:
        watch = self
        original = type(os.environ)
        hidden = {**_RANKS, **_SIZES}

        class Environment(original):  # type: ignore[misc,valid-type]
            def __getitem__(self, key: str) -> str:
                seen = key in hidden and watch.sees_rank(f"os.environ[{key!r}]", sys._getframe(1))
                value: str = super().__getitem__(key)
                return hidden[key] if seen and watch.hides_rank() else value

        os.environ.__class__ = Environment
        for name, alone in (("get_rank", 0), ("get_world_size", 1)):
            self._wrap(torch.distributed, name, "rank", instead=alone, if_changed=Change.HIDE_RANK)
        self._wrap(os, "getpid", "entropy", instead=4242, if_changed=Change.FIX_ENTROPY)
        self._wrap(socket, "gethostname", "entropy", instead="host", if_changed=Change.FIX_ENTROPY)

    def _wrap(self, module: Any, name: str, kind: str, *, instead: Any, if_changed: Change) -> None:
        """Notes calls of a function by the user's code, which under a change gets something else instead."""
        original = getattr(module, name)

        @functools.wraps(original)
        def function(*args: Any, **kwargs: Any) -> Any:
            caller = sys._getframe(1)
            if self.phase != "trainer" and is_users(caller.f_code.co_filename):
                self.note(kind, f"{module.__name__}.{name}()", caller)
                if if_changed in self.changes:
                    return instead
            return original(*args, **kwargs)

        setattr(module, name, function)

    # ------------------------------------------------------------------ clocks

    def _watch_clocks(self) -> None:
        for name in ("time", "perf_counter", "monotonic"):
            self._wrap_clock(name, 1)
            self._wrap_clock(f"{name}_ns", 10**9)
        watch = self

        class _Kind(type):
            def __instancecheck__(cls, value: object) -> bool:
                return isinstance(value, real)

            def __subclasscheck__(cls, kind: type) -> bool:
                return issubclass(kind, real)

        class Datetime(real, metaclass=_Kind):
            @classmethod
            def now(cls, tz: Any = None) -> Any:
                return watch._moment(
                    f"datetime.now({'' if tz is None else tz})", sys._getframe(1), lambda s: real.fromtimestamp(s, tz)
                )

            @classmethod
            def today(cls) -> Any:
                return watch._moment("datetime.today()", sys._getframe(1), real.fromtimestamp)

            @classmethod
            def utcnow(cls) -> Any:
                return watch._moment("datetime.utcnow()", sys._getframe(1), lambda s: real.fromtimestamp(s, UTC))

        Datetime.__name__ = Datetime.__qualname__ = "datetime"
        Datetime.__module__ = "datetime"
        sys.modules["datetime"].datetime = Datetime  # type: ignore[attr-defined]

    def _wrap_clock(self, name: str, unit: int) -> None:
        original = getattr(time, name)

        @functools.wraps(original)
        def clock() -> Any:
            caller = sys._getframe(1)
            if not is_users(caller.f_code.co_filename):
                return original()
            self.note("clock", f"time.{name}()", caller)
            if Change.STOP_TIME in self.changes:
                return type(original())(self._stopped() * unit)
            return original() + type(original())(self._shift_s * unit)

        setattr(time, name, clock)

    def _moment(self, what: str, caller: FrameType, make: Callable[[float], Any]) -> Any:
        now = self._began_s + time.perf_counter() % 1.0
        if not is_users(caller.f_code.co_filename):
            return make(time.time())
        self.note("clock", what, caller)
        return make(self._stopped() if Change.STOP_TIME in self.changes else now + self._shift_s)

    def _stopped(self) -> float:
        self._ticks += 1  # a clock that stands still would divide somebody by zero
        return _FIRST_CLOCK_S + self._ticks * 1e-3

    # ------------------------------------------------------------------ randomness

    def _fixed(self) -> bool:
        return Change.FIX_ENTROPY in self.changes

    def _watch_entropy(self) -> None:
        fixed = random.Random(20).randbytes
        original = os.urandom

        def urandom(size: int) -> bytes:
            library = lambda file: not file.startswith(_OURS) and "multiprocessing" not in file and "tempfile" not in file  # noqa: E731
            user = users_frame(sys._getframe(1), through=library)
            if user is None or self.phase == "trainer":
                return original(size)
            self.note("entropy", "the operating system's random numbers", user)
            return fixed(size) if self._fixed() else original(size)

        os.urandom = urandom
        random._urandom = urandom  # type: ignore[attr-defined]
        uuid.os.urandom = urandom  # type: ignore[attr-defined]
        secrets.token_bytes = lambda nbytes=None: urandom(32 if nbytes is None else nbytes)
        plain = random.Random.__init__
        watch = self

        def init(self: random.Random, x: Any = None) -> None:
            caller = sys._getframe(1)
            if x is None and is_users(caller.f_code.co_filename):
                watch.note("entropy", "random.Random()", caller)
                x = 7 if watch._fixed() else None
            plain(self, x)

        random.Random.__init__ = init  # type: ignore[method-assign]
        # In life each interpreter seeds these from the operating system; children of one nursery would share a state.
        random.seed(7 if self._fixed() else None)
        np.random.seed(7 if self._fixed() else None)

    def _watch_seeds(self) -> None:
        for module, name in (
            (torch, "manual_seed"),
            (torch, "seed"),
            (torch.random, "manual_seed"),
            (torch.random, "seed"),
            (torch.cuda, "manual_seed"),
            (torch.cuda, "manual_seed_all"),
            (np.random, "seed"),
            (random, "seed"),
        ):
            self._wrap_seed(module, name)

    def _wrap_seed(self, module: Any, name: str) -> None:
        original = getattr(module, name)
        torchs = str(Path(torch.__file__).parent) + os.sep

        @functools.wraps(original)
        def seed(*args: Any, **kwargs: Any) -> Any:
            user = users_frame(sys._getframe(1), through=lambda file: not file.startswith((_OURS, torchs)))
            if user is None:
                return original(*args, **kwargs)
            self.note("seed", f"{module.__name__}.{name}()", user)
            if args == (None,) or not (args or kwargs):
                self.note("entropy", f"{module.__name__}.{name}()", user)
                if self._fixed():
                    return (torch.manual_seed if module is torch else original)(7)
            if self.phase != "script" and Change.IGNORE_SEEDS in self.changes:
                return torch.default_generator if name == "manual_seed" else None
            return original(*args, **kwargs)

        setattr(module, name, seed)

    # ------------------------------------------------------------------ switches, talk, files

    def _watch_switches(self) -> None:
        threads, deterministic = torch.set_num_threads, torch.use_deterministic_algorithms

        def set_num_threads(nthreads: int) -> None:
            caller = sys._getframe(1)
            if is_users(caller.f_code.co_filename):
                self.note("threads", f"torch.set_num_threads({nthreads})", caller)
                if Change.HOLD_THREADS in self.changes:
                    return
            threads(nthreads)

        def use_deterministic_algorithms(mode: bool, *, warn_only: bool = False) -> None:
            caller = sys._getframe(1)
            if is_users(caller.f_code.co_filename):
                self.note("deterministic", f"torch.use_deterministic_algorithms({mode})", caller)
                if Change.DETERMINISTIC in self.changes:
                    return
            deterministic(mode, warn_only=warn_only)

        torch.set_num_threads = set_num_threads
        torch.use_deterministic_algorithms = use_deterministic_algorithms
        if Change.DETERMINISTIC in self.changes:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            deterministic(True, warn_only=True)

    def _watch_talk(self) -> None:
        for name in (
            "all_reduce", "all_gather", "all_gather_object", "all_gather_into_tensor", "all_gather_single", "broadcast", "reduce",
            "broadcast_object_list", "gather", "gather_object", "reduce_scatter", "scatter",
        ):  # fmt: skip
            if hasattr(torch.distributed, name):
                self.watch_call(torch.distributed, name, f"torch.distributed.{name}()")

    def watch_call(self, owner: Any, name: str, what: str) -> None:
        """Notes what a function that talks to other workers gave the user's code."""
        original = getattr(owner, name)

        @functools.wraps(original)
        def function(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            caller = sys._getframe(1)
            if is_users(caller.f_code.co_filename):
                self.note("talk", what, caller, order=len(self.notes.get("talk", ())), result=_short([args[:1], result]))
            return result

        setattr(owner, name, function)

    def _audit(self, event: str, args: tuple[Any, ...]) -> None:
        if event != "open" or not isinstance(args[0], (str, os.PathLike)) or not isinstance(args[1], str):
            return
        if not set(args[1]) & set("wax+"):
            return
        path = str(Path(args[0]).absolute())
        if path.startswith((self._scratch, "/dev/", "/proc/")):
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
