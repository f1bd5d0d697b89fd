"""What happens once, before the first step: the device, the process, the other workers, equal replicas."""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from unisono.collective import Collective, InProcess
from unisono.data.batch import Batch
from unisono.data.loader import check_loader
from unisono.errors import ConfigurationError
from unisono.replica.base import Replica
from unisono.sync import Sync
from unisono.system.memory import keep_freed_memory
from unisono.training.callbacks import Callback
from unisono.world import World

if TYPE_CHECKING:
    from unisono.training.trainer import Trainer


def check_arguments(
    batch_size: int, microbatches: int, max_grad_norm: float | None, precision: str, checkpoint_every: int | None
) -> None:
    """*local*. Whether the trainer's plain settings are in range.

    Raises:
        ConfigurationError: One is not; the message names it.
    """
    whole = {"batch_size": batch_size, "microbatches": microbatches, "checkpoint_every": checkpoint_every}
    for name, value in whole.items():
        if not isinstance(value, Integral | None):
            raise ConfigurationError(f"{name} must be a whole number, got {value!r}")
    if microbatches < 1:
        raise ConfigurationError(f"microbatches must be 1 or more, got {microbatches}")
    if batch_size < microbatches:
        raise ConfigurationError(
            f"batch_size {batch_size} is smaller than microbatches {microbatches}: each microbatch needs a sample. Raise "
            "batch_size or lower microbatches"
        )
    if max_grad_norm is not None and not max_grad_norm > 0:
        raise ConfigurationError(f"max_grad_norm must be positive, got {max_grad_norm}")
    if precision not in ("fp32", "bf16"):
        raise ConfigurationError(
            f'precision must be "fp32" or "bf16", got {precision!r} (float16 would need its loss scaled: not supported)'
        )
    if checkpoint_every is not None and checkpoint_every < 1:
        raise ConfigurationError(f"checkpoint_every must be 1 or more steps, got {checkpoint_every}")


def check_batch(batch: object) -> None:
    """*local*.

    Raises:
        ConfigurationError: It is none of ``batches``.
    """
    if not isinstance(batch, Batch):
        raise ConfigurationError(
            f"step() takes the batches that trainer.batches(...) yields, not a {type(batch).__name__}: samples must be "
            "divided into microbatches by the trainer"
        )


def check_length(epochs: int | None, steps: int | None) -> int:
    """*local*. The epochs that a call of ``fit`` has at most.

    Raises:
        ConfigurationError: It has no end, or two.
    """
    if (epochs is None) == (steps is None):
        raise ConfigurationError(f"give fit either epochs or steps, got epochs={epochs} and steps={steps}")
    if steps is not None and steps < 1:
        raise ConfigurationError(f"steps must be 1 or more, got {steps}")
    return sys.maxsize if epochs is None else epochs


def check_policies(on_nonfinite: str, on_desync: str, compare_every: int | None, timeout_s: float) -> None:
    """*local*. Whether the policies are ones that there are.

    Raises:
        ConfigurationError: One is not; the message says which there are.
    """
    if on_nonfinite not in ("error", "skip"):
        raise ConfigurationError(f'on_nonfinite must be "error" or "skip", got {on_nonfinite!r}')
    if on_desync not in ("error", "heal"):
        raise ConfigurationError(f'on_desync must be "error" or "heal", got {on_desync!r}')
    if compare_every is not None and compare_every < 1:
        raise ConfigurationError(f"compare_every must be 1 or more steps, got {compare_every}")
    if not 1 <= timeout_s < math.inf:
        raise ConfigurationError(f"timeout_s must be 1 or more seconds, got {timeout_s}")


def check_helpers(callbacks: Sequence[Any], loader: Any, scheduler: Any, optimizer: Any) -> None:
    """*local*. Whether what is given beside the model is of the right kind.

    Raises:
        ConfigurationError: It is not; the message says what is wanted.
    """
    for callback in callbacks:
        if not isinstance(callback, Callback):
            raise ConfigurationError(
                f"callbacks holds {callback!r}, which is not a unisono.Callback: derive a class from it that overrides on_step, "
                "on_epoch or on_evaluate"
            )
    check_loader(loader)
    if scheduler is not None and not all(hasattr(scheduler, name) for name in ("step", "state_dict", "load_state_dict")):
        raise ConfigurationError(
            f"scheduler is a {type(scheduler).__name__}, not one of torch.optim.lr_scheduler. Several become one by "
            "ChainedScheduler or SequentialLR"
        )
    other = getattr(scheduler, "optimizer", optimizer)
    if other is not optimizer:
        raise ConfigurationError(
            f"scheduler is a {type(scheduler).__name__} over another optimizer ({type(other).__name__}), whose learning rates "
            "are not used: make it over the optimizer that is given to the Trainer"
        )


def choose_device(device: torch.device | str | None, world: World) -> torch.device:
    """*local*. The device of this worker: the one asked for, else its own GPU, else the CPU."""
    if device is not None:
        chosen = torch.device(device)
        return torch.device("cuda", world.local_rank) if chosen == torch.device("cuda") else chosen
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if world.launcher == "slurm" and torch.cuda.device_count() == 1:
        return torch.device("cuda", 0)  # Slurm shows each task its own GPU only
    if world.local_size > torch.cuda.device_count():
        raise ConfigurationError(
            f"{world.local_size} workers on host {world.host}, but {torch.cuda.device_count()} GPUs: start one worker a GPU, or "
            'pass device="cpu"'
        )
    return torch.device("cuda", world.local_rank)


