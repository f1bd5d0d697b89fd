"""What ``end_to_end.py`` starts: trains a case for whole epochs, as users write it, and prints what each epoch took, as JSON::

OMP_NUM_THREADS=2 python benchmarks/epochs.py plain tiny --batches 300 --epochs 5
torchrun --nproc-per-node 2 benchmarks/epochs.py ddp tiny --batches 300 --epochs 5
unisono run --workers 2 benchmarks/epochs.py unisono tiny --batches 300 --epochs 5 --microbatches 8
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from workloads import WORKLOADS, Workload

LEARNING_RATE = 1e-4
"""Small, so that no model learns its samples by heart: then numbers become denormal, and products slow."""


class Clock:
    """When epochs end, and what was lost on the way."""

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._ends = [time.perf_counter()]

    def epoch(self) -> None:
        """An epoch has ended on this worker."""
        self._ends.append(time.perf_counter())

    def show(self, loss: float) -> None:
        """Prints one line; ``loss`` is the mean over the last epoch."""
        seconds = [after - before for before, after in zip(self._ends, self._ends[1:], strict=False)]
        print("epochs", json.dumps({"workers": self._workers, "seconds": seconds, "loss": loss}), flush=True)


def loop(workload: Workload, data: TensorDataset, epochs: int, workers: int = 1) -> None:
    """The usual loop: plain, or with ``DistributedDataParallel`` on this worker's share."""
    model = workload.model()
    wrapped: nn.Module = model if workers == 1 else nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    sampler: DistributedSampler[tuple[Tensor, ...]] | None = None if workers == 1 else DistributedSampler(data)
    loader = DataLoader(data, workload.batch_size // workers, shuffle=sampler is None, sampler=sampler)
    clock = Clock(workers)
    for epoch in range(epochs):
        if sampler is not None:
            sampler.set_epoch(epoch)
        total = torch.zeros(())
        for inputs, targets in loader:
            optimizer.zero_grad(set_to_none=True)
            loss = workload.loss(wrapped(inputs), targets) / workload.count(targets)
            loss.backward()
            optimizer.step()
            total += loss.detach()
        clock.epoch()
    mean = total / len(loader)
    if workers > 1:
        dist.all_reduce(mean)
        mean /= workers
    if workers == 1 or dist.get_rank() == 0:
        clock.show(float(mean))


def plain(workload: Workload, data: TensorDataset, epochs: int, microbatches: int) -> None:
    """One process; ``OMP_NUM_THREADS`` says how many threads."""
    loop(workload, data, epochs)


def ddp(workload: Workload, data: TensorDataset, epochs: int, microbatches: int) -> None:
    """Under ``torchrun``."""
    dist.init_process_group("gloo")
    loop(workload, data, epochs, dist.get_world_size())
    dist.destroy_process_group()


def unisono(workload: Workload, data: TensorDataset, epochs: int, microbatches: int) -> None:
    """Under ``unisono run``."""
    import unisono as library

    class Watch(library.Callback):
        edits_weights = False

        def on_begin(self, trainer: library.Trainer) -> None:
            self.clock = Clock(trainer.collective.size)
            self.losses: list[float] = []

        def on_step(self, trainer: library.Trainer, result: library.StepResult) -> None:
            self.losses.append(result.loss)

        def on_epoch(self, trainer: library.Trainer, epoch: int) -> None:
            self.clock.epoch()
            if epoch + 1 == epochs and trainer.collective.rank == 0:
                self.clock.show(sum(self.losses) / len(self.losses))
            self.losses.clear()

    model = workload.model()
    trainer = library.Trainer(
        model,
        torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True),
        lambda model, batch: (workload.loss(model(batch[0]), batch[1]), workload.count(batch[1])),
        batch_size=workload.batch_size,
        microbatches=microbatches,
        callbacks=[Watch()],
    )
    trainer.fit(data, epochs=epochs)


WAYS: dict[str, Callable[[Workload, TensorDataset, int, int], None]] = {"plain": plain, "ddp": ddp, "unisono": unisono}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("way", choices=list(WAYS))
    parser.add_argument("case", choices=list(WORKLOADS))
    parser.add_argument("--batches", type=int, required=True, help="global batches in an epoch")
    parser.add_argument("--epochs", type=int, required=True)
    parser.add_argument("--microbatches", type=int, default=8)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    workload = WORKLOADS[arguments.case]
    data = TensorDataset(*workload.samples(arguments.batches * workload.batch_size))
    WAYS[arguments.way](workload, data, arguments.epochs, arguments.microbatches)


if __name__ == "__main__":
    main()
