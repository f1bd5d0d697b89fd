"""Files of a run directory are whole or absent, on a local folder and on a remote file system."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from unisono.checkpoint.store import Store
from unisono.errors import CheckpointError, ConfigurationError


@pytest.fixture(params=["local", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return Store(tmp_path / "runs" / "x" if request.param == "local" else f"memory://{uuid.uuid4().hex}/runs/x")


def test_what_is_written_is_read(store: Store) -> None:
    store.write("a/b/c.bin", b"one")
    store.write("a/b/c.bin", memoryview(b"two"))
    store.write("empty", b"")
    assert store.read("a/b/c.bin") == b"two"
    assert store.read("empty") == b""
    assert (store.size("a/b/c.bin"), store.size("empty"), store.size("a"), store.size("gone")) == (3, 0, None, None)
    assert (store.exists("a/b/c.bin"), store.exists("a/b"), store.exists("a/b/gone")) == (True, False, False)


def test_listing_gives_names_of_direct_children(store: Store) -> None:
    assert store.list() == store.list("gone") == []
    for path in ("b/x/y", "b/z", "a"):
        store.write(path, b"1")
    assert store.list() == ["a", "b"]
    assert store.list("b") == ["x", "z"]


def test_removing_takes_a_file_or_a_tree_and_forgives_a_missing_one(store: Store) -> None:
    for path in ("t/x/y", "t/z", "f", "kept"):
        store.write(path, b"1")
    for path in ("t", "f", "gone", "gone/too"):
        store.remove(path)
    assert store.list() == ["kept"]


def test_appending_adds_at_the_end(store: Store) -> None:
    store.append("logs/metrics.jsonl", "ä\n")
    store.append("logs/metrics.jsonl", "b\n")
    assert store.read("logs/metrics.jsonl").decode() == "ä\nb\n"


def test_a_missing_file_is_named(store: Store) -> None:
    with pytest.raises(CheckpointError, match=re.escape(store.where("a/gone"))) as caught:
        store.read("a/gone")
    assert caught.value.file == store.where("a/gone")
    assert isinstance(caught.value.__cause__, FileNotFoundError)


@pytest.mark.parametrize("path", ["", "/etc/x", "../x", "a/../../x"])
def test_no_path_leads_out_of_the_directory(store: Store, path: str) -> None:
    with pytest.raises(ValueError, match="not a path inside"):
        store.remove(path)


def test_a_url_of_a_local_folder_is_local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Store(f"file://{tmp_path}/x").path == tmp_path / "x"
    assert not Store("memory://x").is_local
    monkeypatch.chdir(tmp_path)
    relative = Store("runs/x")
    monkeypatch.chdir("/")
    relative.write("a", b"1")
    assert (tmp_path / "runs/x/a").read_bytes() == b"1"
    assert relative.where("a") == "runs/x/a"


def test_an_unknown_protocol_is_a_configuration_error() -> None:
    with pytest.raises(ConfigurationError, match="nosuch://x"):
        Store("nosuch://x")


def test_bytes_reach_the_disk_before_the_name_and_the_name_before_the_return(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace

    def spy_fsync(handle: int) -> None:
        calls.append(f"fsync {Path(f'/proc/self/fd/{handle}').readlink().name}")
        fsync(handle)

    def spy_replace(source: Path, target: Path) -> None:
        calls.append(f"replace {Path(target).name}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(os, "replace", spy_replace)
    Store(tmp_path).write("new/name", b"1")
    assert calls[0] == f"fsync {tmp_path.name}"
    assert calls[1].startswith("fsync .name.")
    assert calls[2:] == ["replace name", "fsync new"]


def test_a_failed_write_leaves_the_old_content_and_no_temporary_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    store.write("file", b"old")

    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch, pytest.raises(CheckpointError, match=r"file \(3 bytes\): Input/output error"):
        patch.setattr(os, "replace", fail)
        store.write("file", b"new")
    assert os.listdir(tmp_path) == ["file"]  # noqa: PTH208 (the store's own listing hides temporary files)
    assert store.read("file") == b"old"


def test_a_folder_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"x/file.*choose another run_dir") as caught:
        Store(tmp_path / "x").write("file", b"1")
    assert isinstance(caught.value.__cause__, OSError)


def test_leftovers_of_a_killed_process_are_invisible_and_cleaned(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write("a/file", b"1")
    (tmp_path / "a" / ".file.1-ab.unisono-tmp").write_bytes(b"half")
    (tmp_path / "a" / "other.tmp").write_bytes(b"the user's")
    assert store.list("a") == ["file", "other.tmp"]
    store.clean()
    assert sorted(child.name for child in (tmp_path / "a").iterdir()) == ["file", "other.tmp"]


def test_a_lost_connection_is_not_a_missing_file(monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store("memory://x")

    def lost(*_: object, **__: object) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(type(store._files.system), "info", lost)  # type: ignore[union-attr]
    with pytest.raises(CheckpointError, match="no route to host"):
        store.exists("a")


FILL = """
import errno, os, sys
from unisono.checkpoint.store import Store
from unisono.errors import CheckpointError

store = Store(sys.argv[1])
store.write("small", b"old")
store.append("log", "line\\n")
for write in (lambda: store.write("small", bytes(4_000_000)), lambda: store.append("log", "x" * 4_000_000)):
    try:
        write()
    except CheckpointError as error:
        assert isinstance(error.__cause__, OSError) and error.__cause__.errno in (errno.ENOSPC, errno.EFBIG), error
        print(error)
    else:
        raise SystemExit("4 MB fitted")
assert store.read("small") == b"old"
assert store.read("log") == b"line\\n"
assert sorted(os.listdir(sys.argv[1])) == ["log", "small"], os.listdir(sys.argv[1])
"""


def assert_full_disk_is_explained(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, done.stderr
    small, log = done.stdout.splitlines()
    assert "/small: the disk is full" in small
    assert "/log: the disk is full" in log
    assert "4,000,000 bytes were needed" in small
    assert "Free space or choose another run_dir; what was saved before is whole." in small


def test_a_file_beyond_the_size_limit_leaves_the_old_one_whole(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FILL, str(tmp_path)],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000)),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert_full_disk_is_explained(done)


def test_a_full_disk_leaves_the_old_file_whole(tmp_path: Path) -> None:
    # In a mount namespace of its own, so that nothing stays mounted.
    space = ["unshare", "--mount", "--map-root-user", "sh", "-ec"]
    mount = f"mount -t tmpfs -o size=1m tmpfs {tmp_path}"
    try:
        allowed = subprocess.run([*space, mount], capture_output=True, timeout=60, check=False).returncode == 0
    except FileNotFoundError:
        allowed = False
    if not allowed:
        pytest.skip("this machine does not let us mount a small disk")
    done = subprocess.run(
        [*space, f'{mount}; exec "$@"', "sh", sys.executable, "-c", FILL, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert_full_disk_is_explained(done)
    assert "are free" in done.stdout
