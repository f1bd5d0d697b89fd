"""The run directory: whether it can be written, how fast, how much room there is. No torch. Leaves nothing behind."""

from __future__ import annotations

import os
import secrets
import shutil
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from unisono.checkpoint.store import Store
from unisono.doctor.facts import StorageFacts
from unisono.errors import CheckpointError, UnisonoError

_SMALL_BYTES = 4096
_SMALL = 5
_LARGE_BYTES = 64 * 1024 * 1024
_PROBE_BYTES = 1024 * 1024
_LARGE_S = 0.75  # a slow disk gets as many bytes as it takes in this time


@contextmanager
def measured(url: str) -> Iterator[tuple[StorageFacts, str]]:
    """Measures a run directory as a checkpoint writes to it: atomically, and forced to disk where there is one. *local*

    Until the block ends there is a file in the directory, whose name is given beside the facts ("" if it cannot be
    written). Afterwards the file is gone, and so are the folders that writing it made.
    """
    with ExitStack() as stack:
        name = f".unisono-doctor-{secrets.token_hex(8)}"
        try:
            store = Store(url)
            stack.enter_context(_cleaning(store, name))
            facts = _measure(store, name)
        except (UnisonoError, OSError) as error:
            facts, name = StorageFacts(url=url, error=_reason(error)), ""
        yield facts, name


def sees(url: str, name: str) -> bool:
    """Whether a file that another worker has written can be seen from here. *local*"""
    try:
        return Store(url).exists(name)
    except UnisonoError:
        return False


def _measure(store: Store, name: str) -> StorageFacts:
    free = _free(store)
    probe_s = _write(store, name, _PROBE_BYTES)
    nbytes = min(_LARGE_BYTES, max(_PROBE_BYTES, int(_PROBE_BYTES * _LARGE_S / probe_s)))
    if free is not None:
        nbytes = max(_SMALL_BYTES, min(nbytes, free // 4))
    large_s = _write(store, name, nbytes)
    small_s = statistics.median(_write(store, name, _SMALL_BYTES) for _ in range(_SMALL))
    return StorageFacts(url=store.url, small_s=small_s, rate=nbytes / large_s, free=free)


def _write(store: Store, name: str, nbytes: int) -> float:
    data = os.urandom(nbytes)  # some file systems compress, or do not store zeros at all
    began = time.perf_counter()
    store.write(name, data)
    return max(time.perf_counter() - began, 1e-9)


def _reason(error: BaseException) -> str:
    """What went wrong in a store, without the advice that a run would get."""
    cause = error.__cause__ if isinstance(error, CheckpointError) and error.__cause__ is not None else error
    if isinstance(cause, OSError) and cause.strerror:
        return cause.strerror if cause.filename is None else f"{cause.strerror}: {cause.filename}"
    return str(cause) or type(cause).__name__


@contextmanager
def _cleaning(store: Store, name: str) -> Iterator[None]:
    """Removes the file afterwards, and the folders that are not there yet."""
    from fsspec.core import url_to_fs

    system, root = url_to_fs(str(store.path) if store.path is not None else store.url)
    new = _missing(system, str(root).rstrip("/"))
    try:
        yield
    finally:
        with suppress(UnisonoError):
            store.remove(name)
        for folder in new:
            # Object stores have no folders, and a folder that somebody else has put something into is not ours.
            with suppress(Exception):
                system.rmdir(folder)


def _missing(system: Any, folder: str) -> list[str]:
    """The folders that are not there yet, the deepest first."""
    missing: list[str] = []
    with suppress(Exception):  # a store that cannot be reached says so when it is written to
        while folder.strip("/") and not system.exists(folder):
            missing.append(folder)
            folder = folder.rpartition("/")[0]
    return missing


def _free(store: Store) -> int | None:
    if store.path is None:
        return None
    with suppress(OSError):
        return shutil.disk_usage(next(folder for folder in (store.path, *store.path.parents) if folder.exists())).free
    return None
