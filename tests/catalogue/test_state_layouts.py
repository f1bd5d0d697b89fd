"""State is more than values: strides, dtypes, tensors of no dimensions and tensors that occur twice come back as they were."""

from __future__ import annotations

import json
from collections import deque
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tests.catalogue.optimizers import other
from tests.catalogue.trained import Death, in_lives, in_threads
from unisono.checkpoint.format import decode, encode, from_json, pack, snapshot, to_json, unpack

COLUMN_MAJOR = ["soap", "splus", "lorarite"]


@pytest.mark.parametrize("name", COLUMN_MAJOR)
def test_column_major_state_goes_on_to_the_same_weights(name: str, tmp_path: Path) -> None:
    straight = in_threads(1, other(name), epochs=3)
    for workers, epochs in ((2, 1), (3, 2)):
        in_threads(workers, other(name), epochs=epochs, run_dir=tmp_path)
    assert in_threads(1, other(name), epochs=3, run_dir=tmp_path) == straight
    assert set(in_lives(3, other(name), {2: Death(31)}, epochs=3).results.values()) == {straight}


class SumsInMemoryOrder(torch.optim.SGD):
    """Its momentum is column-major, of no dimensions, or has gaps: what follows depends on that."""

    def step(self, closure: Any = None) -> Any:
        for parameter in self.param_groups[0]["params"]:
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if not state:
                columns = parameter.grad.new_zeros(parameter.shape[::-1]).permute(*reversed(range(parameter.dim())))
                state.update(
                    columns=columns, gaps=torch.zeros(2 * parameter.numel(), dtype=torch.float64)[::2], count=torch.tensor(0)
                )
            state["count"] += 1
            state["columns"].mul_(0.9).add_(parameter.grad)
            state["gaps"].add_(parameter.grad.reshape(-1))
            inner = torch.as_strided(state["columns"], (parameter.numel(),), (1,)).cumsum(0)[-1]  # in memory's order
            parameter.grad.add_(state["columns"]).mul_(1 + 1e-3 * inner + 1e-3 * state["gaps"].view(torch.float64).sum())
        return super().step(closure)


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_state_in_any_order_of_memory(workers: int, tmp_path: Path) -> None:
    def make(model: nn.Module) -> Optimizer:
        return SumsInMemoryOrder(model.parameters(), lr=0.05)

    straight = in_threads(1, make, epochs=3)
    in_threads(2, make, epochs=1, run_dir=tmp_path)
    assert in_threads(workers, make, epochs=3, run_dir=tmp_path) == straight
    assert set(in_lives(3, make, {1: Death(29)}, epochs=3).results.values()) == {straight}


def through_a_file(state: Any) -> Any:
    packed, tensors = pack(snapshot(state))
    return unpack(from_json(to_json(packed)), decode(encode(tensors)))


LAYOUTS: dict[str, Tensor] = {
    "columns": torch.arange(12.0).reshape(3, 4).t(),
    "channels_last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
    "gaps": torch.arange(20.0).reshape(4, 5)[:, ::2],
    "expanded": torch.arange(4.0).expand(3, 4),
    "nothing": torch.empty(0, 3).t(),
    "number": torch.tensor(3.5, dtype=torch.float64),
    "half": torch.ones(2, 3, dtype=torch.bfloat16).t(),
    "complex": torch.randn(2, 3, dtype=torch.complex64).t(),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_checkpoint_keeps_strides_dtype_and_shape(name: str) -> None:
    tensor = LAYOUTS[name]
    found = through_a_file({"x": tensor})["x"]
    assert torch.equal(found, tensor)
    assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
    assert found.stride() == (tensor.stride() if name not in ("expanded", "nothing") else found.contiguous().stride())


def test_a_tensor_that_occurs_twice_is_one_tensor_again() -> None:
    tensor = torch.arange(6.0).reshape(2, 3).t()
    found = through_a_file({"a": [tensor], "b": {"c": tensor}, "d": tensor.clone()})
    assert found["a"][0] is found["b"]["c"]
    assert found["d"] is not found["b"]["c"]
    assert found["a"][0].stride() == tensor.stride()


def test_queues_and_keys_that_are_numbers_or_tuples_come_back() -> None:
    state = {"queue": deque([torch.ones(2), 3], maxlen=4), (0, 1): {0.9: torch.zeros(1), float("inf"): 1}}
    found = through_a_file(state)
    assert isinstance(found["queue"], deque)
    assert (found["queue"].maxlen, found["queue"][1]) == (4, 3)
    assert list(found[0, 1]) == [0.9, float("inf")]


def test_a_checkpoint_of_an_older_version_has_the_parameters_strides(tmp_path: Path) -> None:
    """It did not keep any; torch.optim's own state mostly has those."""
    packed, tensors = pack({"x": LAYOUTS["columns"]})
    old = json.loads(json.dumps(packed).replace(', "stride": [1, 4]', ""))
    assert "stride" not in json.dumps(old)
    assert unpack(old, decode(encode(tensors)))["x"].is_contiguous()
