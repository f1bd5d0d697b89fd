"""DistributedDataParallel under torchrun, with a checkpoint after every step, and from the newest one at each start."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from journal import Job, Journal


def main() -> None:
    job = Job.read(sys.argv[1])
    journal = Journal(job)
    journal.write("start")
    train(job, journal)


def train(job: Job, journal: Journal) -> None:
    import torch
    import torch.distributed as dist
    from safetensors.torch import save_file
    from torch.nn.parallel import DistributedDataParallel
    from workload import Samples, make_model, make_optimizer, summed_loss

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    generation = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    share = job.batch_size // size
    model = make_model()
    parallel = DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = make_optimizer(model)
    samples = Samples(job.samples)
    order = torch.randperm(job.samples, generator=torch.Generator().manual_seed(0))

    done = 0
    checkpoint = Path(job.folder) / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        done = state["step"]
        if rank == 0:  # the one before may have died between the checkpoint and this line
            journal.write("commit", step=done, size=size, t=checkpoint.stat().st_mtime)
    for step in range(done + 1, job.steps + 1):
        first = (step - 1) * job.batch_size + rank * share
        mine = order[first : first + share].tolist()
        journal.write("compute", step=step, size=size, generation=generation, samples=mine)
        optimizer.zero_grad()
        (summed_loss(parallel, *samples.batch(mine)) / share).backward()
        optimizer.step()
        journal.write("applied", step=step)
        if rank == 0:
            unfinished = checkpoint.with_suffix(".new")
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, unfinished)
            unfinished.replace(checkpoint)
            journal.write("commit", step=step, size=size)
    if rank == 0:
        save_file(model.state_dict(), job.final)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
