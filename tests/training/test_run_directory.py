"""The run directory holds what it should and nothing else, is written beside training, and survives a full disk."""

from __future__ import annotations

import errno
import hashlib
import json
import resource
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from safetensors.torch import load_file

import unisono
from tests.training.small_run import (
    BATCH_SIZE,
    EPOCHS,
    MICROBATCHES,
    SAMPLES,
    STEPS,
    Augmented,
    Dies,
    End,
    Killed,
    Net,
    make_trainer,
    memory_url,
    train,
    tree,
)
from unisono.checkpoint.checkpoints import Checkpoints
from unisono.checkpoint.store import Store
from unisono.collective import Collective, InProcess, LostWorker
from unisono.errors import CheckpointError, ConfigurationError, WorkerFailure
from unisono.testing import run_threads
from unisono.training.run_directory import RunDirectory


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    train(3, folder)
    return folder


def files(store: Store, folder: str = "") -> set[str]:
    found: set[str] = set()
    for name in store.list(folder):
        path = f"{folder}/{name}" if folder else name
        found |= {path} if store.exists(path) else files(store, path)
    return found


def checkpoint_files(step: int, workers: int) -> set[str]:
    parts = ["trainer", *(f"optimizer-{rank}" for rank in range(workers))]
    names = ["checkpoint.json", "model.safetensors", *(part + end for part in parts for end in (".json", ".safetensors"))]
    return {f"checkpoints/step-{step}/{name}" for name in names}


DOCUMENTED = {"model.safetensors", "metrics.jsonl", "manifest.json", "summary.json"}


# ---------------------------------------------------------------------- what is there


@pytest.mark.parametrize("remote", [False, True])
@pytest.mark.parametrize("workers", [1, 3])
def test_a_run_leaves_the_documented_files_and_no_others(tmp_path: Path, workers: int, remote: bool) -> None:
    url = memory_url() if remote else str(tmp_path)
    train(workers, url)
    checkpoints = set().union(*(checkpoint_files(step, workers) for step in (3, 6, 9)))
    assert files(Store(url)) == DOCUMENTED | checkpoints
    if not remote:
        assert set(tree(tmp_path)) == DOCUMENTED | checkpoints


def test_deaths_and_other_numbers_of_workers_leave_nothing_more(tmp_path: Path) -> None:
    for workers, step in ((4, 2), (2, 5), (3, 8)):
        with pytest.raises(Killed):
            train(workers, tmp_path, callbacks=[lambda step=step: Dies(step)], checkpoint_every=1, keep=1)  # type: ignore[misc]
    train(2, tmp_path, checkpoint_every=1, keep=1)
    assert set(tree(tmp_path)) == DOCUMENTED | checkpoint_files(STEPS, 2)


@pytest.mark.parametrize(("keep", "steps"), [(1, {9}), (2, {8, 9}), (9, {2, 4, 6, 8, 9})])
def test_only_the_newest_checkpoints_are_kept(tmp_path: Path, keep: int, steps: set[int]) -> None:
    train(2, tmp_path, checkpoint_every=2, keep=keep)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {f"step-{step}" for step in steps}


def test_the_weights_are_a_plain_state_dict_with_the_digest_of_the_summary(finished: Path) -> None:
    model = Net()
    model.load_state_dict(load_file(finished / "model.safetensors"))
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["weights_sha256"] == hashlib.sha256((finished / "model.safetensors").read_bytes()).hexdigest()
    # The last checkpoint is of the same step, so it holds the same file.
    last = finished / "checkpoints" / f"step-{STEPS}" / "model.safetensors"
    assert last.read_bytes() == (finished / "model.safetensors").read_bytes()