def enter(world: World, microbatches: int) -> World:
    """*local*. The world without surplus workers, who leave here (see ``World.at_most``). The environment then says so, too:
    a second Trainer of the same process must neither wait for those who left nor send more of them away."""
    smaller = world.at_most(microbatches)
    if world.size_defaulted and world.size > 1:
        os.environ["WORLD_SIZE"], os.environ["LOCAL_WORLD_SIZE"] = str(smaller.size), str(smaller.local_size)
        os.environ.pop("UNISONO_WORKERS_DEFAULTED", None)
    return smaller


def prepare_process(world: World, device: torch.device) -> None:
    """*local*. Sets what bits depend on: the thread count, and deterministic kernels where others exist; and what speed does."""
    if torch.get_num_threads() != world.threads:
        torch.set_num_threads(world.threads)
    if device.type == "cpu":
        keep_freed_memory()
    if device.type == "cuda" or world.threads > 1:
        # On one CPU thread the kernels have a single order anyway. Both variables are read when CUDA starts.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        if torch.backends.cudnn.benchmark:  # else left alone: flags may be frozen (torch's own test helpers do that)
            torch.backends.cudnn.benchmark = False
    if device.type == "cuda":
        torch.cuda.set_device(device)


def connect(world: World, device: torch.device, timeout_s: float) -> Collective:
    """*collective*. The transport between the workers of ``world``, who wait at most ``timeout_s`` seconds for each other."""
    if world.size == 1:
        return InProcess()
    from unisono.collective.torch_distributed import TorchDistributed

    group = TorchDistributed.connect(
        rank=world.rank, size=world.size, device=device, init_method=world.init_method or "env://", timeout_s=timeout_s
    )
    if device.type != "cpu":
        return group
    from unisono.collective.hierarchical import come_near

    nearest = come_near(group)
    if not isinstance(nearest, str):
        return nearest
    if world.is_main:
        warnings.warn(f"workers talk over Gloo, since they cannot share memory: {nearest}", stacklevel=4)
    return group


def describe_settings(
    trainer: Trainer,
    replica: Replica,
    max_grad_norm: float | None,
    precision: str,
    sync: Sync,
    on_nonfinite: str,
) -> dict[str, Any]:
    """*local*. What makes a run this run, as plain JSON: equal on all workers, and at every start."""
    layout = replica.layout
    return {
        "batch_size": trainer.batch_size,
        "microbatches": trainer.microbatches,
        "seed": trainer.seed,
        "max_grad_norm": max_grad_norm,
        "on_nonfinite": on_nonfinite,
        "precision": precision,
        "sync": type(sync).__name__,
        **replica.kinds(),
        "parameter_groups": [{key: _plain(value) for key, value in group.items()} for group in replica.hyperparameters()],
        "parameters": {slot.name: f"{_name(layout.blocks[slot.block].dtype)}{list(slot.shape)}" for slot in layout.slots},
    }


def check_alike(collective: Collective, settings: Mapping[str, Any]) -> None:
    """*collective*. Whether all workers were given the same (plain JSON).

    Raises:
        ConfigurationError: They were not; the message names the first difference.
    """
    if collective.size == 1:
        return
    first, *others = [json.loads(text) for text in collective.all_gather_bytes(json.dumps(settings).encode())]
    for rank, other in enumerate(others, start=1):
        for name, value in first.items():
            if other[name] != value:
                raise ConfigurationError(
                    f"worker {rank} has {name} = {other[name]}, worker 0 has {value}: every worker must run the same script with "
                    "the same settings and the whole data (unisono itself divides it)"
                )


def unify_replicas(replica: Replica, collective: Collective) -> bool | None:
    """*collective*. Makes all replicas equal to worker 0's, and says so if they were not.

    Returns:
        Whether they were, so that the script seeds them; None: there is one worker only, which cannot know.

    Worker 0 wins because its model is the one that a run on a single worker would train.

    Raises:
        ConfigurationError: Workers have models of another structure.
    """
    if collective.size == 1:
        return None
    tensors = {name: tensor for name, tensor in replica.tensors().items() if tensor.numel() and not tensor.is_meta}
    mine = {name: _digest(tensor) for name, tensor in tensors.items()}
    everybodys = [json.loads(text) for text in collective.all_gather_bytes(json.dumps(mine).encode())]
    first = everybodys[0]
    different: dict[str, list[int]] = {}
    for rank, other in enumerate(everybodys):
        if _structure(other) != _structure(first):
            raise ConfigurationError(
                f"the model of worker {rank} has other parameters or buffers than that of worker 0: build the same model "
                "on every worker"
            )
        for name, digest in other.items():
            if digest != first[name]:
                different.setdefault(name, []).append(rank)
    if not different:
        return True
    if collective.rank == 0:
        name, ranks = next(iter(different.items()))
        warnings.warn(
            f"the workers' models differ at the start ({len(different)} tensors, first {name!r} on workers {ranks}): worker "
            "0's values are taken. Seed before you build the model, the same on every worker",
            stacklevel=4,
        )
    with torch.no_grad():
        for tensor in tensors.values():
            value = tensor.detach().contiguous()
            collective.broadcast(value)
            tensor.copy_(value)
    return False


def _structure(digests: Mapping[str, str]) -> list[tuple[str, str]]:
    return [(name, digest.partition(":")[0]) for name, digest in digests.items()]


def _digest(tensor: Tensor) -> str:
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return f"{_name(tensor.dtype)}{list(tensor.shape)}:{hashlib.blake2b(data.tobytes(), digest_size=16).hexdigest()}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)  # JSON has no infinity
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Tensor):
        return _plain(value.tolist())
    return getattr(value, "__qualname__", type(value).__qualname__)
