"""The run directory: whether it can be written, how fast, how much room there is. No torch. Leaves nothing behind."""

from __future__ import annotations

import os
import secrets
import shutil
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unisono.checkpoint.store import Store
from unisono.errors import CheckpointError, UnisonoError

_SMALL_BYTES = 4096
_SMALL = 5
_LARGE_BYTES = 64 * 1024 * 1024
_PROBE_BYTES = 1024 * 1024
_LARGE_S = 0.75  # a slow disk gets as many bytes as it takes in this time


@dataclass(frozen=True, kw_only=True)
class Storage:
    """What was found out about a run directory."""

    url: str
    """The directory as the user gave it."""
    error: str = ""
    """Why it cannot be used; empty if it can."""
    small_s: float | None = None
    """Seconds to write a small file so that it survives a crash."""
    rate: float | None = None
    """Bytes per second of a large file, written in the same way."""
    free: int | None = None
    """Bytes that are free; None on file systems that do not tell."""
    blind: list[int] = field(default_factory=list)
    """Ranks of the workers that do not see what worker 0 has written."""


def measure(url: str) -> Storage:
    """Writes through the same door as a checkpoint does: atomic, and forced to disk where there is one. *local*"""
    try:
        with probing(url) as (store, name):
            free = _free(store)
            small_s = statistics.median(_write(store, name, _SMALL_BYTES) for _ in range(_SMALL))
            probe_s = _write(store, name, _PROBE_BYTES)
            nbytes = min(_LARGE_BYTES, max(_PROBE_BYTES, int(_PROBE_BYTES * _LARGE_S / probe_s)))
            if free is not None:
                nbytes = max(_SMALL_BYTES, min(nbytes, free // 4))
            large_s = _write(store, name, nbytes)
            store.remove(name)
            return Storage(url=url, small_s=small_s, rate=nbytes / large_s, free=free)
    except (UnisonoError, OSError) as error:
        return Storage(url=url, error=reason(error))


def reason(error: BaseException) -> str:
    """What went wrong in a store, without the advice that a run would get. *local*"""
    cause = error.__cause__ if isinstance(error, CheckpointError) and error.__cause__ is not None else error
    if isinstance(cause, OSError) and cause.strerror:
        return cause.strerror if cause.filename is None else f"{cause.strerror}: {cause.filename}"
    return str(cause) or type(cause).__name__


@contextmanager
def probing(url: str) -> Iterator[tuple[Store, str]]:
    """A store and the name of a file in it, which is gone afterwards, as are the folders that writing it made. *local*

    Raises:
        ConfigurationError: There is no driver for such a URL.
    """
    store = Store(url)
    name = f".unisono-doctor-{secrets.token_hex(8)}"
    system, root = _file_system(store)
    new = _missing(system, root)
    try:
        yield store, name
    finally:
        with suppress(UnisonoError):
            store.remove(name)
        for folder in new:
            # Object stores have no folders, and a folder that somebody else has put something into is not ours.
            with suppress(Exception):
                system.rmdir(folder)


def sees(url: str, name: str) -> bool:
    """Whether a file that another worker has written is there. *local*"""
    try:
        return Store(url).exists(name)
    except UnisonoError:
        return False


def _write(store: Store, name: str, nbytes: int) -> float:
    data = os.urandom(nbytes)  # some file systems compress, or do not store zeros at all
    began = time.perf_counter()
    store.write(name, data)
    return max(time.perf_counter() - began, 1e-9)


def _file_system(store: Store) -> tuple[Any, str]:
    from fsspec.core import url_to_fs

    system, root = url_to_fs(str(store.path) if store.path is not None else store.url)
    return system, str(root).rstrip("/")


def _missing(system: Any, folder: str) -> list[str]:
    """The folders that are not there yet, the deepest first."""
    missing: list[str] = []
    with suppress(Exception):  # a store that cannot be reached says so when it is written to
        while folder.strip("/") and not system.exists(folder):
            missing.append(folder)
            folder = folder.rpartition("/")[0]
    return missing


def _free(store: Store) -> int | None:
    folder: Path | None = store.path
    while folder is not None and not folder.exists():
        folder = folder.parent if folder.parent != folder else None
    try:
        return None if folder is None else shutil.disk_usage(folder).free
    except OSError:
        return None
