"""Workers in processes, on any number of hosts: torch.distributed with Gloo (CPU) and NCCL (CUDA).

Everything is built on point-to-point messages, which keep the order of summation ours and, on Gloo, are several times
faster than its collectives for small messages (docs/decisions/0003).
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import os
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import ErrorType
from torch.distributed.distributed_c10d import _abort_process_group

from unisono.collective.base import PATIENCE_S, Collective, Expected, LostWorker
from unisono.errors import ConfigurationError, WorkerFailure

_CPU = torch.device("cpu")
_SMALL_BYTES = 64 * 1024
_MEETING_S = 300.0
"""Workers may start this long after each other, however short the time limit of what they do then."""

_SILENCE_S = 12.0
"""How long the system of another host may be silent. If it was only out of reach for so long, all meet again."""

_LOOK_S = 0.01
"""How often a worker that waits for its GPU looks whether the others still are there, in seconds."""
_SPIN_S = 0.001
"""How long it does nothing else, before it sleeps in between."""
_NCCL_LEAVES_ERRORS_TO_US = {
    # Else NCCL's watchdog ends the process when another worker has died.
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    # Else a worker whose partner dies while they connect waits for it for ever.
    "TORCH_NCCL_USE_COMM_NONBLOCKING": "1",
    "TORCH_NCCL_NONBLOCKING_TIMEOUT": "30",
}

_Started = tuple[Any, int | None]
"""What torch.distributed has begun, and the worker that it is to be begun with; None: several, on a device of its own."""


class _GroupExchange:
    """Receives under way, and what is kept alive for the sends."""

    def __init__(self, owner: TorchDistributed, works: list[_Started], received: list[list[Tensor]], sent: Any) -> None:
        self._owner = owner
        self._works = works
        self._received = received
        self._sent = sent

    def wait(self) -> list[list[Tensor]]:
        self._owner.finish(self._works)
        self._works.clear()
        self._sent = None
        return self._received


class TorchDistributed(Collective):
    """The collective of the default process group, whose backends must serve the tensors' devices.

    Args:
        timeout_s: How long this worker waits for another one. On Gloo each message has this limit, whatever that of the process
            group is. On NCCL waiting is the device's, and the limit that of the process group, unless there is ``check``.
        check: Raises LostWorker if one of the workers is lost. With it this worker waits for its GPU itself, and looks meanwhile.
    """

    def __init__(self, *, timeout_s: float = PATIENCE_S, check: Callable[[], None] | None = None) -> None:
        self.timeout_s = timeout_s
        self._check = check
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
        timeout_s: float = PATIENCE_S,
    ) -> TorchDistributed:
        """*collective*. Makes the default process group, unless the script has made it already.

        Args:
            init_method: "env://" (MASTER_ADDR, MASTER_PORT), "file://..." or "tcp://...".
            timeout_s: How long an operation may wait for the others.
        """
        if not dist.is_initialized():
            # Control messages are CPU tensors; gradients travel by the device's own backend.
            dist.init_process_group(
                _backend(device),
                init_method=init_method,
                rank=rank,
                world_size=size,
                # The workers' own limit must come first: the group's names nobody, and NCCL's aborts the process.
                timeout=datetime.timedelta(seconds=max(_MEETING_S, timeout_s + 30)),
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
        return cls(timeout_s=timeout_s)

    @classmethod
    def meet(
        cls,
        rank: int,
        size: int,
        store: Any,
        *,
        device: torch.device = _CPU,
        limit_s: float = 30.0,
        check: Callable[[], None] | None = None,
    ) -> TorchDistributed:
        """*collective*. Makes the default process group of these workers, in place of one that there may be.

        Args:
            store: A store of torch.distributed in which nobody else writes.
            device: Where this worker computes.
            limit_s: How long to wait for the others.
            check: As for the class.

        Raises:
            LostWorker: One did not come.
        """
        _close(abort=True)
        if device.type == "cuda":
            for name, value in _NCCL_LEAVES_ERRORS_TO_US.items():
                os.environ.setdefault(name, value)
        before = _sockets()
        try:
            dist.init_process_group(
                _backend(device), store=store, rank=rank, world_size=size, timeout=datetime.timedelta(seconds=limit_s)
            )
        except RuntimeError as error:
            _close(abort=True)
            raise LostWorker(f"worker {rank} could not connect to the others ({str(error).splitlines()[0]})") from error
        atexit.unregister(_close)
        atexit.register(_close)
        for descriptor in _sockets() - before:
            _notice_a_lost_host(descriptor)
        met = cls(timeout_s=limit_s, check=check)
        if device.type == "cuda":
            met.barrier()  # all are alive: NCCL takes long to notice who is not while it connects
            met.broadcast(torch.zeros(1, device=device))
        return met

    def finish(self, works: Sequence[_Started]) -> None:
        """*local*. Waits until these are done."""
        limit = datetime.timedelta(seconds=self.timeout_s)
        for work, peer in works:
            try:
                if peer is None:
                    self._finish_on_device(work)
                    continue
                self.lookout.wait_for(peer)
                work.wait(limit)
            except RuntimeError as error:
                if peer is not None and "timed out waiting" in str(error).lower():
                    raise self.lookout.silence(self.rank, peer, self.timeout_s) from None
                raise self._lost(error) from error
        self.lookout.wait_for(-1)

    def _finish_on_device(self, work: Any) -> None:
        """Makes what the device computes from now on wait; where workers may be lost, the host does so first.

        A kernel of NCCL whose partner is dead never ends, and nothing behind it in its stream ever begins: to see that, the host
        must not be waiting for the stream.
        """
        if self._check is not None:
            began_s = looked_s = time.monotonic()
            while not work.is_completed():
                now_s = time.monotonic()
                if now_s - looked_s > _LOOK_S:
                    self._check()
                    looked_s = now_s
                if now_s - began_s > self.timeout_s:
                    raise LostWorker(
                        f"worker {self.rank} waited {self.timeout_s:g} s for another worker's GPU, which did not answer"
                    )
                if now_s - began_s > _SPIN_S:
                    time.sleep(_SPIN_S / 10)
            if _has_failed():
                raise LostWorker(f"worker {self.rank} lost contact with another worker's GPU; look for that worker's own error")
        work.wait()  # with a limit the host would stand still, too

    def _lost(self, error: RuntimeError) -> LostWorker:
        """Another worker is gone, and its own error is the one that matters."""
        return LostWorker(f"worker {self.rank} lost contact with another worker; look for that worker's own error. ({error})")

    def start_exchange(
        self, outgoing: Sequence[Sequence[Tensor]], incoming: Sequence[Sequence[Expected]], *, name: str = "exchange"
    ) -> _GroupExchange:
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
        return _GroupExchange(self, self._start(operations), received, outgoing)

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
        self.finish(self._start(operations))

    def broadcast(self, tensor: Tensor, source: int = 0) -> None:
        if self.rank == source:
            self.bytes_sent += tensor.nbytes * (self.size - 1)
        peer = (source + (self.rank == source)) % self.size
        try:
            # As bytes: backends broadcast some dtypes only (Gloo no int16, no float8), and call the others a lost connection.
            work = dist.broadcast(tensor.view(-1).view(torch.uint8), source, async_op=True)
        except RuntimeError as error:
            raise self._lost(error) from error
        self.finish([(work, None if tensor.is_cuda else peer)])

    def close(self) -> None:
        _close(abort=self._check is not None)

    def _start(self, operations: list[dist.P2POp]) -> list[_Started]:
        if not operations:
            return []
        try:
            if operations[0].tensor.is_cuda:
                return [(work, None) for work in dist.batch_isend_irecv(operations)]
            return [(operation.op(operation.tensor, operation.peer), operation.peer) for operation in operations]
        except RuntimeError as error:
            raise self._lost(error) from error

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


def _backend(device: torch.device) -> str:
    """Control messages are CPU tensors; gradients travel by the device's own backend."""
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


