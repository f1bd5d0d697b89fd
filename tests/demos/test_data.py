"""Three ways to a data set, in their order, and what is said when none leads there."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from unisono.demos import _data
from unisono.demos._data import Download, Source, obtain
from unisono.errors import ConfigurationError, DataError
from unisono.world import World

CONTENT = b"one million ratings"
ALONE = World()


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """A web server that has ``set.bin``."""
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "set.bin").write_bytes(CONTENT)
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path / "web"))) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return tmp_path / "cache" / "unisono"


def source(address: str, *, installed: Path | None = None, content: bytes = CONTENT, name: str = "set.bin") -> Source:
    download = Download(url=f"{address}/{name}", size=len(content), sha256=hashlib.sha256(content).hexdigest())
    return Source(name="Ratings", folder="ratings", installed=(None, installed), install="get ratings", downloads=(download,))


def test_the_path_given_comes_first_then_what_is_installed_then_the_download(address: str, tmp_path: Path, cache: Path) -> None:
    mine, installed = tmp_path / "mine", tmp_path / "installed"
    mine.mkdir()
    installed.mkdir()
    assert obtain(source(address, installed=installed), str(mine), ALONE) == mine
    assert obtain(source(address, installed=installed), None, ALONE) == installed
    assert not cache.exists()
    fetched = obtain(source(address, installed=tmp_path / "gone"), None, ALONE)
    assert fetched == cache / "ratings" / "set.bin"
    assert fetched.read_bytes() == CONTENT


def test_what_was_downloaded_once_needs_no_network(address: str, cache: Path) -> None:
    first = obtain(source(address), None, ALONE)
    nowhere = source("http://127.0.0.1:1")
    assert obtain(nowhere, None, ALONE) == first
    first.write_bytes(b"cut off")
    with pytest.raises(DataError):
        obtain(nowhere, None, ALONE)


@pytest.mark.parametrize("expected", [b"another million rows", CONTENT + b" more", CONTENT[:5]])
def test_other_bytes_than_expected_are_refused_and_not_kept(expected: bytes, address: str, cache: Path) -> None:
    with pytest.raises(DataError, match="instead of"):
        obtain(source(address, content=expected), None, ALONE)
    assert list((cache / "ratings").iterdir()) == []


def test_without_copy_and_network_the_error_names_the_three_ways(address: str, cache: Path) -> None:
    for wrong in (source("http://127.0.0.1:1"), source(address, name="missing.bin")):
        with pytest.raises(DataError) as caught:
            obtain(wrong, None, ALONE)
        text = str(caught.value)
        assert "--data PATH" in text
        assert "get ratings" in text
        assert wrong.downloads[0].url in text
        assert str(cache / "ratings") in text


def test_a_path_that_does_not_exist_is_an_error_and_nothing_else_is_tried(address: str, cache: Path) -> None:
    with pytest.raises(ConfigurationError, match="no file or folder /not/here"):
        obtain(source(address), "/not/here", ALONE)
    assert not cache.exists()


def test_the_other_workers_of_a_host_wait_for_the_first(address: str) -> None:
    found: list[Path] = []
    waiting = threading.Thread(target=lambda: found.append(obtain(source(address), None, World(rank=1, size=2, local_rank=1))))
    waiting.start()
    assert waiting.is_alive()
    first = obtain(source(address), None, World(rank=0, size=2))
    waiting.join(timeout=20)
    assert found == [first]


def test_a_file_of_an_installed_package_is_found_without_importing_it() -> None:
    assert _data.package_file("no_such_package_here", "x") is None
    assert _data.package_file("unisono", "no_such_file") is None
    assert _data.package_file("unisono", "demos/digits.py") == Path(_data.__file__).parent / "digits.py"
