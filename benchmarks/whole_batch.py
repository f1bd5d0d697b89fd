"""A contrastive loss over the whole batch: ``WholeBatchLoss`` beside DDP with a gather written by hand.

All train one convolutional net on one global batch with a contrastive loss. Peers take turns of three steps; the first is
not timed, and must have the same losses in the first turn. Bytes are those that a worker sends in a step: unisono's are counted;
DDP's are a ring's (gradients twice, rows once, their gradient twice, each times (W - 1) / W)::

    torchrun --nproc-per-node 2 benchmarks/whole_batch.py
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import TensorDataset

import unisono
from unisono.collective.hierarchical import come_near
from unisono.collective.torch_distributed import TorchDistributed

SIDE, DIMENSIONS, STEPS = 24, 128, 3
Made = tuple[Callable[[], Iterator[float]], Callable[[], float]]


def net() -> nn.Module:
    torch.manual_seed(0)
    widths = [1, 32, 64, 128]
    blocks = [
        layer
        for inside, out in itertools.pairwise(widths)
        for layer in (nn.Conv2d(inside, out, 3, padding=1), nn.GroupNorm(8, out), nn.ReLU(), nn.MaxPool2d(2))
    ]
    return nn.Sequential(*blocks, nn.Flatten(), nn.Linear(9 * 128, 512), nn.ReLU(), nn.Linear(512, DIMENSIONS))


def contrast(one: Tensor, other: Tensor) -> tuple[Tensor, int]:
    near = 10 * one @ other.T
    return F.cross_entropy(near, torch.arange(len(near)), reduction="sum"), len(near)


def embed(model: Any, batch: Any) -> tuple[Tensor, Tensor]:
    images = batch[0]
    return F.normalize(model(images)), F.normalize(model(1.2 * images + 0.1))


class Gathered(torch.autograd.Function):
    """What SimCLR's and CLIP's ports write: rows of all workers, and the sum of everybody's gradient of the own ones."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        everybodys = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(everybodys, rows.contiguous())
        return torch.cat(everybodys)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        size = len(gradient) // dist.get_world_size()
        return gradient[dist.get_rank() * size : (dist.get_rank() + 1) * size]


def ddp(images: Tensor) -> Made:
    """Steps, which yield the loss, and the bytes that a worker sends in each."""
    workers, rank = dist.get_world_size(), dist.get_rank()
    model = DistributedDataParallel(net(), gradient_as_bucket_view=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    size = len(images) // workers
    own = images[rank * size : (rank + 1) * size].clone()

    def turn() -> Iterator[float]:
        while True:
            one, other = embed(model, (own,))
            total, count = contrast(Gathered.apply(one), Gathered.apply(other))
            optimizer.zero_grad()
            (total / count).backward()
            optimizer.step()
            yield total.item() / count

    parameters = sum(parameter.numel() for parameter in model.parameters())
    rows = 2 * len(images) * DIMENSIONS
    return turn, lambda: 4 * (2 * parameters + 3 * rows) * (workers - 1) / workers


def whole(images: Tensor, microbatches: int) -> Made:
    group = TorchDistributed()
    collective = come_near(group)
    if isinstance(collective, str):
        raise SystemExit(collective)
    model = net()
    trainer = unisono.Trainer(
        model,
        torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True),
        unisono.WholeBatchLoss(embed, contrast),
        batch_size=len(images),
        microbatches=microbatches,
        collective=collective,
        sync=unisono.Exact(share_weights=True),  # as in fit(), where nobody else writes to them
    )
    data, steps = TensorDataset(images), 0

    def turn() -> Iterator[float]:
        nonlocal steps
        for batch in trainer.batches(data, epochs=10**6, order="sequential"):
            steps += 1
            yield trainer.step(batch).loss

    return turn, lambda: trainer.collective.bytes_sent / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    workers = dist.get_world_size()
    images = torch.randn(arguments.batch_size, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    peers = {"DDP, gather by hand": ddp(images)}
    peers |= {f"WholeBatchLoss, M = {m}": whole(images, m) for m in (workers, 4 * workers)}
    losses: dict[str, list[float]] = {}
    times: dict[str, list[float]] = {name: [] for name in peers}
    for number in range(arguments.rounds + 1):
        for name, (turn, _) in peers.items():
            with contextlib.closing(turn()) as steps:
                found = [next(steps)]
                dist.barrier()
                began = time.perf_counter()
                found += itertools.islice(steps, STEPS - 1)
                if number:
                    times[name].append((time.perf_counter() - began) / (STEPS - 1))
            losses.setdefault(name, found)
    first = next(iter(losses.values()))
    for name, found in losses.items():
        if any(abs(one - other) > 1e-3 * abs(one) for one, other in zip(first, found, strict=True)):
            raise SystemExit(f"{name} has losses {found}, others {first}")
    if dist.get_rank():
        return
    print(f"W = {workers}, batch of {arguments.batch_size}, losses {', '.join(f'{loss:.4f}' for loss in first)}")
    base = times["DDP, gather by hand"]
    for name, (_, sent) in peers.items():
        ratio = statistics.median(one / other for one, other in zip(times[name], base, strict=True))
        median_ms = 1e3 * statistics.median(times[name])
        print(f"  {name:<22} {median_ms:7.1f} ms a step  {ratio:5.2f} of DDP  {sent() / 2**20:6.2f} MiB sent")


if __name__ == "__main__":
    main()
