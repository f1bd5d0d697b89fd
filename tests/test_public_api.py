"""What ``import unisono`` gives, and what it costs."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

import unisono

PUBLIC = [
    "Batch",
    "Callback",
    "CheckpointError",
    "ConfigurationError",
    "DataError",
    "Desync",
    "Exact",
    "FingerprintMismatch",
    "Loader",
    "Prometheus",
    "StepResult",
    "Streams",
    "Summary",
    "TensorBoard",
    "Trainer",
    "UnisonoError",
    "WholeBatchLoss",
    "WorkerFailure",
    "World",
    "__version__",
]
EVERYTHING = """
import time, torch
begin = time.perf_counter()
import unisono
for name in unisono.__all__:
    getattr(unisono, name)
print(time.perf_counter() - begin)
"""


def in_a_new_process(code: str) -> str:
    # With bytecode kept from one process to the next, as users have it: some build machines switch that off.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=60).stdout.strip()


def test_the_public_names_are_these() -> None:
    assert unisono.__all__ == PUBLIC
    assert len(PUBLIC) <= 20


def test_every_public_name_leads_somewhere() -> None:
    for name in PUBLIC:
        value = getattr(unisono, name)
        assert name == "__version__" or value.__name__ == name


def test_a_name_that_does_not_exist_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'unisono' has no attribute 'Trainr'"):
        _ = unisono.Trainr


def test_importing_unisono_alone_does_not_import_torch() -> None:
    assert in_a_new_process("import sys, unisono; print('torch' in sys.modules)") == "False"


@pytest.mark.alone
def test_importing_everything_adds_less_than_a_fifth_of_a_second_to_torch() -> None:
    # The best of three: a machine that is busy for a moment says nothing about the imports.
    assert min(float(in_a_new_process(EVERYTHING)) for _ in range(3)) < 0.2
