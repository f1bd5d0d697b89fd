"""`torch.compile(model)`: the same weights under the same names, wherever they are kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import unisono
from tests.catalogue import trained
from tests.catalogue.unbroken import Found, check_numbers_of_workers, weights
from tests.training.small_run import Dies, Killed
from unisono.replica import model_guard, model_modes, parameters, torch_buffers, torch_replica

# PyTorch hides it, but not where warnings are errors.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")


def plain() -> nn.Module:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 8), nn.Sequential(nn.BatchNorm1d(8), nn.Tanh()), nn.Linear(8, 3))
    model.register_buffer("hidden", torch.ones(1), persistent=False)
    return model


def whole() -> Any:
    return torch.compile(plain(), backend="eager")


def parts() -> nn.Module:
    model: Any = plain()
    model[1] = torch.compile(model[1], backend="eager")
    return model  # type: ignore[no-any-return]


def trainer_of(
    net: Callable[[], Any], workers: Any = None, run_dir: Any = None, callbacks: Sequence[unisono.Callback] = ()
) -> unisono.Trainer:
    model = net()
    return unisono.Trainer(
        model,
        torch.optim.AdamW(model.parameters(), lr=0.05),
        trained.loss,
        batch_size=12,
        microbatches=4,
        run_dir=run_dir,
        checkpoint_every=2,
        callbacks=callbacks,
        collective=workers,
        sync=unisono.Exact(replicate_kib=0),
    )


@pytest.mark.parametrize("net", [whole, parts])
def test_a_compiled_model_is_the_same_on_any_number_of_workers(net: Callable[[], Any]) -> None:
    def train(workers: Any, run_dir: str | None, callbacks: Sequence[Any]) -> Found:
        trainer = trainer_of(net, workers, run_dir, callbacks)
        trainer.fit(trained.drawn(), 4)
        return weights(trainer)

    expected = check_numbers_of_workers(train)
    bare = trainer_of(plain)
    bare.fit(trained.drawn(), 4)
    assert list(expected.values()) == list(weights(bare).values())


@pytest.mark.parametrize("net", [whole, parts])
def test_its_files_have_the_names_of_the_bare_model(net: Callable[[], Any], tmp_path: Path) -> None:
    trainer_of(net, None, tmp_path / "run").fit(trained.drawn(), 2)
    assert set(load_file(tmp_path / "run" / "model.safetensors")) == set(plain().state_dict())
    plain().load_state_dict(load_file(tmp_path / "run" / "model.safetensors"))


@pytest.mark.parametrize("first", [plain, whole, parts])
@pytest.mark.parametrize("second", [plain, whole, parts])
def test_a_run_goes_on_compiled_or_not(first: Any, second: Any, tmp_path: Path) -> None:
    _check_goes_on(first, second, tmp_path, lambda: None)


@pytest.mark.parametrize(("first", "second"), [(whole, whole), (whole, plain), (parts, parts)])
def test_a_checkpoint_of_a_version_that_kept_the_names_of_the_wrapper_is_taken(
    first: Any, second: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (model_guard, model_modes, parameters, torch_buffers, torch_replica):
        monkeypatch.setattr(module, "plain_name", lambda name: name)
    _check_goes_on(first, second, tmp_path, monkeypatch.undo)


def _check_goes_on(first: Any, second: Any, run_dir: Path, between: Callable[[], None]) -> None:
    with pytest.raises(Killed):
        trainer_of(first, None, run_dir, [Dies(5)]).fit(trained.drawn(), 3)
    between()
    trainer = trainer_of(second, None, run_dir)
    assert trainer.position.step == 4
    trainer.fit(trained.drawn(), 3)
    unbroken = trainer_of(plain)
    unbroken.fit(trained.drawn(), 3)
    assert list(weights(trainer).values()) == list(weights(unbroken).values())
