"""A plain Trainer script, for ``unisono run``; it writes down what it does, and knows nothing about recovery."""

from __future__ import annotations

import sys

from journal import Job, Journal


def main() -> None:
    job = Job.read(sys.argv[1])
    journal = Journal(job)
    journal.write("start")
    train(job, journal)


class Attempts:
    """Tells attempts at one step apart: a worker that goes on after a death does so with another collective."""

    def __init__(self) -> None:
        self._collective: object = None
        self._number = 0

    def number(self, collective: object) -> int:
        if collective is not self._collective:
            self._collective = collective
            self._number += 1
        return self._number


def train(job: Job, journal: Journal) -> None:
    from safetensors.torch import save_file
    from torch import Tensor, nn
    from workload import Samples, make_model, make_optimizer, summed_loss

    import unisono

    class Commits(unisono.Callback):
        edits_weights = False

        def on_step(self, trainer: unisono.Trainer, result: unisono.StepResult) -> None:
            journal.write("commit", step=result.step, size=trainer.collective.size)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, int]:
        numbers, inputs, classes = batch
        collective = trainer.collective
        attempt = attempts.number(collective)
        journal.write("compute", step=trainer.position.step + 1, size=collective.size, attempt=attempt, samples=numbers.tolist())
        return summed_loss(model, inputs, classes), len(classes)

    attempts = Attempts()
    model = make_model()
    trainer = unisono.Trainer(
        model,
        make_optimizer(model),
        loss,
        batch_size=job.batch_size,
        microbatches=2 * job.workers,
        run_dir=f"{job.folder}/run",
        callbacks=[Commits()],
    )
    trainer.fit(Samples(job.samples), epochs=1)
    if trainer.collective.rank == 0:
        save_file(model.state_dict(), job.final)


if __name__ == "__main__":
    main()
