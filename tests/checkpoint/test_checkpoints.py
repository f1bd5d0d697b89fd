"""A checkpoint is complete or does not count; damage is named, and the one before is used."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.forked import start_script
from unisono.checkpoint.checkpoints import Checkpoint, Checkpoints, FileEntry
from unisono.checkpoint.store import Store
from unisono.errors import CheckpointError, ConfigurationError
from unisono.system.fork_server import ForkServer

STATE = {"state": {0: {"step": 3, "exp_avg": torch.arange(3.0)}}, "betas": (0.9, 0.999)}


@pytest.fixture(params=["local", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return Store(tmp_path if request.param == "local" else f"memory://{uuid.uuid4().hex}/runs/x")


def write(checkpoints: Checkpoints, step: int, *, workers: int = 2, seed: int = 0) -> dict[str, FileEntry]:
    files = dict(checkpoints.write_tensors(step, "model", {"weight": torch.full((4,), float(step))}))
    for rank in range(workers):
        files |= checkpoints.write_part(step, f"worker-{rank}", {**STATE, "rank": rank, "seed": seed})
    checkpoints.commit(step, files, {"step": step, "losses": (float("inf"), 1.5)})
    return files


def steps(store: Store) -> list[str]:
    return store.list("checkpoints")


def found(checkpoints: Checkpoints) -> Checkpoint:
    newest = checkpoints.newest()
    assert newest is not None
    return newest


def test_what_is_written_is_read(store: Store) -> None:
    checkpoints = Checkpoints(store, keep=2)
    assert checkpoints.newest() is None
    write(checkpoints, 3)
    newest = found(checkpoints)
    assert newest.step == 3
    assert newest.info == {"step": 3, "losses": (float("inf"), 1.5)}
    assert newest.tensors("model")["weight"].tolist() == [3.0] * 4
    assert newest.part_names("worker-") == newest.part_names() == ["worker-0", "worker-1"]
    part = newest.part("worker-1")
    assert part["rank"] == 1
    assert part["betas"] == (0.9, 0.999)
    assert part["state"][0]["exp_avg"].equal(torch.arange(3.0))
    assert checkpoints.damaged == []
    assert checkpoints.open(3).info == newest.info


def test_nothing_is_pickled_and_json_is_strict(store: Store) -> None:
    write(Checkpoints(store, keep=1), 3)
    names = store.list("checkpoints/step-3")
    assert {Path(name).suffix for name in names} == {".json", ".safetensors"}
    for name in names:
        data = store.read(f"checkpoints/step-3/{name}")
        text = data if name.endswith(".json") else data[8 : 8 + int.from_bytes(data[:8], "little")]
        json.loads(text, parse_constant=lambda constant: pytest.fail(f"{constant} is not JSON"))


def test_without_its_manifest_a_checkpoint_does_not_count(store: Store) -> None:
    checkpoints = Checkpoints(store, keep=2)
    checkpoints.write_part(1, "worker-0", STATE)
    assert checkpoints.newest() is None
    write(checkpoints, 2)
    checkpoints.write_part(3, "worker-0", STATE)
    assert found(checkpoints).step == 2
    assert checkpoints.damaged == []


def test_only_the_newest_are_kept_and_older_incomplete_ones_go(store: Store) -> None:
    checkpoints = Checkpoints(store, keep=2)
    for step in (2, 4, 10):
        checkpoints.write_part(step - 1, "worker-0", STATE)
        write(checkpoints, step)
    checkpoints.write_part(11, "worker-0", STATE)
    assert sorted(steps(store)) == ["step-10", "step-11", "step-4"]
    write(checkpoints, 12)
    assert sorted(steps(store)) == ["step-10", "step-12"]


def test_what_is_no_checkpoint_is_left_alone(store: Store) -> None:
    for name in ("step-x/file", "step-007/file", "notes.txt"):
        store.write(f"checkpoints/{name}", b"mine")
    checkpoints = Checkpoints(store, keep=1)
    write(checkpoints, 20)
    assert found(checkpoints).step == 20
    assert sorted(steps(store)) == ["notes.txt", "step-007", "step-20", "step-x"]


def test_writing_a_step_again_leaves_exactly_the_new_files(store: Store) -> None:
    checkpoints = Checkpoints(store, keep=1)
    write(checkpoints, 5, workers=3)
    write(checkpoints, 5, workers=2, seed=1)
    newest = found(checkpoints)
    assert newest.part_names() == ["worker-0", "worker-1"]
    assert newest.part("worker-0")["seed"] == 1
    # The manifest, two for each part, and the model, whose content and so whose name did not change.
    names = store.list("checkpoints/step-5")
    assert len(names) == 6
    assert "model.safetensors" in names


def test_a_complete_checkpoint_stays_whole_while_its_step_is_written_again(store: Store) -> None:
    checkpoints = Checkpoints(store, keep=1)
    write(checkpoints, 5, workers=2)
    checkpoints.write_part(5, "worker-0", {"other": torch.zeros(9)})
    checkpoints.write_tensors(5, "model", {"weight": torch.zeros(9)})
    newest = found(checkpoints)
    assert checkpoints.damaged == []
    assert newest.part("worker-0")["rank"] == 0


def damage_truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


def damage_flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(data)


def damage_empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [damage_truncate, damage_flip, damage_empty, Path.unlink], ids=lambda d: d.__name__)
@pytest.mark.parametrize("file", ["model.safetensors", "worker-1.safetensors", "worker-1.json", "checkpoint.json"])
def test_damage_is_named_and_the_checkpoint_before_is_used(tmp_path: Path, damage: Any, file: str) -> None:
    checkpoints = Checkpoints(Store(tmp_path), keep=3)
    for step in (1, 2):
        write(checkpoints, step)
    path = tmp_path / "checkpoints" / "step-2" / file
    damage(path)
    assert found(checkpoints).step == 1
    if file == "checkpoint.json" and damage is Path.unlink:
        # What a crash leaves looks the same.
        assert checkpoints.damaged == []
    else:
        [message] = checkpoints.damaged
        assert re.search(r"step 2 is damaged, the checkpoint of step 1 is used instead", message)
        assert str(path) in message


def test_every_flipped_bit_of_the_manifest_is_seen_or_harmless(tmp_path: Path) -> None:
    checkpoints = Checkpoints(Store(tmp_path), keep=2)
    for step in (1, 2):
        write(checkpoints, step, workers=1)
    path = tmp_path / "checkpoints" / "step-2" / "checkpoint.json"
    whole = path.read_bytes()
    info = found(checkpoints).info
    for position in range(len(whole)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1 << position % 8]) + whole[position + 1 :])
        newest = found(checkpoints)
        assert newest.step == 1 or newest.info == info


def test_damaged_ones_do_not_count_as_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(Store(tmp_path), keep=2)
    for step in (1, 2):
        write(checkpoints, step)
    damage_flip(tmp_path / "checkpoints" / "step-2" / "model.safetensors")
    assert found(checkpoints).step == 1
    write(checkpoints, 3)
    assert sorted(steps(Store(tmp_path))) == ["step-1", "step-3"]


def test_resuming_from_an_older_step_never_removes_what_was_just_written(tmp_path: Path) -> None:
    checkpoints = Checkpoints(Store(tmp_path), keep=2)
    for step in (20, 8, 10, 12):
        write(checkpoints, step)
    assert sorted(steps(Store(tmp_path))) == ["step-10", "step-12", "step-20"]


def test_if_all_are_damaged_nothing_starts_from_scratch(tmp_path: Path) -> None:
    checkpoints = Checkpoints(Store(tmp_path), keep=2)
    for step in (1, 2):
        write(checkpoints, step)
        damage_truncate(tmp_path / "checkpoints" / f"step-{step}" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"every checkpoint .* is damaged.*remove the checkpoints folder") as caught:
        checkpoints.newest()
    assert "step-1/model.safetensors has" in str(caught.value)
    assert "step-2/model.safetensors has" in str(caught.value)
    assert len(checkpoints.damaged) == 2


def test_damage_after_the_check_is_seen_when_read(tmp_path: Path) -> None:
    checkpoints = Checkpoints(Store(tmp_path), keep=2)
    write(checkpoints, 1)
    newest = found(checkpoints)
    damage_flip(tmp_path / "checkpoints" / "step-1" / "worker-0.safetensors")
    with pytest.raises(CheckpointError, match=r"worker-0\.safetensors has SHA-256 .*Start again") as caught:
        newest.part("worker-0")
    assert caught.value.file == str(tmp_path / "checkpoints/step-1/worker-0.safetensors")
    assert newest.part("worker-1")["rank"] == 1


def test_what_was_not_written_is_named(store: Store) -> None:
    checkpoints = Checkpoints(store, keep=2)
    write(checkpoints, 1)
    with pytest.raises(CheckpointError, match=r"has no ema\.safetensors; it has .*model\.safetensors"):
        checkpoints.open(1).tensors("ema")
    with pytest.raises(CheckpointError, match=r"step-7/checkpoint\.json"):
        checkpoints.open(7)


def test_a_part_on_another_disk_is_noticed_before_the_checkpoint_counts(store: Store, tmp_path: Path) -> None:
    elsewhere = Checkpoints(Store(tmp_path / "other host"), keep=2).write_part(1, "worker-1", STATE)
    checkpoints = Checkpoints(store, keep=2)
    own = checkpoints.write_part(1, "worker-0", STATE)
    with pytest.raises(CheckpointError, match=r"worker-1.*is not there.*shared file system"):
        checkpoints.commit(1, {**own, **elsewhere}, {})
    assert checkpoints.newest() is None


def test_a_checkpoint_of_a_later_format_is_not_misread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = Checkpoints(Store(tmp_path), keep=2)
    monkeypatch.setattr("unisono.checkpoint.checkpoints.FORMAT", 2)
    write(checkpoints, 1)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="has format 2, and this version of unisono reads format 1"):
        checkpoints.newest()


def test_failing_to_remove_old_ones_does_not_stop_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = Checkpoints(Store(tmp_path), keep=1)
    write(checkpoints, 1)

    def refuse(store: Store, path: str) -> None:
        raise CheckpointError(f"cannot remove {path}")

    monkeypatch.setattr(Store, "remove", refuse)
    with pytest.warns(UserWarning, match="could not be removed"):
        write(checkpoints, 2)
    assert found(checkpoints).step == 2


def test_settings_and_names_that_cannot_work_are_refused(store: Store) -> None:
    with pytest.raises(ConfigurationError, match="keep=0"):
        Checkpoints(store, keep=0)
    checkpoints = Checkpoints(store, keep=1)
    for name in ("", "a/b", ".hidden", "checkpoint"):
        with pytest.raises(ValueError, match="not a part of a checkpoint"):
            checkpoints._write(1, name, ".json", b"")
    with pytest.raises(CheckpointError, match=r"info .* tensors"):
        checkpoints.commit(1, {}, {"loss": torch.zeros(1)})


@pytest.mark.parametrize(
    "scenario",
    [
        "next step",
        "the same step again, fewer workers",
        "the same step again, more workers",
        "the same step twice again",
        "several steps",
    ],
)
def test_a_crash_at_any_instant_leaves_a_whole_checkpoint(
    tmp_path: Path, scenario: str, warm_commands: ForkServer | None
) -> None:
    script = Path(__file__).with_name("crash_campaign.py")
    process = start_script(warm_commands, script, str(tmp_path), scenario, folder=tmp_path)
    said, _ = process.communicate(timeout=100)
    assert process.returncode == 0, said
    assert int(said) > 25


def test_a_full_disk_stops_the_new_checkpoint_and_keeps_the_old(tmp_path: Path) -> None:
    script = """
import resource, sys, torch
from unisono.checkpoint.checkpoints import Checkpoints
from unisono.checkpoint.store import Store
from unisono.errors import CheckpointError

checkpoints = Checkpoints(Store(sys.argv[1]), keep=1)
checkpoints.commit(1, checkpoints.write_tensors(1, "model", {"w": torch.ones(10)}), {})
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    checkpoints.write_tensors(2, "model", {"w": torch.ones(1_000_000)})
except CheckpointError as error:
    print(error)
assert checkpoints.newest().tensors("model")["w"].equal(torch.ones(10))
"""
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(r"step-2/model.safetensors: the disk is full .* 4,000,\d+ bytes were needed", done.stdout)
