"""Where the demos' data comes from: a given path, a copy on this machine, or a download from the data set's own address."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from unisono.errors import ConfigurationError, DataError
from unisono.world import World

_CHUNK = 1 << 18
_CONNECT_S = 20.0
_OTHERS_WAIT_S = 1800.0


@dataclass(frozen=True, kw_only=True)
class Download:
    """One file to download."""

    url: str
    size: int
    """Bytes."""
    sha256: str

    @property
    def name(self) -> str:
        """Of the file."""
        return self.url.rpartition("/")[2]


@dataclass(frozen=True, kw_only=True)
class Source:
    """A data set and the three ways to get it."""

    name: str
    folder: str
    """In the cache."""
    installed: Sequence[Path | None]
    """Where packages put a copy; None: that package is not installed."""
    install: str
    """The command that installs such a package."""
    downloads: Sequence[Download]


def package_file(package: str, path: str) -> Path | None:
    """*local*. A file or folder of an installed Python package, which is not imported; None if there is none."""
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations if spec is not None else None) or ():
        if (Path(folder) / path).exists():
            return Path(folder) / path
    return None


def cache_folder() -> Path:
    """*local*. Where downloads are kept: ``unisono`` in the user's cache folder (``XDG_CACHE_HOME``, else ``~/.cache``)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "unisono"


def existing(path: str) -> Path:
    """*local*. The path that ``--data`` gives; ConfigurationError if nothing is there."""
    if not Path(path).exists():
        raise ConfigurationError(f"--data: there is no file or folder {path}. Check the path.")
    return Path(path)


def obtain(source: Source, given: str | None, world: World) -> Path:
    """*collective*. The file or folder that holds the data: what was given, else an installed copy, else a download.

    The first worker of each host downloads, the others of that host wait for it. Of several downloads it is their folder.

    Raises:
        ConfigurationError: What was given does not exist.
        DataError: There is no copy, and the download failed or has other bytes; the message names the three ways.
    """
    if given is not None:
        return existing(given)
    for installed in source.installed:
        if installed is not None and installed.exists():
            return installed
    folder = cache_folder() / source.folder
    files = [folder / download.name for download in source.downloads]
    missing = [(d, file) for d, file in zip(source.downloads, files, strict=True) if not _is_whole(file, d)]
    if missing and world.local_rank == 0:
        for download, file in missing:
            _fetch(source, download, file, shown=world.is_main)
    elif missing:
        _wait_for(source, missing)
    return files[0] if len(files) == 1 else folder


def _is_whole(file: Path, download: Download) -> bool:
    """By its size: the digest was checked before the file got its name."""
    return file.is_file() and file.stat().st_size == download.size


def _fetch(source: Source, download: Download, file: Path, *, shown: bool) -> None:
    part = file.with_name(f"{file.name}.{os.getpid()}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        digest, size = _copy(download, part, shown=shown)
        if (digest, size) != (download.sha256, download.size):
            raise DataError(
                f"{download.url} has {size:,} bytes with SHA-256 {digest} instead of {download.size:,} bytes with "
                f"{download.sha256}: it was damaged in transfer, or is another version. {_ways(source)}"
            )
        part.replace(file)
    except OSError as error:  # URLError and timeouts are OSErrors
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        if isinstance(error, urllib.error.HTTPError):
            error.close()  # it holds the connection
        raise DataError(
            f"{source.name} is not on this machine, and {download.url} cannot be read ({reason}). {_ways(source)}"
        ) from None
    finally:
        part.unlink(missing_ok=True)


def _copy(download: Download, part: Path, *, shown: bool) -> tuple[str, int]:
    """Downloads into ``part``; the SHA-256 and the number of bytes received."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    hasher, size = hashlib.sha256(), 0
    with (
        Progress(*columns, disable=not shown) as progress,
        urllib.request.urlopen(download.url, timeout=_CONNECT_S) as answer,
        part.open("wb") as target,
    ):
        task = progress.add_task(download.name, total=download.size)
        while chunk := answer.read(_CHUNK):
            target.write(chunk)
            hasher.update(chunk)
            size += len(chunk)
            progress.update(task, completed=size)
            if size > download.size:
                break  # another file: do not fill the disk
    return hasher.hexdigest(), size


def _wait_for(source: Source, missing: Sequence[tuple[Download, Path]]) -> None:
    """Until this host's first worker has the files. If that fails, the launcher ends this worker too."""
    deadline = time.monotonic() + _OTHERS_WAIT_S
    while not all(_is_whole(file, download) for download, file in missing):
        if time.monotonic() > deadline:
            raise DataError(f"this host's first worker did not download {source.name} in {_OTHERS_WAIT_S / 60:.0f} minutes")
        time.sleep(0.2)


def _ways(source: Source) -> str:
    addresses = " ".join(download.url for download in source.downloads)
    return (
        f"Three ways to the data: (1) --data PATH with a copy of yours; (2) {source.install}; "
        f"(3) download {addresses} where there is a network, into {cache_folder() / source.folder}"
    )
