"""transformers' arguments, read by a process that is one of several and does not show it: what decides how a run is trained.

transformers and accelerate look for other processes by themselves, multiply batch sizes by their number and start a process
group. Here each worker is the only process to them; one of them, the worker of rank 0, writes files.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import math
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch.utils.data import Sampler

from unisono.data.loader import dataset_length
from unisono.errors import ConfigurationError
from unisono.order import derive_seed
from unisono.training.setup import choose_device
from unisono.world import World

_REFUSED = {
    "fp16": "use bf16=True, which needs no loss scaling",
    "fp16_full_eval": "evaluation has the precision of training: use bf16=True",
    "bf16_full_eval": "evaluation has the precision of training: use bf16=True",
    "fsdp": "each worker holds the whole model and a part of the optimizer state: leave it out",
    "deepspeed": "each worker holds the whole model and a part of the optimizer state: leave it out",
    "parallelism_config": "data are the only thing that is divided: leave it out",
    "torch_compile": "it has not been shown to keep the bits: leave it out",
    "auto_find_batch_size": "the batch size would depend on the machine: raise gradient_accumulation_steps instead",
    "push_to_hub": "push when training is done, on the worker for which trainer.is_world_process_zero() is true",
    "batch_eval_metrics": "compute_metrics gets all predictions: drop its argument compute_result",
    "enable_jit_checkpoint": "SIGTERM writes a checkpoint anyway: leave it out",
    "save_on_each_node": "all workers must see output_dir: put it on a shared file system",
    "ignore_data_skip": "a run goes on with the sample after the last one that it was trained on: leave it out",
}
"""What cannot be kept if it is set, and what to do instead."""


class TrainingArguments(transformers.TrainingArguments):  # type: ignore[misc]
    """``transformers.TrainingArguments`` that leave other processes to unisono: no process group is started."""

    @functools.cached_property
    def _setup_devices(self) -> torch.device:
        AcceleratorState._reset_state(reset_partial_state=True)
        with _without_launcher():
            PartialState(cpu=self.use_cpu)
        world = World.from_environment()
        self.distributed_state, self._n_gpu = Place(lambda: world.rank), 1
        return choose_device("cpu" if self.use_cpu else None, world)


class Seq2SeqTrainingArguments(TrainingArguments, transformers.Seq2SeqTrainingArguments):  # type: ignore[misc]
    """``transformers.Seq2SeqTrainingArguments``, likewise."""


@contextlib.contextmanager
def _without_launcher() -> Iterator[None]:
    """While the body runs accelerate does not see who has started this process."""
    hidden = {name: os.environ.pop(name) for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE") if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


class Place:
    """What transformers asks about processes: to each worker it is the only one, and one of them writes.

    Args:
        rank: This worker's rank; it changes when others are lost.
    """

    num_processes = 1
    distributed_type = DistributedType.NO

    def __init__(self, rank: Callable[[], int]) -> None:
        self._rank = rank

    @property
    def process_index(self) -> int:
        return self._rank()

    local_process_index = process_index

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # training_args.bin holds the arguments, and not where they were read


def own_arguments(given: Any, rank: Callable[[], int]) -> Any:
    """*local*. A copy of ``given`` with which this process is the only one.

    Raises:
        ConfigurationError: Something in it cannot be kept, by name.
    """
    for name, advice in _REFUSED.items():
        if getattr(given, name, None):
            raise ConfigurationError(f"TrainingArguments({name}={getattr(given, name)!r}) cannot be kept: {advice}")
    wanted = {"include_num_input_tokens_seen": "no", "eval_do_concat_batches": True}
    for name, value in wanted.items():
        if getattr(given, name) != value:
            raise ConfigurationError(f"TrainingArguments({name}={getattr(given, name)!r}) cannot be kept: it must be {value!r}")
    if given.train_sampling_strategy == "batch_rebalance":
        raise ConfigurationError(
            "TrainingArguments(train_sampling_strategy='batch_rebalance') cannot be kept, since it cuts batches by the number of "
            "workers: use 'group_by_length'"
        )
    if given.distributed_state.distributed_type != DistributedType.NO:
        raise ConfigurationError(
            "transformers.TrainingArguments has started a process group, which cannot change with the workers: write 'from "
            "unisono.integrations.transformers import Trainer, TrainingArguments'"
        )
    own = copy.copy(given)
    own.distributed_state, own._n_gpu = Place(rank), 1
    own.average_tokens_across_devices = False  # the loss is divided by the tokens of all workers anyway
    own.disable_tqdm = True  # unisono shows progress; what is logged is printed
    return own


@dataclasses.dataclass(frozen=True)
class Plan:
    """How long a run is, and what its batches are; none of it depends on the number of workers."""

    batch_size: int
    """Samples of an optimizer step: ``per_device_train_batch_size`` times ``gradient_accumulation_steps``."""
    microbatches: int
    parts: int
    """Batches of ``per_device_train_batch_size`` in an epoch, by which transformers counts parts of epochs."""
    steps_per_epoch: int
    max_steps: int
    samples: float
    """In all epochs."""

    @classmethod
    def of(cls, args: Any, dataset: Any, microbatches: int | None) -> Plan:
        """*local*.

        Args:
            microbatches: As asked for; None: the smallest multiple of ``gradient_accumulation_steps`` from 8 on, or
                ``batch_size`` if that is less.

        Raises:
            ConfigurationError: The dataset has no length or cannot be read by number, or ``dataloader_drop_last`` leaves out
                parts of an accumulated batch.
        """
        each, accumulated = args.per_device_train_batch_size, args.gradient_accumulation_steps
        length = dataset_length(dataset)
        parts = length // each if args.dataloader_drop_last else -(-length // each)
        if args.dataloader_drop_last and (parts < accumulated or parts % accumulated):
            raise ConfigurationError(
                f"TrainingArguments(dataloader_drop_last=True) leaves {parts} batches of {each} samples in an epoch, which "
                f"gradient_accumulation_steps={accumulated} does not divide: leave it out (each sample of a short last batch "
                "counts as much as any other), or choose other sizes"
            )
        steps = -(-parts // accumulated)
        max_steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * steps)
        batch_size = each * accumulated
        return cls(
            batch_size=batch_size,
            microbatches=microbatches or min(batch_size, accumulated * -(-8 // accumulated)),
            parts=parts,
            steps_per_epoch=steps,
            max_steps=max_steps,
            samples=length * max_steps / steps,
        )


class SeededSampler(Sampler[int]):
    """The order of another sampler, drawn from a seed of its own (``data_seed``) and the epoch.

    Args:
        sampler: Draws from PyTorch's global generator.
        seed: Of the order.
    """

    def __init__(self, sampler: Any, seed: int) -> None:
        self._sampler, self._seed, self._epoch = sampler, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Before an epoch is read."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        torch.manual_seed(derive_seed("data", self._seed, self._epoch))
        return iter(self._sampler)

    def __len__(self) -> int:
        return len(self._sampler)
