"""What bits depend on is recorded, compared and named."""

from __future__ import annotations

import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

from unisono.checkpoint.fingerprint import ALGORITHM, check, compare, fingerprint
from unisono.errors import FingerprintMismatch

CPU = torch.device("cpu")


def test_it_holds_builds_threads_and_device() -> None:
    found = fingerprint(threads=3, device=CPU)
    assert found["torch"] == torch.__version__
    assert found["threads"] == 3
    assert found["device"] == "cpu"
    assert found["algorithm"] == ALGORITHM
    assert found["cpu_capability"] == torch.backends.cpu.get_cpu_capability()
    assert set(found) >= {"torch_git", "python", "numpy", "machine"}
    if torch.backends.mkl.is_available():
        assert str(found["mkl"])[:2] == "20"
    assert all(type(value) in (str, int) for value in found.values())


@pytest.mark.alone
def test_it_does_not_change_by_itself_and_is_cheap() -> None:
    first = fingerprint(threads=1, device=CPU)
    best = 1.0
    for _ in range(3):
        start = time.perf_counter()
        assert fingerprint(threads=1, device=CPU) == first
        best = min(best, time.perf_counter() - start)
    assert best < 0.05


def test_variables_that_choose_kernels_count_when_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MKL_CBWR", raising=False)
    plain = fingerprint(threads=1, device=CPU)
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")
    assert compare(plain, fingerprint(threads=1, device=CPU)) == ["MKL_CBWR: not set at the checkpoint, COMPATIBLE now"]


def test_another_script_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "train.py"
    monkeypatch.setattr(sys, "argv", [str(script), "--epochs", "3"])
    assert fingerprint(threads=1, device=CPU)["script"] == ""  # as in a notebook
    script.write_text("rate = 1\n")
    before = fingerprint(threads=1, device=CPU)
    assert fingerprint(threads=1, device=CPU) == before
    script.write_text("rate = 2\n")
    (difference,) = compare(before, fingerprint(threads=1, device=CPU))
    assert difference.startswith("script: ")


def test_differences_read_as_sentences() -> None:
    old, new = fingerprint(threads=2, device=CPU), fingerprint(threads=1, device=CPU)
    assert compare(old, new) == ["threads: 2 at the checkpoint, 1 now"]
    assert compare(old, old) == []
    assert compare({"a": 1, "gone": "x"}, {"a": 1}) == ["gone: x at the checkpoint, not set now"]


def test_a_difference_warns_once_and_names_the_fields() -> None:
    with pytest.warns(UserWarning, match=r"threads: 2 .* 1 now; torch: a .* b now.*bits may differ") as caught:
        check({"threads": 2, "torch": "a"}, {"threads": 1, "torch": "b"}, strict=False)
    assert len(caught) == 1


def test_a_difference_is_an_error_when_strict() -> None:
    with pytest.raises(FingerprintMismatch, match="threads: 2 at the checkpoint, 1 now") as caught:
        check({"threads": 2}, {"threads": 1}, strict=True)
    assert caught.value.fields == ("threads",)


def test_equal_fingerprints_say_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check({"threads": 1}, {"threads": 1}, strict=True)
        check({"threads": 1}, {"threads": 1}, strict=False)
