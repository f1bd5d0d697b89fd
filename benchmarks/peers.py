"""The peers of the benchmarks: ways to train one model on one global batch, each in processes of its own.

All use AdamW(fused=True) with one learning rate; gradients are dropped between steps (``set_to_none``). Workers of a peer
with several processes have met over Gloo before ``make`` is called.

A model that has learned its one batch by heart has denormal numbers in its gradients, and the same matrix products take
twice as long. So all train a few steps in earnest, which shows that they do the same, and then ``hold``:
the same work with a learning rate that changes nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import logging
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from workloads import Workload

Step = Callable[[], None]
LEARNING_RATE, HELD_LEARNING_RATE = 1e-3, 1e-12


@dataclasses.dataclass(frozen=True)
class Place:
    """Which of how many workers."""

    rank: int
    workers: int

    def share(self, tensor: Tensor) -> Tensor:
        """This worker's part of a tensor of samples, in memory of its own."""
        size = len(tensor) // self.workers
        return tensor[self.rank * size : (self.rank + 1) * size].clone()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Made:
    """What a worker of a peer was made to do."""

    model: nn.Module
    """The bare model, whose weights the steps change."""
    steps: dict[str, Step]
    """What can be timed; training is "step"."""
    optimizer: torch.optim.Optimizer | None = None
    """What changes them."""

    def hold(self) -> None:
        """*local*. From now on steps do the same work, but learn nothing; called on all workers."""
        for group in [] if self.optimizer is None else self.optimizer.param_groups:
            group["lr"] = HELD_LEARNING_RATE


@dataclasses.dataclass(frozen=True, kw_only=True)
class Peer:
    """A way to train."""

    name: str
    make: Callable[[Workload, Place], Made]
    workers: int = 2
    threads: int = 1
    module: str | None = None
    """What must be importable."""
    package: str | None = None
    """What to install for that."""

    @property
    def missing(self) -> str | None:
        """*local*. Why this peer cannot take part, and what to do; None if it can."""
        if self.module is None or importlib.util.find_spec(self.module) is not None:
            return None
        return f"{self.package} is not installed: pip install -c constraints.txt -e '.[bench-peers]'"


def plain(workload: Workload, place: Place) -> Made:
    """A single-device loop over the whole batch."""
    model = workload.model()
    return _loop(workload, place, model, model, _optimizer(model))


def ddp(workload: Workload, place: Place) -> Made:
    """``DistributedDataParallel`` over Gloo."""
    model = workload.model()
    wrapped = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    return _loop(workload, place, model, wrapped, _optimizer(model))


def zero(workload: Workload, place: Place) -> Made:
    """DDP with ``ZeroRedundancyOptimizer``: each worker keeps the optimizer state of its part of the parameters."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = workload.model()
    wrapped = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = ZeroRedundancyOptimizer(
        model.parameters(),
        optimizer_class=torch.optim.AdamW,
        parameters_as_bucket_view=True,
        lr=LEARNING_RATE,
        fused=True,
    )
    return _loop(workload, place, model, wrapped, optimizer)


def accelerate(workload: Workload, place: Place) -> Made:
    """Hugging Face Accelerate, multi-process on the CPU."""
    _torchrun_environment(place)
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs

    accelerator = Accelerator(cpu=True, kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)])
    if accelerator.num_processes != place.workers:
        raise RuntimeError(f"Accelerate sees {accelerator.num_processes} processes instead of {place.workers}")
    model = workload.model()
    wrapped, optimizer = accelerator.prepare(model, _optimizer(model))
    return _loop(workload, place, model, wrapped, optimizer, backward=accelerator.backward)


def fabric(workload: Workload, place: Place) -> Made:
    """Lightning Fabric with its DDP strategy."""
    _torchrun_environment(place)
    from lightning_fabric import Fabric
    from lightning_fabric.strategies import DDPStrategy

    strategy = DDPStrategy(process_group_backend="gloo", gradient_as_bucket_view=True)
    lightning = Fabric(accelerator="cpu", devices=place.workers, strategy=strategy)
    lightning.launch()
    if lightning.world_size != place.workers:
        raise RuntimeError(f"Fabric sees {lightning.world_size} processes instead of {place.workers}")
    model = workload.model()
    wrapped, optimizer = lightning.setup(model, _optimizer(model))
    return _loop(workload, place, model, wrapped, optimizer, backward=lightning.backward)


def deepspeed(workload: Workload, place: Place) -> Made:
    """DeepSpeed, stage 0. The first start on a machine compiles an extension (half a minute)."""
    _torchrun_environment(place)
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed as ds

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    model = workload.model()
    optimizer = _optimizer(model)
    engine, _, _, _ = ds.initialize(
        model=model,
        optimizer=optimizer,
        dist_init_required=False,
        config={
            "train_batch_size": workload.batch_size,
            "train_micro_batch_size_per_gpu": workload.batch_size // place.workers,
            "zero_optimization": {"stage": 0},
            "gradient_clipping": 0.0,  # its default is 1.0, which the others do not do
            "steps_per_print": 10**9,
        },
    )
    inputs, targets = (place.share(tensor) for tensor in workload.batch())
    count = workload.count(targets)

    def step() -> None:
        engine.backward(workload.loss(engine(inputs), targets) / count)
        engine.step()

    return Made(model=model, steps={"step": step}, optimizer=optimizer)


def unisono(
    workload: Workload, place: Place, *, microbatches: int | None, shared: bool = True, overlap: bool | None = None
) -> Made:
    """unisono over shared memory (its default inside a host) or over Gloo alone; None: as many microbatches as workers."""
    import unisono
    from unisono.collective import Collective
    from unisono.collective.hierarchical import come_near
    from unisono.collective.torch_distributed import TorchDistributed

    wide = TorchDistributed()
    collective: Collective = wide
    if shared:
        nearest = come_near(wide)
        if isinstance(nearest, str):
            raise RuntimeError(nearest)
        collective = nearest
    model = workload.model()
    optimizer = _optimizer(model)
    trainer = unisono.Trainer(
        model,
        optimizer,
        lambda model, batch: (workload.loss(model(batch[0]), batch[1]), workload.count(batch[1])),
        batch_size=workload.batch_size,
        microbatches=microbatches or place.workers,
        collective=collective,
        sync=unisono.Exact(share_weights=True, overlap=overlap),  # as in fit(), where nobody else writes to them
    )
    if trainer.collective.size != place.workers:
        raise RuntimeError(f"unisono sees {trainer.collective.size} workers instead of {place.workers}")
    return Made(model=model, steps={"step": _unisono_step(trainer, workload, place)}, optimizer=optimizer)


def _unisono_step(trainer: Any, workload: Workload, place: Place) -> Step:
    """One step on this worker's microbatches of the one batch that all peers train."""
    import numpy as np

    from unisono import Batch
    from unisono.order import microbatch_bounds
    from unisono.replica.base import Microbatch

    inputs, targets = workload.batch()
    stream = trainer.batches(torch.utils.data.TensorDataset(inputs, targets), epochs=1)
    next(stream)  # training has begun: weights are shared from here on
    bounds = list(enumerate(microbatch_bounds(workload.batch_size, workload.batch_size, trainer.microbatches)))
    share = trainer.microbatches // place.workers
    parts = tuple(
        Microbatch(number, np.arange(lo, hi), (inputs[lo:hi].clone(), targets[lo:hi].clone()))
        for number, (lo, hi) in bounds[place.rank * share : (place.rank + 1) * share]
    )

    def step(_open: Any = stream) -> None:
        trainer.step(
            Batch(
                epoch=0,
                number=trainer.position.batch,
                of=10**9,
                samples=workload.batch_size,
                filled=trainer.microbatches,
                parts=parts,
            )
        )

    return step