def test_the_summary_tells_the_end_in_numbers(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    exact = {
        "steps": STEPS,
        "epochs": EPOCHS,
        "samples": EPOCHS * SAMPLES,
        "workers": 3,
        "loss": lines[-1]["loss"],
        "metrics": {},
        "finished": True,
        "run_dir": str(finished),
        "parameters": sum(p.numel() for p in Net().parameters() if p.requires_grad),
    }
    assert {key: summary[key] for key in exact} == exact
    assert summary["seconds"] > 0
    assert summary["samples_per_second"] == pytest.approx(EPOCHS * SAMPLES / summary["seconds"])
    assert 0 <= summary["waiting_share"] <= 1
    assert summary["bytes_sent_per_step"] > 0
    rates = {"seconds", "samples_per_second", "waiting_share", "bytes_sent_per_step"}
    per_worker = {"data_s", "compute_s", "communication_s", "waiting_s", "microbatches", "peak_memory_bytes", "bytes_sent"}
    assert set(summary) == {*exact, "weights_sha256", *rates, *per_worker}
    assert [len(summary[name]) for name in per_worker] == [3] * len(per_worker)
    assert min(summary["peak_memory_bytes"]) > 10**7  # no Python with torch has less
    assert summary["bytes_sent"][0] == summary["bytes_sent_per_step"]


def test_fit_returns_the_summary_that_it_wrote(tmp_path: Path) -> None:
    def work(collective: Collective) -> str:
        return make_trainer(collective, run_dir=tmp_path).fit(Augmented(), EPOCHS).to_json()

    assert run_threads(2, work)[0] == (tmp_path / "summary.json").read_text()


def test_the_manifest_holds_settings_and_fingerprint(finished: Path) -> None:
    manifest = json.loads((finished / "manifest.json").read_text())
    settings = manifest["settings"]
    assert (settings["batch_size"], settings["microbatches"], settings["seed"]) == (BATCH_SIZE, MICROBATCHES, 0)
    assert (settings["optimizer"], settings["scheduler"], settings["sync"]) == ("AdamW", "CosineAnnealingLR", "Exact")
    assert settings["max_grad_norm"] == 1.0
    assert [group["lr"] for group in settings["parameter_groups"]] == [0.02, 0.01, 0.02]
    assert settings["parameters"]["last.weight"] == "float32[3, 7]"
    assert "frozen.weight" not in settings["parameters"]
    assert manifest["fingerprint"]["torch"] == torch.__version__
    assert manifest["fingerprint"]["threads"] == 1
    assert manifest["unisono"] == unisono.__version__
    assert manifest["workers"] == 3
    assert manifest["resumed_from_step"] is None
    assert manifest["planned"] == {"epochs": EPOCHS, "steps": STEPS}


def test_the_manifest_of_a_resumed_run_says_where_it_resumed(tmp_path: Path) -> None:
    train(1, tmp_path, epochs=1)
    train(2, tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert (manifest["resumed_from_step"], manifest["workers"]) == (3, 2)


def test_the_log_has_a_line_of_strict_json_for_every_step(finished: Path) -> None:
    lines = [json.loads(line, parse_constant=pytest.fail) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line["epoch"] for line in lines] == [1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert [line["samples"] for line in lines] == [12, 24, 32, 44, 56, 64, 76, 88, 96]
    for line in lines:
        assert line["loss"] > 0
        assert line["gradient_norm"] > 0
        assert line["step_s"] > 0
        assert {"lr", "lr_1", "lr_2", "samples_per_second", "waiting_s", "data_s"} <= set(line)


def test_nothing_is_pickled(finished: Path) -> None:
    for path, (data, _) in tree(finished).items():
        if path.endswith(".safetensors"):
            header = int.from_bytes(data[:8], "little")
            json.loads(data[8 : 8 + header])
        else:
            for line in data.splitlines() if path.endswith(".jsonl") else [data]:
                json.loads(line, parse_constant=pytest.fail)


# ---------------------------------------------------------------------- a file system that obeys the test


class Obedient(MemoryFileSystem):
    """Memory, with a say for the test before each write."""

    protocol = "obedient"
    before_write: Callable[[str], None] = staticmethod(lambda path: None)
    cachable = False

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(MemoryFileSystem._strip_protocol(path.replace("obedient://", "memory://")))

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        type(self).before_write(path)
        super().pipe_file(path, value, mode=mode, **kwargs)


@pytest.fixture
def obedient_url(monkeypatch: pytest.MonkeyPatch) -> str:
    fsspec.register_implementation("obedient", Obedient, clobber=True)
    monkeypatch.setattr(Obedient, "before_write", Obedient.before_write)  # put back afterwards
    return memory_url().replace("memory://", "obedient://")


def test_training_goes_on_while_a_checkpoint_is_written(obedient_url: str) -> None:
    reached, let_go = threading.Event(), threading.Event()

    def block(path: str) -> None:
        # The main worker's first file: its copy of the weights is not even encoded yet.
        if "step-6/optimizer-0." in path:
            reached.set()
            assert let_go.wait(20), "training waited for the checkpoint"

    Obedient.before_write = staticmethod(block)
    store = Store(obedient_url)
    weights: dict[int, torch.Tensor] = {}
    complete: dict[int, bool] = {}

    class Watches(unisono.Callback):
        def on_step(self, trainer: unisono.Trainer, result: unisono.StepResult) -> None:
            weights[result.step] = trainer.model.get_parameter("last.weight").detach().clone()
            complete[result.step] = store.exists("checkpoints/step-6/checkpoint.json")
            if result.step == 8 and trainer.collective.rank == 0:
                assert reached.wait(20)
                let_go.set()

    train(3, obedient_url, callbacks=[Watches], checkpoint_every=6)
    assert complete[7] is False
    assert complete[8] is False
    assert not weights[8].equal(weights[6])
    # What was written late is the state of its step all the same.
    checkpoint = Checkpoints(store, keep=3).open(6)
    assert checkpoint.damage() == []
    assert checkpoint.tensors("model")["last.weight"].equal(weights[6])


def test_a_checkpoint_that_was_given_up_is_not_taken_for_the_next_one(obedient_url: str) -> None:
    let_go = threading.Event()

    def block(path: str) -> None:
        if "step-2/" in path:
            assert let_go.wait(20)

    Obedient.before_write = staticmethod(block)
    directory = RunDirectory(obedient_url, InProcess(), settings={}, fingerprint={}, keep=1, strict=False)
    directory.save(1, part={}, model={}, trainer={}, info={})
    directory.rebuild(InProcess())
    directory.save(2, part={}, model={}, trainer={}, info={})
    written = directory.signals(0).written
    let_go.set()
    assert written == -1
    directory.finish()
    assert files(Store(obedient_url), "checkpoints/step-2") == checkpoint_files(2, 1)


def test_one_that_the_others_have_left_behind_writes_nothing_when_it_wakes_up() -> None:
    url, paused = memory_url(), [False]
    directory = RunDirectory(url, InProcess(), settings={}, fingerprint={}, keep=1, strict=False, is_over=lambda: paused[0])
    directory.begin(0, epochs=1, steps=1)
    directory.note({"step": 1})
    directory.save(1, part={}, model={}, trainer={}, info={})
    directory.log.flush()
    paused[0] = True
    directory.note({"step": 2})
    directory.log.flush()
    for late in (directory.finish, lambda: directory.publish({})):
        with pytest.raises(LostWorker, match="have gone on"):
            late()
    assert Store(url).read("metrics.jsonl") == b'{"step": 1}\n'
    assert not {"checkpoints/step-1/checkpoint.json", "model.safetensors"} & files(Store(url))


def save_once(collective: Collective, url: str) -> list[int]:
    """Saves after step 1 and trains on without another checkpoint; the steps at which step 1's was complete."""
    trainer = make_trainer(collective, run_dir=url, checkpoint_every=10**6)
    store = Store(url)
    complete: list[int] = []
    for batch in trainer.batches(Augmented(), 20):
        step = trainer.step(batch).step
        if store.exists("checkpoints/step-1/checkpoint.json"):
            complete.append(step)
        if step == 1:
            trainer.save()
    return complete


def test_a_checkpoint_is_complete_a_few_steps_later_without_another_one_to_push_it() -> None:
    url = memory_url()
    complete = run_threads(3, lambda c: save_once(c, url))
    assert all(steps and steps[0] < 60 for steps in complete)


def test_a_failed_write_stops_training_long_before_the_next_checkpoint(obedient_url: str) -> None:
    refused = threading.Event()
    refuse = full("step-1/optimizer-1.safetensors")

    def tell_and_refuse(path: str) -> None:
        if "step-1/optimizer-1.safetensors" in path:
            refused.set()
        refuse(path)

    Obedient.before_write = staticmethod(tell_and_refuse)
    last: list[int] = []

    class Counts(unisono.Callback):
        def on_step(self, trainer: unisono.Trainer, result: unisono.StepResult) -> None:
            last.append(result.step)
            if result.step == 2:
                assert refused.wait(20)

    def work(collective: Collective) -> None:
        trainer = make_trainer(collective, run_dir=obedient_url, checkpoint_every=10**6, callbacks=[Counts()])
        for batch in trainer.batches(Augmented(), 20):
            if trainer.step(batch).step == 1:
                trainer.save()

    with pytest.raises(CheckpointError, match="disk is full"):
        run_threads(3, work)
    assert max(last) < 60


def full(where: str) -> Callable[[str], None]:
    def refuse(path: str) -> None:
        if where in path:
            raise OSError(errno.ENOSPC, "No space left on device")

    return refuse


def everybodys_errors(workers: int, url: str, **settings: Any) -> list[Exception]:
    errors: dict[int, Exception] = {}

    def work(collective: Collective) -> None:
        try:
            make_trainer(collective, run_dir=url, **settings).fit(Augmented(), EPOCHS)
        except Exception as error:
            errors[collective.rank] = error
            raise

    with pytest.raises(CheckpointError):
        run_threads(workers, work)
    return [errors[rank] for rank in range(workers)]


def test_a_full_disk_under_one_worker_stops_all_with_the_cause(obedient_url: str) -> None:
    undisturbed = train(1, memory_url())
    Obedient.before_write = staticmethod(full("step-6/optimizer-1.safetensors"))
    errors = everybodys_errors(3, obedient_url, checkpoint_every=3)
    for rank, error in enumerate(errors):
        assert isinstance(error, CheckpointError)
        assert "step-6/optimizer-1.safetensors: the disk is full (No space left on device)" in str(error)
        assert "Free space or choose another run_dir; what was saved before is whole" in str(error)
        assert ("worker 1: " in str(error)) == (rank != 1)
    newest = Checkpoints(Store(obedient_url), keep=3).newest()
    assert newest is not None
    assert newest.step == 3
    Obedient.before_write = staticmethod(lambda path: None)
    assert train(2, obedient_url, checkpoint_every=3) == undisturbed


@pytest.mark.parametrize("where", ["step-6/checkpoint.json", "step-6/model.safetensors", "x/model.safetensors"])
def test_a_full_disk_under_the_main_worker_stops_all_with_the_cause(obedient_url: str, where: str) -> None:
    undisturbed = train(1, memory_url())
    Obedient.before_write = staticmethod(full(where))
    for error in everybodys_errors(3, obedient_url, checkpoint_every=3):
        assert isinstance(error, CheckpointError)
        assert f"{where.removeprefix('x/')}: the disk is full" in str(error)
    Obedient.before_write = staticmethod(lambda path: None)
    assert train(2, obedient_url, checkpoint_every=3) == undisturbed


@pytest.mark.parametrize("where", ["manifest.json", "metrics.jsonl", "summary.json"])
def test_a_full_disk_under_a_file_of_the_main_worker_alone_lets_nobody_hang(obedient_url: str, where: str) -> None:
    undisturbed = train(1, memory_url())
    Obedient.before_write = staticmethod(full(where))
    first, *others = everybodys_errors(3, obedient_url, checkpoint_every=3)
    assert isinstance(first, CheckpointError)
    assert f"{where}: the disk is full" in str(first)
    assert all(isinstance(error, CheckpointError | WorkerFailure) for error in others)
    Obedient.before_write = staticmethod(lambda path: None)
    assert train(2, obedient_url, checkpoint_every=3) == undisturbed


@pytest.mark.parametrize("workers", [1, 3])
def test_a_real_limit_on_file_sizes_stops_training_and_the_previous_checkpoint_is_resumed(tmp_path: Path, workers: int) -> None:
    width = 200  # weights of 320 kB: what others write while the limit holds stays below it
    undisturbed = train(1, memory_url(), width=width)
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    train(workers, tmp_path, epochs=1, width=width)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, unlimited[1]))
    try:
        with pytest.raises(CheckpointError, match=r"step-6/.*the disk is full \(File too large\).*saved before is whole"):
            train(workers, tmp_path, width=width)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    newest = Checkpoints(Store(tmp_path), keep=3).newest()
    assert newest is not None
    assert newest.step == 3
    assert train(2, tmp_path, width=width) == undisturbed


# ---------------------------------------------------------------------- what cannot be a run directory


def test_a_run_directory_of_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"cannot open run_dir 'nosuch://x'.*choose a local folder"):
        make_trainer(run_dir="nosuch://x")


