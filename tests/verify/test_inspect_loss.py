"""What a loss makes of single samples is told from a few computations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from unisono.verify.inspect_loss import Inspection

Loss = Callable[[Any, Any], Any]
LENGTHS = [3, 7, 2, 5, 4, 6]


def findings(loss: Loss) -> dict[str, Any]:
    torch.manual_seed(0)
    samples = [(torch.randn(length, 4), torch.randn(length)) for length in LENGTHS]
    model = nn.Linear(4, 1)

    def collate(part: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
        inputs, targets = (pad_sequence([sample[number] for sample in part], batch_first=True) for number in (0, 1))
        mask = pad_sequence([torch.ones(len(targets)) for _, targets in part], batch_first=True)
        return inputs, targets, mask

    inspection = Inspection(model, loss, samples=samples, indices=list(range(10, 16)), collate=collate, parts=4)
    found = inspection.findings()
    assert model.training
    return found


def errors(model: Any, batch: Any) -> Tensor:
    inputs, targets, mask = batch
    return F.mse_loss(model(inputs).squeeze(-1), targets, reduction="none") * mask


def coupled(model: Any, batch: Any) -> tuple[Tensor, int]:
    sums = errors(model, batch).sum(1)
    return sums.sum() + 100 * sums.var(unbiased=False) * len(sums), len(sums)


def undivided(model: Any, batch: Any) -> tuple[Tensor, Tensor]:
    microbatches = 4
    return errors(model, batch).sum() / microbatches, batch[2].sum()


LOSSES: dict[str, tuple[Loss, str]] = {
    "a sum over tokens and their number": (lambda model, batch: (errors(model, batch).sum(), batch[2].sum()), ""),
    "a mean over tokens": (lambda model, batch: errors(model, batch).sum() / batch[2].sum(), "weights"),
    "a mean with its count": (
        lambda model, batch: (errors(model, batch).sum() / batch[2].sum(), batch[2].sum()),
        "mean",
    ),
    "a count that is one whatever comes": (lambda model, batch: (errors(model, batch).sum(), 1), "count"),
    "padding that is not masked": (
        lambda model, batch: (F.mse_loss(model(batch[0]).squeeze(-1), batch[1] + 1, reduction="none").sum(), len(batch[0])),
        "padded",
    ),
    "divided by the number of microbatches": (undivided, "divided"),
}


@pytest.mark.parametrize("name", LOSSES)
def test_what_is_remarkable_about_a_loss_is_found(name: str) -> None:
    loss, kind = LOSSES[name]
    assert next(iter(findings(loss)), "") == kind


def test_samples_of_one_length_that_influence_each_other_are_coupled_and_not_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "LENGTHS", [4] * 6)
    assert list(findings(coupled)) == ["coupled"]


def test_the_divisor_is_named_with_its_line() -> None:
    divided = findings(undivided)["divided"]
    assert (divided["by"], divided["divisor"]) == (4, "microbatches")
    assert divided["where"].code == "return errors(model, batch).sum() / microbatches, batch[2].sum()"
