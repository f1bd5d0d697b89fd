from __future__ import annotations

import math

import pytest
import torch

from unisono.verify.compare import Distance, distance_of, settings_difference


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_neighbouring_floats_are_one_ulp_apart_also_across_zero(dtype: torch.dtype) -> None:
    one = torch.tensor([1.0, -1.0, 0.0], dtype=dtype)
    up = torch.nextafter(one, torch.tensor(math.inf, dtype=dtype))
    assert distance_of(one, up)[0] == 1
    down = torch.nextafter(torch.zeros(1, dtype=dtype), torch.tensor(-math.inf, dtype=dtype))
    assert distance_of(down, up[2:])[0] == 2


def test_integers_differ_by_their_value() -> None:
    assert distance_of(torch.tensor([1, 5]), torch.tensor([1, 2])) == (3, 3.0)


def steps(**values: tuple[float, ...]) -> Distance:
    return Distance({name.replace("_", " "): each for name, each in values.items()})


def test_what_rounding_explains_is_not_beyond() -> None:
    explained = steps(loss=(1e-7, 2e-7, 1e-7, 1e-7), update=(1e-6, 1e-6, 1e-6, 1e-6))
    assert steps(loss=(3e-7, 1e-7, 1e-7, 1e-7), update=(9e-6, 1e-6, 1e-6, 1e-6)).beyond(explained) == []


def test_another_computation_is_beyond() -> None:
    explained = steps(loss=(1e-7, 1e-7, 1e-7, 1e-7))
    assert steps(loss=(1e-3, 1e-3, 1e-3, 1e-3)).beyond(explained) == ["loss"]
    assert steps(loss=(math.inf, 0.0, 0.0, 0.0)).beyond(explained) == ["loss"]


def test_one_step_on_the_other_side_of_a_kink_may_turn_the_gradient_but_not_the_loss() -> None:
    explained = steps(loss=(1e-7,) * 8, gradient_norm=(1e-7,) * 8)
    assert steps(gradient_norm=(2e-3, *(1e-7,) * 7)).beyond(explained) == []
    assert steps(gradient_norm=(2e-3, 2e-3, 2e-3, *(1e-7,) * 5)).beyond(explained) == ["gradient norm"]
    assert steps(loss=(2e-3, *(1e-7,) * 7)).beyond(explained) == ["loss"]


def test_a_learning_rate_is_never_rounding() -> None:
    assert steps(learning_rate=(0.0, 1e-9)).beyond(steps(learning_rate=(0.0, 0.0))) == ["learning rate"]


def test_settings_that_differ_are_named() -> None:
    one, other = [{"lr": 0.1, "betas": [0.9, 0.99]}], [{"lr": 0.2, "betas": [0.9, 0.99]}]
    assert settings_difference(one, other) == "lr 0.1 and 0.2"
    assert settings_difference(one, one * 2) == "1 and 2 parameter groups"