@pytest.mark.parametrize("workers", [1, 2])
def test_a_file_in_place_of_the_run_directory_is_refused(tmp_path: Path, workers: int) -> None:
    (tmp_path / "file").write_text("mine")

    def work(collective: Collective) -> None:
        with pytest.raises(CheckpointError, match=r"file.*Not a directory"):
            make_trainer(collective, run_dir=tmp_path / "file")

    run_threads(workers, work)
    assert (tmp_path / "file").read_text() == "mine"


def test_saving_without_a_run_directory_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="pass run_dir="):
        make_trainer().save()


@pytest.mark.parametrize("keep", [0, -1])
def test_at_least_one_checkpoint_is_kept(tmp_path: Path, keep: int) -> None:
    with pytest.raises(ConfigurationError, match=f"keep={keep}.*1 or more"):
        make_trainer(run_dir=tmp_path, keep=keep)


def test_an_optimizer_state_that_cannot_be_saved_stops_training_with_its_place(tmp_path: Path) -> None:
    class Odd(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            super().step()
            for group in self.param_groups:
                for parameter in group["params"]:
                    self.state[parameter]["note"] = object()

    def work(collective: Collective) -> None:
        torch.manual_seed(0)
        model = torch.nn.Linear(5, 3)
        trainer = unisono.Trainer(
            model, Odd(model.parameters(), 0.1), _loss, batch_size=4, microbatches=2, run_dir=tmp_path, collective=collective
        )
        trainer.fit(Augmented(), 1)

    with pytest.raises(CheckpointError, match=r"note.*builtins\.object"):
        run_threads(2, work)


def _loss(model: Any, batch: Any) -> Any:
    inputs, targets = batch
    return torch.nn.functional.cross_entropy(model(inputs), targets)


def test_the_same_folder_by_another_name_is_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    end: End = train(1, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    assert train(2, "run") == end
    assert train(2, (tmp_path / "run").as_uri()) == end
