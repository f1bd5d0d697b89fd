"""The peers of the step-time benchmark: each is a process group of its own that trains the same global batch."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from workloads import WORKLOADS, Workload

Step = Callable[[], None]


def plain(workload: Workload, rank: int, workers: int) -> Step:
    """A single-device loop over the whole batch."""
    return _loop(workload, workload.model(), *workload.batch())


def ddp(workload: Workload, rank: int, workers: int) -> Step:
    """``DistributedDataParallel`` over Gloo, each worker with its share of the batch."""
    inputs, targets = (_share(tensor, rank, workers) for tensor in workload.batch())
    model = nn.parallel.DistributedDataParallel(workload.model(), gradient_as_bucket_view=True)
    return _loop(workload, model, inputs, targets)


def unisono(workload: Workload, rank: int, workers: int, microbatches: int = 2, shared: bool = True) -> Step:
    """unisono, each worker with its microbatches; over shared memory (its default on one host) or over Gloo."""
    import numpy as np

    import unisono
    from unisono.collective import Collective
    from unisono.collective.shared_memory import SharedMemory
    from unisono.collective.torch_distributed import TorchDistributed
    from unisono.order import microbatch_bounds
    from unisono.training.step import Microbatch

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
        return workload.loss(model(batch[0]), batch[1]), workload.count(batch[1])

    collective: Collective = TorchDistributed()
    if shared:
        met = SharedMemory.meet(rank, workers, collective.all_gather_bytes)
        if isinstance(met, str):
            raise RuntimeError(met)
        collective = met
    model = workload.model()
    inputs, targets = workload.batch()
    trainer = unisono.Trainer(
        model,
        _optimizer(model),
        loss,
        batch_size=workload.batch_size,
        microbatches=microbatches,
        collective=collective,
    )
    if trainer.collective.size != workers:
        raise RuntimeError(f"{trainer.collective.size} workers instead of {workers}")
    bounds = microbatch_bounds(workload.batch_size, workload.batch_size, microbatches)
    share = microbatches // workers
    parts = [
        Microbatch(m, np.arange(lo, hi), (inputs[lo:hi].clone(), targets[lo:hi].clone()))
        for m, (lo, hi) in list(enumerate(bounds))[rank * share : (rank + 1) * share]
    ]

    def step() -> None:
        number = trainer.position.batch
        trainer.step(
            unisono.Batch(epoch=0, number=number, of=10**9, samples=workload.batch_size, filled=microbatches, parts=parts)
        )

    return step


def _loop(workload: Workload, model: nn.Module, inputs: Tensor, targets: Tensor) -> Step:
    optimizer = _optimizer(model)
    count = workload.count(targets)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        (workload.loss(model(inputs), targets) / count).backward()
        optimizer.step()

    return step


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)


def _share(tensor: Tensor, rank: int, workers: int) -> Tensor:
    size = len(tensor) // workers
    return tensor[rank * size : (rank + 1) * size].clone()


PEERS: dict[str, tuple[Callable[[Workload, int, int], Step], int, int]] = {
    # name: (what makes the step, processes, threads a process)
    "plain, 1 thread": (plain, 1, 1),
    "plain, 2 threads": (plain, 1, 2),
    "DDP": (ddp, 2, 1),
    "unisono, M = 2": (unisono, 2, 1),
    "unisono, M = 8": (lambda *arguments: unisono(*arguments, microbatches=8), 2, 1),
    "unisono over Gloo, M = 2": (lambda *arguments: unisono(*arguments, shared=False), 2, 1),
    "unisono over Gloo, M = 8": (lambda *arguments: unisono(*arguments, microbatches=8, shared=False), 2, 1),
}


def serve(peer: str, workload: str, rank: int, folder: str, pipe: Connection) -> None:
    """One process of a peer: trains as many steps as it is told to, and answers with the seconds that they took."""
    make, workers, threads = PEERS[peer]
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    if workers > 1:
        dist.init_process_group("gloo", init_method=(Path(folder) / "meeting").as_uri(), rank=rank, world_size=workers)
    step = make(WORKLOADS[workload], rank, workers)
    pipe.send(0.0)
    while steps := pipe.recv():
        if workers > 1:
            dist.barrier()
        began = time.perf_counter()
        for _ in range(steps):
            step()
        pipe.send(time.perf_counter() - began)
    if workers > 1:
        dist.destroy_process_group()
