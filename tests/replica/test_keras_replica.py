"""Keras models on the TensorFlow and the JAX backend train with the same bits on any number of workers."""

from __future__ import annotations

import fcntl
import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

WORLDS = Path(__file__).parent / "keras_worlds.py"
ROOT = Path(__file__).parents[2]


def environment(backend: str, cache: Path) -> dict[str, str]:
    """One thread a worker, and a place where XLA's programs are kept, so that each is compiled once."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("UNISONO_", "SLURM_"))}
    threads = {"OMP_NUM_THREADS": "1", "TF_NUM_INTRAOP_THREADS": "1", "TF_NUM_INTEROP_THREADS": "1", "NPROC": "1"}
    programs = {"JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return {**kept, **threads, **programs, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module", params=["tensorflow", "jax"])
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def common(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the test processes of one session share."""
    mine = tmp_path_factory.getbasetemp()
    folder = (mine.parent if "PYTEST_XDIST_WORKER" in os.environ else mine) / "keras worlds"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def cache(common: Path) -> Path:
    return common / "programs"


@pytest.fixture(scope="module")
def found(backend: str, cache: Path, common: Path) -> Mapping[str, Any]:
    """What ``keras_worlds`` finds on this backend, computed once a session."""
    folder = common / backend
    with (common / f"{backend}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "found.json").exists():
            folder.mkdir(exist_ok=True)
            command = [sys.executable, str(WORLDS), "cases", str(folder / "found.json"), str(folder)]
            done = subprocess.run(command, env=environment(backend, cache), capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, done.stderr[-4000:]
    result: Mapping[str, Any] = json.loads((folder / "found.json").read_text())
    return result


def unmeasured(found: Mapping[str, Any]) -> dict[str, Any]:
    """What one worker finds, without evaluation and prediction."""
    return {name: value for name, value in found["alone"].items() if name not in ("evaluated", "predicted")}


pytestmark = pytest.mark.timeout(300)


def test_weights_optimizer_and_metrics_have_the_same_bits_on_every_number_of_workers(found: Mapping[str, Any]) -> None:
    assert found["3 workers"] == [found["alone"]] * 3
    assert found["5 workers"] == [unmeasured(found)] * 5


def test_training_moves_the_model_and_its_optimizer(found: Mapping[str, Any]) -> None:
    assert found["alone"]["steps"] == 6
    assert found["alone"]["weights"] != found["untrained"]
    assert 0 < found["alone"]["evaluated"]["accuracy"] < 1


def test_the_loss_as_a_metric_is_the_same_compiled_or_not(found: Mapping[str, Any]) -> None:
    evaluated = found["alone"]["evaluated"]

    assert evaluated["again"] == pytest.approx(evaluated["loss"], rel=1e-6)


def test_a_run_goes_on_from_its_checkpoint_on_another_number_of_workers(found: Mapping[str, Any]) -> None:
    assert found["resumed"] == [unmeasured(found)] * 2
    assert found["summary"]["workers"] == 2


def test_what_is_assigned_between_two_steps_counts_as_in_a_plain_loop(found: Mapping[str, Any]) -> None:
    _, rates, bias = found["edited alone"]

    assert found["edited by 2"] == [found["edited alone"]] * 2
    assert [rate for (rate,) in rates] == pytest.approx([0.01, 0.01, 0.003])
    assert bias == pytest.approx(1, abs=0.1)


def test_a_compiled_model_alone_trains_as_model_fit_does(found: Mapping[str, Any]) -> None:
    for mine, plain in zip(found["compiled"], found["model.fit"], strict=True):
        np.testing.assert_allclose(mine, plain, rtol=1e-4, atol=1e-6)


def test_the_file_of_weights_loads_into_a_model_whose_layers_have_other_numbers(found: Mapping[str, Any]) -> None:
    assert found["loaded"] == found["alone"]["weights"]


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("unbuilt", "the model has no variables yet: give it an Input"),
        ("frozen", "the model has no trainable variable"),
        ("no optimizer", "optimizer is None, and the model is not compiled"),
        ("torch optimizer", r"trained with a Keras optimizer, such as keras.optimizers.AdamW\(1e-3\), not with a SGD"),
        ("scaled", "LossScaleOptimizer is for float16"),
        ("averaged", "use_ema=True keeps other weights"),
        ("scheduler", "a Keras optimizer has its schedule in it"),
        ("precision", 'precision="bf16" is for PyTorch'),
        ("sharded", "the optimizer needs the state of all parameters on every worker"),
        ("vector", r"returned a tensor of shape \(3, 5\). Return the pair"),
        ("number", "returned a float. Return the pair"),
        ("unseeded", "which is not the model's|you should only use seeded random ops"),
    ],
)
def test_what_cannot_be_exact_is_refused(found: Mapping[str, Any], case: str, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(found["refused"][case])


def test_another_number_of_threads_is_told_and_in_the_fingerprint(found: Mapping[str, Any], backend: str) -> None:
    warnings, fingerprint = json.loads(found["threads"])
    variable = {"tensorflow": "TF_NUM_INTRAOP_THREADS", "jax": "NPROC"}[backend]

    assert warnings == [
        f"{backend} computes with 1 thread, while this worker has 2, and bits depend on it: use `unisono run`, or set "
        f"{variable}=2 before Python starts"
    ]
    assert fingerprint["keras_backend"] == backend
    assert fingerprint["keras"] == importlib.metadata.version("keras")
    assert fingerprint["mode"] == {"tensorflow": "graph", "jax": "jit"}[backend]
    assert fingerprint[variable] == 1


def test_a_run_whose_worker_is_killed_ends_with_the_same_weights(
    found: Mapping[str, Any], backend: str, cache: Path, tmp_path: Path
) -> None:
    command = [
        sys.executable,
        "-m",
        "unisono",
        "run",
        "--workers",
        "2",
        "--max-restarts",
        "0",
        str(WORLDS),
        "train",
        str(tmp_path),
    ]
    if backend == "tensorflow" and "UNISONO_THOROUGH" not in os.environ:
        pytest.skip("importing TensorFlow in several processes takes too long: UNISONO_THOROUGH=1 runs it")
    done = subprocess.run(command, env=environment(backend, cache), capture_output=True, text=True, timeout=280)

    assert done.returncode == 0, done.stderr[-4000:]
    assert (tmp_path / "killed").exists()
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["weights_sha256"] == found["summary"]["weights_sha256"]
    assert summary["steps"] == 6
