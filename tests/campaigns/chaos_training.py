"""What the campaign of faults trains: ``unisono run chaos_training.py RUN_DIR KIND STEPS``.

It tells the log, which a variable names since each host has its own, who it is and each step that it has done, and the story
beside it what unisono logs; it fails on SIGUSR1.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

import unisono
from tests.campaigns.chaos_faults import LOG
from tests.campaigns.stopped_training import BATCH_SIZE, Images, Net, loss

STEPS_PER_EPOCH = 5
CHECKPOINT_EVERY = 7
MICROBATCHES = 6
TIMEOUT_S = 2.0
KINDS = ("owners", "everywhere", "own loop", "busy loop", "edits", "loaders", "momentum", "late state", "skips")


def tell(log: Path, text: str) -> None:
    """Adds a line, in one piece."""
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, f"{time.time():.6f} {os.getpid()} {text}\n".encode())
    os.close(descriptor)


def fail(signum: int, frame: FrameType | None) -> NoReturn:
    raise RuntimeError(f"planted at {time.time()}")  # another one each time: the same error twice is the program's own


def accuracy(model: nn.Module, batch: Any) -> tuple[Tensor, int]:
    images, labels = batch
    return (model(images).argmax(1) == labels).sum(), len(labels)


class Tells(unisono.Callback):
    edits_weights = False

    def __init__(self, log: Path, data: Images) -> None:
        self.log = log
        self.data = data

    def on_step(self, trainer: unisono.Trainer, result: unisono.StepResult) -> None:
        tell(self.log, f"step {result.step} {trainer.collective.rank} {trainer.collective.size}")

    def on_epoch(self, trainer: unisono.Trainer, epoch: int) -> None:
        if epoch % 3 == 2:
            trainer.evaluate(self.data, {"accuracy": accuracy})


class Clamps(unisono.Callback):
    """Edits the weights after each step."""

    def on_step(self, trainer: unisono.Trainer, result: unisono.StepResult) -> None:
        clamp(trainer.model)


@torch.no_grad()
def clamp(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.clamp_(-0.1, 0.1)


class LateState(torch.optim.SGD):
    """Its momentum is None at first, and a new tensor in each step that changes it: a number, later one for each element."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                state["steps"] = state["steps"] + 1 if state else torch.ones(())
                steps = int(state["steps"])
                if steps % 40 == 1:
                    state["momentum"] = None
                elif steps % 20 == 1:
                    state["momentum"] = torch.zeros(())
                if state["momentum"] is not None:
                    gradient = parameter.grad if steps % 40 > 30 else parameter.grad.amax()
                    state["momentum"] = 0.9 * state["momentum"] + gradient
                parameter.sub_(parameter.grad if state["momentum"] is None else state["momentum"], alpha=group["lr"])


def bad_sometimes(model: nn.Module, batch: Any) -> tuple[Tensor, int]:
    """A loss that is not finite for a few batches."""
    total, count = loss(model, batch)
    bad = float(batch[0].sum()) % 7.0 < 0.05
    return (total * float("inf") if bad else total), count


def main(run_dir: str, log: Path, kind: str, steps: int) -> None:
    logging.basicConfig(
        filename=log.with_name(f"{log.name}.story"), format="%(created).6f %(process)d %(message)s", level=logging.INFO
    )
    signal.signal(signal.SIGUSR1, fail)
    tell(log, "here")
    torch.manual_seed(0)
    model, data = Net(), Images()
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    if kind == "momentum":
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
    if kind == "late state":
        optimizer = LateState(model.parameters(), lr=1e-3)
    trainer = unisono.Trainer(
        model,
        optimizer,
        bad_sometimes if kind == "skips" else loss,
        batch_size=BATCH_SIZE,
        microbatches=MICROBATCHES,
        scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps),
        max_grad_norm=1.0,
        checkpoint_every=CHECKPOINT_EVERY,
        run_dir=run_dir,
        callbacks=[Tells(log, data), *([Clamps()] if kind == "edits" else [])],
        timeout_s=TIMEOUT_S,
        sync=unisono.Exact(replicate_kib=10_000 if kind == "everywhere" else 0, shard_update=True),
        on_nonfinite="skip",
        loader=unisono.Loader(num_workers=1 if kind == "loaders" else 0),
    )
    tell(log, "ready")
    epochs = -(-steps // STEPS_PER_EPOCH)
    if kind == "own loop":
        for batch in trainer.batches(data, epochs):
            trainer.step(batch)
    elif kind == "busy loop":
        for batch in trainer.batches(data, epochs):
            clamp(model)
            optimizer.param_groups[0]["weight_decay"] = 1e-3 * (trainer.position.step % 10)
            trainer.step(batch)
            if trainer.position.step % 10 == 0:
                trainer.evaluate(data, {"accuracy": accuracy})
            if trainer.position.step % 25 == 0:
                trainer.save()
    else:
        trainer.fit(data, epochs // 2)
        trainer.evaluate(data, {"accuracy": accuracy})
        trainer.fit(data, epochs)
    trainer.evaluate(data, {"accuracy": accuracy})


if __name__ == "__main__":
    main(sys.argv[1], Path(os.environ[LOG]), sys.argv[2], int(sys.argv[3]))
