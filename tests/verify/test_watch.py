"""What the script's calls are watched for."""

from __future__ import annotations

import inspect
from types import FunctionType

import pytest
import torch
from torch.distributed import distributed_c10d

from unisono.verify.watch import UNWATCHED, collectives


def exported() -> dict[str, FunctionType]:
    """The functions by which the installed PyTorch lets a group of workers do something."""
    functions = {name: getattr(distributed_c10d, name) for name in distributed_c10d.__all__}
    return {
        name: function
        for name, function in functions.items()
        if type(function) is FunctionType and {"group", "p2p_op_list"} & set(inspect.signature(function).parameters)
    }


@pytest.mark.parametrize("name", sorted(exported()))
def test_every_collective_of_the_installed_pytorch_is_watched_or_listed_as_irrelevant(name: str) -> None:
    assert (name in collectives()) != (name in UNWATCHED)
    assert hasattr(torch.distributed, name)


COMBINE = (
    "all_gather all_gather_into_tensor all_gather_object all_reduce all_to_all_single broadcast broadcast_object_list gather "
    "gather_object reduce reduce_scatter reduce_scatter_tensor scatter"
)


@pytest.mark.parametrize("name", COMBINE.split())
def test_a_function_that_combines_values_is_watched(name: str) -> None:
    assert name in collectives()


def test_the_single_tensor_collectives_are_watched_where_pytorch_has_them() -> None:
    assert {name for name in dir(torch.distributed) if name.endswith("_single")} <= set(collectives())
