"""Workers in processes, on any number of hosts: torch.distributed with Gloo (CPU) and NCCL (CUDA).

Everything is built on point-to-point messages, which keep the order of summation ours and, on Gloo, are several times
faster than its collectives for small messages (docs/decisions/0003).
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from unisono.collective.base import Collective, Expected
from unisono.errors import ConfigurationError, WorkerFailure

_SMALL_BYTES = 64 * 1024


class _Exchange:
    """Receives under way, and what is kept alive for the sends."""

    def __init__(self, owner: TorchDistributed, works: list[Any], received: list[list[Tensor]], sent: Any) -> None:
        self._owner = owner
        self._works = works
        self._received = received
        self._sent = sent

    def wait(self) -> list[list[Tensor]]:
        with self._owner.contact():
            for work in self._works:
                work.wait()
        self._works.clear()
        self._sent = None
        return self._received


class TorchDistributed(Collective):
    """The collective of the default process group, whose backends must serve the tensors' devices."""

    def __init__(self) -> None:
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()
        self._buffers: dict[tuple[str, int, int, Expected], Tensor] = {}

    @classmethod
    def connect(
        cls,
        *,
        rank: int,
        size: int,
        device: torch.device,
        init_method: str = "env://",
        timeout_s: float = 1800.0,
    ) -> TorchDistributed:
        """*collective*. Makes the default process group, unless the script has made it already.

        Args:
            init_method: "env://" (MASTER_ADDR, MASTER_PORT), "file://..." or "tcp://...".
            timeout_s: How long an operation may wait for the others.
        """
        if not dist.is_initialized():
            # Control messages are CPU tensors; gradients travel by the device's own backend.
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                init_method=init_method,
                rank=rank,
                world_size=size,
                timeout=datetime.timedelta(seconds=timeout_s),
            )
            # Left open, Gloo's threads outlive the interpreter and abort the process now and then.
            atexit.register(_close)
        if (dist.get_rank(), dist.get_world_size()) != (rank, size):
            raise WorkerFailure(
                f"the process group says rank {dist.get_rank()} of {dist.get_world_size()}, the launcher rank {rank} of "
                f"{size}: call init_process_group() for all workers, or leave it to unisono",
                rank=rank,
            )
        served = {kind.type for kind in dist.group.WORLD._device_types} if dist.group.WORLD is not None else set()
        if not {"cpu", device.type} <= served:
            raise ConfigurationError(
                f"the script's process group serves {', '.join(sorted(served))}, but unisono sends tensors of "
                f"{' and '.join(sorted({'cpu', device.type}))}: call init_process_group() without a backend, or leave it to "
                "unisono"
            )
        if device.type == "cuda":
            # NCCL connects with the first operation, which all workers must take part in; of an exchange some may have no part.
            dist.broadcast(torch.zeros(1, device=device), 0)
        return cls()

    @contextlib.contextmanager
    def contact(self) -> Iterator[None]:
        """Turns the backend's error into ours: another worker is gone, and its own error is the one that matters."""
        try:
            yield
        except RuntimeError as error:
            raise WorkerFailure(
                f"worker {self.rank} lost contact with another worker; look for that worker's own error. ({error})"
            ) from error

    def start_exchange(
        self, outgoing: Sequence[Sequence[Tensor]], incoming: Sequence[Sequence[Expected]], *, name: str = "exchange"
    ) -> _Exchange:
        received: list[list[Tensor]] = []
        operations: list[dist.P2POp] = []
        for peer, expected in enumerate(incoming):
            if peer == self.rank:
                received.append(list(outgoing[peer]))
                continue
            tensors = [self._buffer(name, peer, number, what) for number, what in enumerate(expected)]
            operations += [dist.P2POp(dist.irecv, _real(t), peer) for t in tensors if t.numel()]
            received.append(tensors)
        for peer, sent in enumerate(outgoing):
            if peer != self.rank:
                operations += [dist.P2POp(dist.isend, _real(t), peer) for t in sent if t.numel()]
                self.bytes_sent += sum(t.nbytes for t in sent)
        return _Exchange(self, self._start(operations), received, outgoing)

    def publish(self, flat: Tensor, bounds: Sequence[tuple[int, int]]) -> None:
        others = [peer for peer in range(self.size) if peer != self.rank]
        mine = flat[slice(*bounds[self.rank])]
        self.transfer([(peer, mine) for peer in others], [(peer, flat[slice(*bounds[peer])]) for peer in others])

    def transfer(self, sends: Sequence[tuple[int, Tensor]], receives: Sequence[tuple[int, Tensor]]) -> None:
        """*collective* among the workers named: sends contiguous tensors to workers, and receives others from workers right
        where they shall lie. Empty ones do not travel."""
        operations = [dist.P2POp(dist.irecv, _real(tensor), peer) for peer, tensor in receives if tensor.numel()]
        operations += [dist.P2POp(dist.isend, _real(tensor), peer) for peer, tensor in sends if tensor.numel()]
        self.bytes_sent += sum(tensor.nbytes for _, tensor in sends)
        works = self._start(operations)
        with self.contact():
            for work in works:
                work.wait()

    def broadcast(self, tensor: Tensor, source: int = 0) -> None:
        if self.rank == source:
            self.bytes_sent += tensor.nbytes * (self.size - 1)
        with self.contact():
            # As bytes: backends broadcast some dtypes only (Gloo no int16, no float8), and call the others a lost connection.
            dist.broadcast(tensor.view(-1).view(torch.uint8), source)

    def close(self) -> None:
        _close()

    def _start(self, operations: list[dist.P2POp]) -> list[Any]:
        if not operations:
            return []
        with self.contact():
            if operations[0].tensor.is_cuda:
                return list(dist.batch_isend_irecv(operations))
            return [operation.op(operation.tensor, operation.peer) for operation in operations]

    def _buffer(self, name: str, peer: int, number: int, what: Expected) -> Tensor:
        # Fresh memory costs a page fault per 4 KiB, more than the message itself: keep what is large from step to step.
        if what[0] * what[1].itemsize <= _SMALL_BYTES:
            return self.allocate(*what)
        key = (name, peer, number, what)
        if key not in self._buffers:
            self._buffers[key] = self.allocate(*what)
        return self._buffers[key]


def _real(tensor: Tensor) -> Tensor:
    """The same memory in a dtype that NCCL knows."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _close() -> None:
    if dist.is_initialized():
        with contextlib.suppress(RuntimeError):  # the other workers may be gone
            dist.destroy_process_group()
