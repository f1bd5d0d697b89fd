"""What is special about process groups of PyTorch; the rest is in the conformance suite."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from unisono.collective.torch_distributed import TorchDistributed
from unisono.errors import ConfigurationError


def test_a_process_group_that_cannot_send_control_messages_is_refused_with_what_to_do() -> None:
    dist.init_process_group("cuda:gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(ConfigurationError, match="serves cuda, but unisono sends tensors of cpu"):
            TorchDistributed.connect(rank=0, size=1, device=torch.device("cpu"))
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.int16, torch.float8_e4m3fn, torch.complex64, torch.bool])
def test_a_tensor_of_any_dtype_can_be_broadcast(dtype: torch.dtype) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for shape in ((), (3, 2)):
            tensor = torch.ones(shape).to(dtype)
            TorchDistributed.connect(rank=0, size=1, device=torch.device("cpu")).broadcast(tensor)
            assert torch.equal(tensor.to(torch.complex64), torch.ones(shape, dtype=torch.complex64))
    finally:
        dist.destroy_process_group()