def _loop(
    workload: Workload,
    place: Place,
    model: nn.Module,
    wrapped: nn.Module,
    optimizer: torch.optim.Optimizer,
    backward: Callable[[Tensor], None] = Tensor.backward,
) -> Made:
    """The usual loop on this worker's share, with the mean loss over it."""
    inputs, targets = (place.share(tensor) for tensor in workload.batch())
    count = workload.count(targets)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        backward(workload.loss(wrapped(inputs), targets) / count)
        optimizer.step()

    return Made(model=model, steps={"step": step}, optimizer=optimizer)


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)


def _torchrun_environment(place: Place) -> None:
    """What torchrun would have set, for peers that read it; the process group exists already."""
    rank, workers = str(place.rank), str(place.workers)
    os.environ.update(
        RANK=rank,
        LOCAL_RANK=rank,
        GROUP_RANK="0",
        WORLD_SIZE=workers,
        LOCAL_WORLD_SIZE=workers,
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT="0",
        TORCHELASTIC_RUN_ID="benchmark",
    )


def loss_of_share(workload: Workload, place: Place, model: nn.Module) -> float:
    """Loss sum of the current weights over this worker's share, in training mode; leaves the model as it was."""
    inputs, targets = (place.share(tensor) for tensor in workload.batch())
    kept = [(buffer, buffer.clone()) for buffer in model.buffers()]
    with torch.no_grad(), contextlib.ExitStack() as stack:
        for buffer, value in kept:
            stack.callback(buffer.copy_, value)
        return workload.loss(model(inputs), targets).item()


PEERS = {
    peer.name: peer
    for peer in (
        Peer(name="plain, 1 thread", make=plain, workers=1),
        Peer(name="plain, 2 threads", make=plain, workers=1, threads=2),
        Peer(name="DDP", make=ddp),
        Peer(name="DDP + ZeRO", make=zero),
        Peer(name="Accelerate", make=accelerate, module="accelerate", package="accelerate"),
        Peer(name="Lightning Fabric", make=fabric, module="lightning_fabric", package="lightning-fabric"),
        Peer(name="DeepSpeed, stage 0", make=deepspeed, module="deepspeed", package="deepspeed"),
        Peer(name="unisono, M = 2", make=functools.partial(unisono, microbatches=2)),
        Peer(name="unisono, M = 8", make=functools.partial(unisono, microbatches=8)),
        Peer(name="unisono over Gloo, M = 2", make=functools.partial(unisono, microbatches=2, shared=False)),
        Peer(name="unisono over Gloo, M = 8", make=functools.partial(unisono, microbatches=8, shared=False)),
        Peer(name="unisono, M = W", make=functools.partial(unisono, microbatches=None)),
        Peer(name="unisono, M = W, overlap", make=functools.partial(unisono, microbatches=None, overlap=True)),
    )
}
OPTIONAL = ("unisono over Gloo, M = 8", "unisono, M = W", "unisono, M = W, overlap")
DEFAULT = tuple(name for name in PEERS if name not in OPTIONAL)
