"""What the demos share: metrics over steps, which leave the weights as they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import unisono
from tests.training.small_run import STEPS_PER_EPOCH, Augmented, loss, train
from unisono.demos._application import Evaluation

EPOCHS = 5


def evaluation(*, every: int) -> Evaluation:
    """Of a dataset that draws while it is read."""
    return Evaluation(Augmented(), {"held out": loss}, batch_size=10, every=every, epochs=EPOCHS)


def logged(run_dir: Path) -> dict[int, float]:
    """Steps done and what was measured then."""
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["metric/held out"] for line in lines if line.get("event") == "evaluation"}


@pytest.mark.parametrize("workers", [1, 3])
def test_metrics_every_few_epochs_change_no_weight_and_are_in_the_log(workers: int, tmp_path: Path) -> None:
    without = train(workers, tmp_path / "without", epochs=EPOCHS)
    shown = train(workers, tmp_path / "with", epochs=EPOCHS, callbacks=[lambda: evaluation(every=2)])
    assert shown.model_file == without.model_file
    assert (shown.tensors, shown.optimizer) == (without.tensors, without.optimizer)
    assert list(logged(tmp_path / "with")) == [2 * STEPS_PER_EPOCH, 4 * STEPS_PER_EPOCH]


def test_what_the_last_epoch_leads_to_is_measured_once_and_is_in_the_summary(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(5, 3)
    shown = evaluation(every=1)
    trainer = unisono.Trainer(
        model, torch.optim.SGD(model.parameters(), lr=0.1), loss, batch_size=12, callbacks=[shown], run_dir=tmp_path
    )
    trainer.fit(Augmented(), EPOCHS)
    steps = [epoch * STEPS_PER_EPOCH for epoch in range(1, EPOCHS + 1)]
    assert list(logged(tmp_path)) == steps[:-1]
    result = shown.measure(trainer)
    assert list(logged(tmp_path)) == steps
    assert json.loads((tmp_path / "summary.json").read_text())["metrics"] == result
    assert logged(tmp_path)[steps[-1]] == result["held out"]
