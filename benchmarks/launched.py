"""What a script does under ``unisono run``: fits a case for a few steps and prints the memory of each worker, as JSON.

``memory.py`` starts it; workers are forked from one warm process there, which the other peers' are not.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys

import torch
from processes import Memory, memory_of
from workloads import WORKLOADS

import unisono

STEPS = 5


class Looks(unisono.Callback):
    """After the last step but one, while all workers stand still."""

    edits_weights = False

    def on_step(self, trainer: unisono.Trainer, result: unisono.StepResult) -> None:
        if result.step != STEPS:
            return
        trainer.collective.barrier()
        mine = memory_of(os.getpid())
        if mine is None:
            raise OSError("there is no /proc/PID/smaps_rollup on this system: use Linux")
        found = trainer.collective.all_gather_bytes(json.dumps(dataclasses.asdict(mine)).encode())
        total = Memory(pss=0, anonymous=0, shared=0, files=0)
        for worker in found:
            total += Memory(**json.loads(worker))
        if trainer.collective.rank == 0:
            print("memory", json.dumps(dataclasses.asdict(total)), flush=True)
        trainer.collective.barrier()


def main() -> None:
    workload = WORKLOADS[sys.argv[1]]
    torch.manual_seed(0)
    model = workload.model()
    trainer = unisono.Trainer(
        model,
        torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True),
        lambda model, batch: (workload.loss(model(batch[0]), batch[1]), workload.count(batch[1])),
        batch_size=workload.batch_size,
        microbatches=int(sys.argv[2]),
        callbacks=[Looks()],
    )
    trainer.fit(torch.utils.data.TensorDataset(*workload.batch()), epochs=STEPS + 1)


if __name__ == "__main__":
    main()