def _has_failed() -> bool:
    """Whether NCCL has seen an error, after which what it received is not valid."""
    group = dist.group.WORLD
    if group is None:
        return True
    look = getattr(group._get_backend(torch.device("cuda")), "get_error", None)
    return look is not None and look() != ErrorType.SUCCESS


def _sockets() -> set[int]:
    """The descriptors of this process's sockets; none where the system does not say."""
    found = set()
    with contextlib.suppress(OSError):
        for entry in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(OSError):  # that of the list itself is gone
                if str(entry.readlink()).startswith("socket:"):
                    found.add(int(entry.name))
    return found


def _notice_a_lost_host(descriptor: int) -> None:
    """Has the system end a connection whose other end does not answer: a host without power says nothing, and a worker that waits
    for it would do so until its own time is up. A worker that is only stopped has a system that answers."""
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as connection:
        if connection.family not in (socket.AF_INET, socket.AF_INET6) or connection.type != socket.SOCK_STREAM:
            return
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (
            ("TCP_KEEPIDLE", _SILENCE_S / 3),
            ("TCP_KEEPINTVL", _SILENCE_S / 6),
            ("TCP_KEEPCNT", 4),
            ("TCP_USER_TIMEOUT", 1000 * _SILENCE_S),  # of what has been sent and not received; in milliseconds
        ):
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), max(1, round(value)))


def _close(*, abort: bool = False) -> None:
    """Ends the default process group; with ``abort`` without waiting for what is under way on a GPU, which may never end."""
    if not dist.is_initialized():
        return
    with contextlib.suppress(RuntimeError):  # the other workers may be gone
        if abort and _serves_cuda():
            _abort_process_group()
        else:
            dist.destroy_process_group()


def _serves_cuda() -> bool:
    return "nccl" in str(dist.get_backend_config()).lower()
