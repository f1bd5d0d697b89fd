"""The checkpoints of a run: written in parts by all workers, complete through one file, checked when read.

A checkpoint is a folder ``checkpoints/step-N``. It is complete once it has its ``checkpoint.json``, which is written last and
names every other file with its size and SHA-256. A crash before that leaves an incomplete folder, which is never read; a crash
after it leaves a complete checkpoint and perhaps obsolete files.

Writing a step again (after a resume, perhaps with another world size) must not harm an existing complete checkpoint. So none of
its files is overwritten with other content: the new content gets another name, which ends in its digest, and the new
``checkpoint.json`` replaces the old one in a single step.
"""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, TypedDict, cast

from torch import Tensor

from unisono.checkpoint.format import Json, decode, digest, encode, from_json, pack, to_json, unpack
from unisono.checkpoint.store import Store
from unisono.errors import CheckpointError, ConfigurationError

FORMAT = 1
_FOLDER = "checkpoints"
_MANIFEST = "checkpoint.json"
_TENSORS = ".safetensors"
_JSON = ".json"


class FileEntry(TypedDict):
    """One file of a checkpoint: its name inside the checkpoint's folder, SHA-256 in hexadecimal, and size in bytes."""

    file: str
    sha256: str
    bytes: int


class Checkpoint:
    """One complete checkpoint. All methods are *local*; what they read is checked against the digests of the manifest.

    Attributes:
        step: The optimizer step after which it was written.
        info: What was given to `Checkpoints.commit`.
    """

    def __init__(self, store: Store, step: int, info: dict[str, Any], files: Mapping[str, FileEntry]) -> None:
        self.step = step
        self.info = info
        self._store = store
        self._files = files

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors written as `name`, on the CPU; CheckpointError if there are none or their file is damaged."""
        return decode(self._read(name + _TENSORS))

    def part(self, name: str) -> Any:
        """The state written as part `name`, its tensors on the CPU; CheckpointError as for `tensors`."""
        return unpack(from_json(self._read(name + _JSON)), self.tensors(name))

    def part_names(self, prefix: str = "") -> list[str]:
        """Names of the parts that begin with `prefix`, sorted."""
        return sorted(file.removesuffix(_JSON) for file in self._files if file.startswith(prefix) and file.endswith(_JSON))

    def digests(self) -> dict[str, str]:
        """SHA-256 of each file, by its name in the checkpoint's folder."""
        return {entry["file"]: entry["sha256"] for entry in self._files.values()}

    def damage(self) -> list[str]:
        """Reads every file; a message for each that is not as it was written."""
        found = []
        for entry in self._files.values():
            try:
                self._load(entry)
            except CheckpointError as error:
                found.append(str(error))
        return found

    def _read(self, name: str) -> bytes:
        if name not in self._files:
            raise CheckpointError(
                f"the checkpoint of step {self.step} has no {name}; it has {', '.join(sorted(self._files))}.",
                file=self._store.where(f"{_folder(self.step)}/{name}"),
            )
        with _advising():
            return self._load(self._files[name])

    def _load(self, entry: FileEntry) -> bytes:
        path = f"{_folder(self.step)}/{entry['file']}"
        where = self._store.where(path)
        size = self._store.size(path)
        if size is None:
            raise CheckpointError(f"{where} is missing", file=where)
        if size != entry["bytes"]:
            raise CheckpointError(f"{where} has {size:,} bytes, but {entry['bytes']:,} were written", file=where)
        data = self._store.read(path)
        found = digest(data)
        if found != entry["sha256"]:
            raise CheckpointError(f"{where} has SHA-256 {found}, but {entry['sha256']} was written", file=where)
        return data


