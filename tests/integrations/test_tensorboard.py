from __future__ import annotations

import sys
from pathlib import Path

import pytest

import unisono
from tests.training.small_run import STEPS, STEPS_PER_EPOCH, Augmented, EachEpoch, loss, make_trainer, train
from unisono.collective import Collective
from unisono.errors import ConfigurationError
from unisono.testing import run_threads


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """By name, then by step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {name: {event.step: event.value for event in events.Scalars(name)} for name in events.Tags()["scalars"]}


def test_a_run_leaves_events_that_tensorboard_reads(tmp_path: Path) -> None:
    end = train(2, tmp_path / "run", callbacks=[unisono.TensorBoard])
    found = scalars(tmp_path / "run/tensorboard")
    assert {"loss", "gradient_norm", "samples_per_second", "learning_rate/0", "learning_rate/2", "epoch"} <= set(found)
    assert {"seconds_a_step/compute", "seconds_a_step/waiting", "seconds_a_step/step"} <= set(found)
    logged = {line["step"]: line["loss"] for line in end.metrics}
    assert found["loss"] == pytest.approx(logged, rel=1e-6)
    assert found["epoch"] == {3: 1.0, 6: 2.0, 9: 3.0}


def test_a_run_that_goes_on_has_each_step_once(tmp_path: Path) -> None:
    train(1, tmp_path / "run", epochs=1, callbacks=[unisono.TensorBoard])
    train(2, tmp_path / "run", callbacks=[unisono.TensorBoard])
    assert list(scalars(tmp_path / "run/tensorboard")["loss"]) == list(range(1, STEPS + 1))


def test_evaluations_are_written_at_their_steps_and_outlive_a_new_start(tmp_path: Path) -> None:
    def work(collective: Collective, epochs: int) -> None:
        callbacks = [EachEpoch(), unisono.TensorBoard(every=2)]
        trainer = make_trainer(collective, run_dir=tmp_path / "run", callbacks=callbacks)
        trainer.fit(Augmented(), epochs)
        trainer.evaluate(Augmented(), {"final/loss": loss})

    for workers, epochs in ((2, 1), (1, 2), (3, 2)):
        run_threads(workers, lambda collective, epochs=epochs: work(collective, epochs))  # type: ignore[misc]
    found = scalars(tmp_path / "run/tensorboard")
    assert list(found["evaluation/loss"]) == [3, 6]
    assert list(found["evaluation/final/loss"]) == [3, 6]
    assert found["evaluation/loss"] == found["evaluation/final/loss"]
    assert list(found["loss"]) == [2, 4, 6]


def test_points_may_be_fewer_and_go_elsewhere(tmp_path: Path) -> None:
    train(1, None or tmp_path / "run", epochs=1, callbacks=[lambda: unisono.TensorBoard(tmp_path / "events", every=2)])
    assert list(scalars(tmp_path / "events")["loss"]) == [2]
    assert STEPS_PER_EPOCH == 3
    assert not (tmp_path / "run/tensorboard").exists()


def test_without_a_folder_the_error_says_what_to_pass() -> None:
    with pytest.raises(ConfigurationError, match=r"no run_dir. Pass TensorBoard\(log_dir=...\)"):
        make_trainer(callbacks=[unisono.TensorBoard()]).fit(Augmented(), 1)


def test_a_missing_package_or_a_wrong_number_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigurationError, match="every=0"):
        unisono.TensorBoard(every=0)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'unisono\[tensorboard\]'"):
        unisono.TensorBoard()
