"""A run directory on any file system: a local folder, or anything that fsspec can reach.

Every write is all or nothing. Locally the bytes go to a temporary file beside the target, are synced to disk (fsync), and take
the target's name in one step (rename); then the folder is synced too. A single put to an object store is atomic by itself.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

from unisono.errors import CheckpointError, ConfigurationError

_TEMPORARY = ".unisono-tmp"
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# Some file systems have no fsync for folders, or do not let us open a folder that we may only write to.
_NO_FOLDER_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES, errno.EPERM}


class Store:
    """The files of one run directory. All methods are *local*; paths are relative to it, with "/" between parts.

    Methods raise CheckpointError if the file system refuses (disk full, no permission, no connection, a missing file, ...). After
    a failed write or append, what was there before is whole.

    Args:
        url: A local path ("runs/x", with or without "file://"), or an fsspec URL ("memory://x", "s3://bucket/runs/x").

    Attributes:
        url: The directory as the user gave it, for messages.
        path: The absolute local folder; None on a remote file system.

    Raises:
        ConfigurationError: fsspec does not know the protocol, or its driver is not installed.
    """

    def __init__(self, url: str | os.PathLike[str]) -> None:
        self.url = os.fspath(url)
        self.path: Path | None = None
        self._files: _LocalFiles | _RemoteFiles
        if "://" in self.url and not self.url.startswith(("file://", "local://")):
            self._files = _open_remote(self.url)
        else:
            plain = self.url.partition("://")[2] if "://" in self.url else self.url
            # Absolute, so that a script which changes its working folder keeps its run directory.
            self.path = Path(plain).expanduser().absolute()
            self._files = _LocalFiles(self.path)

    @property
    def is_local(self) -> bool:
        """True if the directory is a folder of this machine."""
        return self.path is not None

    def where(self, path: str = "") -> str:
        """`path` as a person can find it, for messages."""
        return f"{self.url.rstrip('/')}/{path}" if path else self.url

    def write(self, path: str, data: bytes | memoryview) -> None:
        """Writes `data` to `path`, replacing what was there, in one step that a crash cannot cut in half."""
        with self._errors("write", _checked(path), size=len(memoryview(data).cast("B"))):
            self._files.write(path, data)

    def append(self, path: str, text: str) -> None:
        """Adds `text` (UTF-8) at the end of `path`, for one writer at a time. Not forced to disk."""
        data = text.encode()
        with self._errors("append to", _checked(path), size=len(data)):
            self._files.append(path, data)

    def read(self, path: str) -> bytes:
        """All bytes of `path`."""
        with self._errors("read", _checked(path)):
            return self._files.read(path)

    def size(self, path: str) -> int | None:
        """Bytes in the file `path`; None if there is no such file."""
        with self._errors("look at", _checked(path)):
            return self._files.size(path)

    def exists(self, path: str) -> bool:
        """True if `path` is a file. A lost connection is an error, not a "no"."""
        return self.size(path) is not None

    def list(self, path: str = "") -> list[str]:
        """Sorted names of the files and folders directly in the folder `path`; [] if there is none."""
        with self._errors("list", _checked(path) if path else ""):
            return sorted(self._files.list(path))

    def remove(self, path: str) -> None:
        """Removes the file or folder `path` with all its contents, if it exists."""
        with self._errors("remove", _checked(path)):
            self._files.remove(path)

    def prepare(self) -> None:
        """Creates the directory if it is missing, and checks that this user may write to it."""
        with self._errors("write to", ""):
            self._files.prepare()

    def clean(self) -> None:
        """Removes temporary files that a killed process left. One worker calls this before any worker writes."""
        with self._errors("clean", ""):
            self._files.clean()

    @contextmanager
    def _errors(self, action: str, path: str, size: int | None = None) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            # Drivers of remote file systems raise exceptions of their own; locally only OSError is expected.
            if self.is_local and not isinstance(error, OSError):
                raise
            raise self._explain(error, action, path, size) from error

    def _explain(self, error: Exception, action: str, path: str, size: int | None) -> CheckpointError:
        where = self.where(path)
        cause = (error.strerror if isinstance(error, OSError) else None) or f"{type(error).__name__}: {error}"
        if size is None:
            message = f"cannot {action} {where}: {cause}. Check that {self.url} is there and that this user may use it."
        elif isinstance(error, OSError) and error.errno in _FULL:
            free = self._free()
            message = (
                f"cannot {action} {where}: the disk is full ({cause}): {size:,} bytes were needed"
                f"{'' if free is None else f', {free:,} are free'}. "
                "Free space or choose another run_dir; what was saved before is whole."
            )
        else:
            message = (
                f"cannot {action} {where} ({size:,} bytes): {cause}. "
                f"Make {self.url} writable or choose another run_dir; what was saved before is whole."
            )
        return CheckpointError(message, file=where)

    def _free(self) -> int | None:
        if self.path is None:
            return None
        with suppress(OSError):
            return shutil.disk_usage(self.path).free
        return None


def _checked(path: str) -> str:
    parts = PurePosixPath(path).parts
    if not parts or path.startswith("/") or ".." in parts:
        raise ValueError(f"not a path inside the run directory: {path!r}")
    return path


class _LocalFiles:
    def __init__(self, root: Path) -> None:
        self.root = root

    def write(self, path: str, data: bytes | memoryview) -> None:
        target = self.root / path
        _make_folder(target.parent)
        # Not the random module: its state belongs to the user's training.
        temporary = target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}{_TEMPORARY}")
        try:
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)  # noqa: PTH105 (tests crash the process at this very call)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
        _sync_folder(target.parent)

    def append(self, path: str, data: bytes) -> None:
        target = self.root / path
        _make_folder(target.parent)
        with target.open("ab", buffering=0) as file:
            before = os.fstat(file.fileno()).st_size
            rest = memoryview(data)
            try:
                while rest:
                    rest = rest[file.write(rest) :]
            except BaseException:
                # Half a line would spoil the next one.
                os.ftruncate(file.fileno(), before)
                raise

    def read(self, path: str) -> bytes:
        return (self.root / path).read_bytes()

    def size(self, path: str) -> int | None:
        target = self.root / path
        try:
            return target.stat().st_size if not target.is_dir() else None
        except (FileNotFoundError, NotADirectoryError):
            return None

    def list(self, path: str) -> list[str]:
        try:
            return [child.name for child in (self.root / path).iterdir() if not child.name.endswith(_TEMPORARY)]
        except FileNotFoundError:
            return []

    def remove(self, path: str) -> None:
        target = self.root / path
        with suppress(FileNotFoundError):
            if target.is_dir() and not target.is_symlink():
                shutil.rmtree(target)
            else:
                target.unlink()
            # The removal must reach the disk before what is removed or written next.
            _sync_folder(target.parent)

    def prepare(self) -> None:
        _make_folder(self.root)
        if not os.access(self.root, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    def clean(self) -> None:
        for folder, _, names in os.walk(self.root):
            for name in names:
                if name.endswith(_TEMPORARY):
                    (Path(folder) / name).unlink(missing_ok=True)


class _RemoteFiles:
    def __init__(self, system: Any, root: str) -> None:
        self.system = system
        self.root = root.rstrip("/")

    def write(self, path: str, data: bytes | memoryview) -> None:
        self.system.makedirs(self._full(path).rpartition("/")[0], exist_ok=True)
        self.system.pipe_file(self._full(path), bytes(data))

    def append(self, path: str, data: bytes) -> None:
        # Object stores cannot append.
        self.write(path, (b"" if self.size(path) is None else self.read(path)) + data)

    def read(self, path: str) -> bytes:
        content: bytes = self.system.cat_file(self._full(path))
        return content

    def size(self, path: str) -> int | None:
        self.system.invalidate_cache()
        try:
            info = self.system.info(self._full(path))
        except (FileNotFoundError, NotADirectoryError):
            return None
        return int(info["size"]) if info["type"] == "file" else None

    def list(self, path: str) -> list[str]:
        folder = self._full(path) if path else self.root
        # Drivers cache listings; other workers write here too.
        self.system.invalidate_cache()
        try:
            found = [str(child).rstrip("/") for child in self.system.ls(folder, detail=False)]
        except FileNotFoundError:
            return []
        own = folder.strip("/")
        return [child.rpartition("/")[2] for child in found if child.strip("/") != own]

    def remove(self, path: str) -> None:
        self.system.invalidate_cache()
        with suppress(FileNotFoundError):
            self.system.rm(self._full(path), recursive=True)

    def prepare(self) -> None:
        """Folders come with the files in them."""

    def clean(self) -> None:
        """A put leaves nothing behind."""

    def _full(self, path: str) -> str:
        return f"{self.root}/{path}"


def _open_remote(url: str) -> _RemoteFiles:
    from fsspec.core import url_to_fs

    try:
        system, root = url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise ConfigurationError(
            f"cannot open run_dir {url!r}: {error}. Install the fsspec driver for it, or choose a local folder."
        ) from error
    return _RemoteFiles(system, root)


def _make_folder(folder: Path) -> None:
    missing = []
    while not folder.is_dir():
        missing.append(folder)
        folder = folder.parent
    for new in reversed(missing):
        new.mkdir(exist_ok=True)
        _sync_folder(new.parent)


def _sync_folder(folder: Path) -> None:
    try:
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
