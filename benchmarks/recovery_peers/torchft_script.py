"""A replica group of one worker under torchft, after its example train_ddp.py; started again by whoever sees it die.

As there: Gloo, asynchronous quorum, the state sent to a joiner through the process group, timeouts of 5, 10 and 30 s, its own
part of the samples. What the example leaves to the user is done, too: the place in the data is kept, for every step, so that a
worker that comes back does not begin with the samples it had before.
"""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

from journal import Job, Journal


def main() -> None:
    job, replica, lighthouse, mended = Job.read(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4] == "mended"
    journal = Journal(job)
    journal.write("start")
    train(job, journal, replica, lighthouse, mended)


class Place:
    """How many batches of its own samples this replica has taken, kept on disk."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.batches = int(path.read_text()) if path.exists() else 0

    def advance(self) -> None:
        self.batches += 1
        unfinished = self._path.with_suffix(".new")
        unfinished.write_text(str(self.batches))
        unfinished.replace(self._path)


def forgiving(wrapper: type[Any]) -> type[Any]:
    """torchft's DistributedDataParallel, whose communication hook lives on when a sum fails.

    In 0.2.0 the hook returns the future behind the one that it was given. After a failed Gloo operation there is none (``wait``
    gives up before it is made), and the sums after that are of another class: an AssertionError ends every survivor.
    """
    import torch

    class Forgiving(wrapper):  # type: ignore[misc]
        @staticmethod
        def _comm_hook(manager, bucket):  # type: ignore[no-untyped-def]  # PyTorch refuses annotations that are strings
            manager.allreduce(bucket.buffer()).wait()
            # Summed and divided in place; or damaged, which the manager knows: then it does not commit.
            done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
            done.set_result(bucket.buffer())
            return done

    return Forgiving


def train(job: Job, journal: Journal, replica: int, lighthouse: str, mended: bool) -> None:
    import torch
    from safetensors.torch import save_file
    from torch.distributed import TCPStore
    from torchft import DistributedDataParallel, DistributedSampler, Manager, Optimizer, ProcessGroupGloo
    from torchft.checkpointing.pg_transport import PGTransport
    from workload import Samples, make_model, make_optimizer, summed_loss

    torch.set_num_threads(1)
    share = job.batch_size // job.workers
    model = make_model()
    samples = Samples(job.samples)
    own = list(
        DistributedSampler(samples, replica_rank=replica, num_replica_groups=job.workers, group_rank=0, num_replicas=1, seed=0)
    )
    place = Place(Path(job.folder) / f"place-{replica}")

    def state_dict() -> dict[str, Any]:
        return {"model": model.state_dict(), "optim": optimizer.state_dict()}

    def load_state_dict(state: dict[str, Any]) -> None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optim"])

    # What torchrun does for a replica group of several workers.
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    group = ProcessGroupGloo(timeout=timedelta(seconds=5))
    manager = Manager(
        pg=group,
        min_replica_size=1,
        load_state_dict=load_state_dict,
        state_dict=state_dict,
        replica_id=f"replica_{replica}",
        timeout=timedelta(seconds=30),
        checkpoint_transport=PGTransport(group, timeout=timedelta(seconds=10), device=torch.device("cpu")),
        rank=0,
        world_size=1,
        store_addr="localhost",
        store_port=store.port,
        lighthouse_addr=lighthouse,
        hostname="localhost",
        init_sync=False,  # as its documentation says, where all replicas begin with the same weights
    )
    parallel = (forgiving(DistributedDataParallel) if mended else DistributedDataParallel)(manager, model)
    optimizer = Optimizer(manager, make_optimizer(model))
    while manager.current_step() < job.steps:
        epoch, first = divmod(place.batches * share, len(own))
        # Attempts that were given up bring a replica to its next epoch early: other numbers, so that nobody thinks of repetition.
        mine = [number + epoch * job.samples for number in own[first : first + share]]
        place.advance()
        optimizer.zero_grad()  # begins the quorum
        loss = summed_loss(parallel, *samples.batch(mine)) / share
        manager.wait_quorum()  # backward would wait for it, too
        step = manager.current_step() + 1
        if manager.is_participating():
            journal.write("compute", step=step, size=manager.num_participants(), attempt=place.batches, samples=mine)
        loss.backward()
        optimizer.step()  # or not, as the replicas decide
        if manager.current_step() >= step:
            journal.write("commit", step=step, size=manager.num_participants())
        else:
            journal.write("dropped", step=step)
    unfinished = job.final.with_suffix(f".{replica}")
    save_file(model.state_dict(), unfinished)
    unfinished.replace(job.final.with_name(f"final-{replica}.safetensors"))
    manager.shutdown(wait=False)


if __name__ == "__main__":
    main()
