"""Memory that workers have in common is there as long as someone looks at it, and no longer."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from unisono.collective.regions import Memory, make_file
from unisono.collective.shared_memory import SharedMemory
from unisono.elastic.shared_state import SharedState
from unisono.replica.torch_replica import TorchReplica
from unisono.sync import Exact
from unisono.training.weights import Weights


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_common_memory_is_left_with_the_last_tensor_that_lies_in_it() -> None:
    memory, before = Memory(), open_files()
    common = memory.join(4096, make_file(4096))
    part = common[:64].view(torch.float32)
    assert memory.common_descriptor(common) is not None
    assert open_files() > before
    del common
    part.fill_(3.0)
    assert open_files() > before
    del part
    assert open_files() == before


def test_holdings_that_are_given_up_leave_no_memory_behind() -> None:
    model = nn.Linear(64, 64)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(64)).sum().backward()
    optimizer.step()
    memory = Memory()
    collective = SharedMemory(0, [None], memory=memory)
    replica = TorchReplica(model, optimizer, lambda model, batch: model(batch), device=torch.device("cpu"))
    weights = Weights(replica, collective)
    seen = []
    for generation in range(1, 6):
        reduction = Exact(replicate_kib=0).bind(replica.layout, collective, 8, per_host=True)
        assert SharedState(replica, weights).bind(collective, reduction, generation, 1)
        memory.recycle(weights.flats)
        collective = SharedMemory(0, [None], memory=memory)
        seen.append(open_files())
    assert seen[-1] == seen[1]
