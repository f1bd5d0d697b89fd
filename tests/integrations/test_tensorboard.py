from __future__ import annotations

import sys
from pathlib import Path

import pytest

import unisono
from tests.training.small_run import STEPS, STEPS_PER_EPOCH, make_trainer, train
from unisono.errors import ConfigurationError


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


def test_points_may_be_fewer_and_go_elsewhere(tmp_path: Path) -> None:
    train(1, None or tmp_path / "run", epochs=1, callbacks=[lambda: unisono.TensorBoard(tmp_path / "events", every=2)])
    assert list(scalars(tmp_path / "events")["loss"]) == [2]
    assert STEPS_PER_EPOCH == 3
    assert not (tmp_path / "run/tensorboard").exists()


def test_without_a_folder_the_error_says_what_to_pass() -> None:
    with pytest.raises(ConfigurationError, match=r"no run_dir. Pass TensorBoard\(log_dir=...\)"):
        from tests.training.small_run import Augmented

        make_trainer(callbacks=[unisono.TensorBoard()]).fit(Augmented(), 1)


def test_a_missing_package_or_a_wrong_number_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigurationError, match="every=0"):
        unisono.TensorBoard(every=0)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'unisono\[tensorboard\]'"):
        unisono.TensorBoard()