class Checkpoints:
    """The checkpoints in one run directory. All methods are *local*.

    For one checkpoint every worker calls `write_part` or `write_tensors` for its own names; when all have returned, one
    worker calls `commit` with the entries of all.

    Args:
        store: The run directory.
        keep: How many of the newest complete checkpoints to keep, at least 1.

    Attributes:
        damaged: One message for each damaged checkpoint that the last call of `newest` found, newest first.

    Raises:
        ConfigurationError: `keep` is below 1.
    """

    def __init__(self, store: Store, *, keep: int) -> None:
        if keep < 1:
            raise ConfigurationError(f"keep={keep}: at least one checkpoint must be kept. Choose 1 or more.")
        self.damaged: list[str] = []
        self._store = store
        self._keep = keep
        self._damaged_steps: set[int] = set()

    def write_part(self, step: int, name: str, state: object) -> dict[str, FileEntry]:
        """Writes `state` (anything that `format.pack` accepts) as part `name` of the checkpoint of `step`.

        Returns:
            The entries to hand to `commit`.

        Raises:
            CheckpointError: `state` holds something that cannot be saved, or the files cannot be written.
        """
        packed, tensors = pack(state)
        return self._write(step, name, _TENSORS, encode(tensors)) | self._write(step, name, _JSON, to_json(packed))

    def write_tensors(self, step: int, name: str, tensors: Mapping[str, Tensor]) -> dict[str, FileEntry]:
        """Writes `tensors` as a plain safetensors file of the checkpoint of `step`. Otherwise as `write_part`."""
        return self._write(step, name, _TENSORS, encode(tensors))

    def commit(self, step: int, files: Mapping[str, FileEntry], info: Mapping[str, Any]) -> None:
        """Makes the checkpoint of `step` complete, then removes the checkpoints and leftovers that are not kept.

        Kept are this checkpoint, the `keep` - 1 newest complete ones before it that the last call of `newest` did not find
        damaged, and those of later steps (left by a run that was resumed from an earlier one).

        Args:
            step: Optimizer steps done.
            files: The entries of all parts of all workers.
            info: Anything without tensors that `format.pack` accepts.

        Raises:
            CheckpointError: A part is not there, or the manifest cannot be written.
        """
        for name, entry in files.items():
            self._expect(step, name, entry)
        packed, tensors = pack(dict(info))
        if tensors:
            raise CheckpointError(f"info of a checkpoint has tensors ({', '.join(tensors)}). Write them as a part.")
        body: dict[str, Json] = {
            "format": FORMAT,
            "step": step,
            "info": packed,
            "files": {name: cast("Json", dict(files[name])) for name in sorted(files)},
        }
        self._store.write(f"{_folder(step)}/{_MANIFEST}", to_json({**body, "sha256": digest(to_json(body))}, indent=1))
        self._damaged_steps.discard(step)
        try:
            for stray in sorted({*self._store.list(_folder(step))} - {_MANIFEST, *(entry["file"] for entry in files.values())}):
                self._store.remove(f"{_folder(step)}/{stray}")
            self._remove_old(step)
        except CheckpointError as error:
            # The checkpoint is complete: training goes on.
            warnings.warn(f"old checkpoints could not be removed: {error}", stacklevel=2)

    def newest(self) -> Checkpoint | None:
        """The newest complete checkpoint without a damaged file; None if none is complete.

        Raises:
            CheckpointError: There are complete checkpoints, but all are damaged.
        """
        damage: dict[int, str] = {}
        whole: Checkpoint | None = None
        for step in self._complete():
            try:
                checkpoint = self._open(step)
                problems = checkpoint.damage()
            except CheckpointError as error:
                problems = [str(error)]
            if not problems:
                whole = checkpoint
                break
            damage[step] = "; ".join(problems)
        use = "no older one is whole" if whole is None else f"the checkpoint of step {whole.step} is used instead"
        self._damaged_steps = set(damage)
        self.damaged = [f"the checkpoint of step {step} is damaged, {use}: {what}" for step, what in damage.items()]
        if damage and whole is None:
            raise CheckpointError(
                f"every checkpoint in {self._store.where(_FOLDER)} is damaged: {'; '.join(damage.values())}. "
                "Put back a copy of these files, or remove the checkpoints folder to start from the beginning.",
                file=self._store.where(_FOLDER),
            )
        return whole

    def open(self, step: int) -> Checkpoint:
        """The complete checkpoint of `step`. Its files are checked as they are read.

        Raises:
            CheckpointError: There is none, or its manifest is damaged.
        """
        with _advising():
            return self._open(step)

    def _open(self, step: int) -> Checkpoint:
        path = f"{_folder(step)}/{_MANIFEST}"
        data = self._store.read(path)
        try:
            return _parse(self._store, step, from_json(data))
        except (KeyError, TypeError, ValueError, CheckpointError) as error:
            where = self._store.where(path)
            raise CheckpointError(f"{where} is not a complete manifest: {str(error).rstrip('.')}", file=where) from error

    def _write(self, step: int, name: str, suffix: str, data: bytes) -> dict[str, FileEntry]:
        logical = name + suffix
        if not re.fullmatch(r"\w[\w.-]*", name, re.ASCII) or logical == _MANIFEST or step < 0:
            raise ValueError(f"not a part of a checkpoint: step {step}, name {name!r}")
        sha256 = digest(data)
        file = logical
        if self._standing(step).get(logical, sha256) != sha256:
            file = f"{name}-{sha256[:16]}{suffix}"
        self._store.write(f"{_folder(step)}/{file}", data)
        return {logical: FileEntry(file=file, sha256=sha256, bytes=len(data))}

    def _standing(self, step: int) -> dict[str, str]:
        """Digests of the files of a complete checkpoint of `step`, if there is one already."""
        path = f"{_folder(step)}/{_MANIFEST}"
        if not self._store.exists(path):
            return {}
        # Outside the try: if the manifest cannot be read right now, its files must not be overwritten.
        data = self._store.read(path)
        try:
            return _parse(self._store, step, from_json(data)).digests()
        except (KeyError, TypeError, ValueError, CheckpointError):
            return {}  # damaged, so there is nothing to protect

    def _expect(self, step: int, name: str, entry: FileEntry) -> None:
        path = f"{_folder(step)}/{entry['file']}"
        size = self._store.size(path)
        if size != entry["bytes"]:
            where = self._store.where(path)
            state = "not there" if size is None else f"{size:,} bytes long"
            raise CheckpointError(
                f"{where} ({name}) was written with {entry['bytes']:,} bytes, but is {state} for the worker that "
                "completes the checkpoint. Every host must see the same run_dir: choose one on a shared file system.",
                file=where,
            )

    def _steps(self) -> list[int]:
        """Steps of all folders, complete or not, newest first."""
        found = [re.fullmatch(r"step-(0|[1-9]\d*)", name, re.ASCII) for name in self._store.list(_FOLDER)]
        return sorted((int(match[1]) for match in found if match), reverse=True)

    def _complete(self) -> list[int]:
        return [step for step in self._steps() if self._store.exists(f"{_folder(step)}/{_MANIFEST}")]

    def _remove_old(self, step: int) -> None:
        complete = [known for known in self._complete() if known <= step and known not in self._damaged_steps]
        for old in self._steps():
            if old < step and old not in complete[: self._keep]:
                # The manifest first: half a checkpoint must not look like a damaged one.
                self._store.remove(f"{_folder(old)}/{_MANIFEST}")
                self._store.remove(_folder(old))


def _folder(step: int) -> str:
    return f"{_FOLDER}/step-{step}"


@contextlib.contextmanager
def _advising() -> Iterator[None]:
    try:
        yield
    except CheckpointError as error:
        what = str(error).rstrip(".")
        raise CheckpointError(f"{what}. Start again: the newest undamaged checkpoint is used.", file=error.file) from error


def _parse(store: Store, step: int, manifest: Any) -> Checkpoint:
    """The checkpoint that a manifest describes; KeyError, TypeError, ValueError or CheckpointError if it is not one."""
    body = {key: value for key, value in manifest.items() if key != "sha256"} if isinstance(manifest, dict) else {}
    if not body or manifest.get("sha256") != digest(to_json(body)):
        raise ValueError("its content does not match the SHA-256 in it")
    if body["format"] != FORMAT:
        raise ValueError(f"it has format {body['format']!r}, and this version of unisono reads format {FORMAT}")
    if body["step"] != step:
        raise ValueError(f"it belongs to step {body['step']!r}")
    return Checkpoint(store, step, unpack(body["info"], {}), cast("dict[str, FileEntry]", body["files"]))
