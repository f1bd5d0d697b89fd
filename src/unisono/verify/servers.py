"""The fork servers from which workers start: PyTorch is imported once, and a run of the script starts in milliseconds."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Mapping, Sequence

from unisono.system.fork_server import ForkServer
from unisono.system.reaper import Reaper

_PRELOADED = (
    "numpy",
    "torch",
    "torch._dynamo",
    "torch.distributed",
    "rich.console",
    "unisono.training.trainer",
    "unisono.verify.child",
)
_KNOW_USERS = "unisono.verify.watch:users_modules"


class ForkServers:
    """Fork servers by the environment of their interpreter, made when they are first needed. Used as a context; all methods
    are *local*, and any thread may call them."""

    def __init__(self) -> None:
        self.reaper = Reaper()
        self._made: dict[tuple[tuple[str, str], ...], ForkServer] = {}
        self._preloaded: list[str] = []
        self._lock = threading.Lock()
        self._closing = contextlib.ExitStack()

    def __enter__(self) -> ForkServers:
        self._closing.enter_context(self.reaper)
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.close()

    def get(self, environment: Mapping[str, str]) -> ForkServer:
        """The server whose interpreter has these variables, beside those of this process; an empty one is not set."""
        key = tuple(sorted(environment.items()))
        with self._lock:
            if key not in self._made:
                server = ForkServer(environment=environment, preload=_PRELOADED, reaper=self.reaper, label=["verify"])
                self._made[key] = self._closing.enter_context(server)
                server.preload(self._preloaded, then=_KNOW_USERS)
            return self._made[key]

    def preload(self, modules: Sequence[str]) -> None:
        """Imports modules in all servers, also in those to come. One that cannot be imported is left to the script."""
        with self._lock:
            new = [name for name in modules if name not in self._preloaded]
            self._preloaded += new
            for server in self._made.values() if new else ():
                server.preload(new, then=_KNOW_USERS)
