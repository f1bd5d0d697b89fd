"""The narrow interface through which workers talk. Algorithms see this and nothing else.

Every method marked *collective* must be called by all workers, in the same order, with matching sizes. Memory handed to
an exchange must be left alone until the first collective call after its ``wait()`` has returned, and memory received from it
is valid until that call begins: a transport may hand out the other worker's own memory instead of a copy.
"""

from __future__ import annotations

import abc
import json
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from unisono.errors import WorkerFailure
from unisono.layout import allocate

Expected = tuple[int, torch.dtype, torch.device]
"""Number of elements, dtype and device of a flat tensor to be received."""


PATIENCE_S = 300.0
"""How long a worker waits for another one, unless it is told otherwise."""


class LostWorker(WorkerFailure):
    """Another worker does not answer, or its connection has ended. No further call of this collective can succeed.

    Attributes:
        silent: Whether it was given time to answer, and did not.
    """

    silent = False


class Lookout:
    """What a worker notes while it waits for another one, and what it says if that one does not come. *Local.*

    ``unisono.guard.silence`` has one that goes and looks at the other worker.
    """

    def wait_for(self, peer: int) -> None:
        """This worker stands still until worker ``peer`` is there; -1: it goes on."""

    def silence(self, rank: int, peer: int, timeout_s: float) -> WorkerFailure:
        """The error to raise: worker ``rank`` has waited ``timeout_s`` seconds for worker ``peer``."""
        failure = LostWorker(
            f"worker {rank} waited {timeout_s:g} s for worker {peer}, which did not arrive; look at what it is doing", rank=peer
        )
        failure.silent = True
        return failure


class Pending(Protocol):
    """An exchange that is under way."""

    def wait(self) -> list[list[Tensor]]:
        """Blocks until everything has arrived: for each worker, in order of rank, its tensors."""
        ...


class Collective(abc.ABC):
    """What workers can do together.

    Attributes:
        rank: This worker's number.
        size: How many workers there are.
        bytes_sent: Bytes of tensors that this worker has sent to other workers so far.
        timeout_s: How long this worker waits for another one.
        lookout: Told while it waits, and asked for the error when it has waited that long.
        apart: Whether the workers are processes of their own.
    """

    rank: int
    size: int
    bytes_sent: int = 0
    timeout_s: float = PATIENCE_S
    lookout: Lookout = Lookout()
    apart: bool = True

    def limit(self, timeout_s: float, lookout: Lookout) -> None:
        """*local*. From now on this worker waits at most ``timeout_s`` seconds for another one, watched by ``lookout``."""
        self.timeout_s, self.lookout = timeout_s, lookout

    @property
    def hosts(self) -> Sequence[Sequence[int]]:
        """Where some workers are nearer than others: the ranks of each host, contiguous, in order. By default every worker
        counts as a host of its own: none is nearer."""
        return [(rank,) for rank in range(self.size)]

    @abc.abstractmethod
    def start_exchange(
        self, outgoing: Sequence[Sequence[Tensor]], incoming: Sequence[Sequence[Expected]], *, name: str = "exchange"
    ) -> Pending:
        """*collective*. Sends a list of flat tensors to each worker and receives one from each.

        Args:
            outgoing: For each rank, contiguous 1-D tensors for it. What a worker sends to itself comes back as it is.
            incoming: For each rank, what it sends here (own rank: ignored).
            name: Exchanges that are under way at the same time need different names.
        """

    @abc.abstractmethod
    def publish(self, flat: Tensor, bounds: Sequence[tuple[int, int]]) -> None:
        """*collective*. Makes ``flat`` the same everywhere: worker r's elements ``bounds[r]`` are the ones that count."""

    @abc.abstractmethod
    def broadcast(self, tensor: Tensor, source: int = 0) -> None:
        """*collective*. Overwrites the contiguous ``tensor`` with that of worker ``source``."""

    def exchange(
        self, outgoing: Sequence[Sequence[Tensor]], incoming: Sequence[Sequence[Expected]], *, name: str = "exchange"
    ) -> list[list[Tensor]]:
        """*collective*. ``start_exchange`` and wait."""
        return self.start_exchange(outgoing, incoming, name=name).wait()

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """*collective*. The 1-D tensors of all workers, in order of rank; same size and dtype everywhere."""
        expected: Expected = (tensor.numel(), tensor.dtype, tensor.device)
        return [tensors[0] for tensors in self.all_gather_lists([tensor], [[expected]] * self.size)]

    def all_gather_lists(self, tensors: Sequence[Tensor], expected: Sequence[Sequence[Expected]]) -> list[list[Tensor]]:
        """*collective*. Every worker's flat tensors, by rank; ``expected`` says for each rank what it brings."""
        return self.exchange([tensors] * self.size, expected)

    def all_gather_bytes(self, data: bytes) -> list[bytes]:
        """*collective*. The byte strings of all workers, of any length, in order of rank."""
        mine = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
        sizes = [int(size) for size in self.all_gather(torch.tensor([len(data)]))]
        received = self.all_gather_lists([mine], [[(size, torch.uint8, mine.device)] for size in sizes])
        return [tensors[0].numpy().tobytes() for tensors in received]

    def all_gather_json(self, value: Any) -> list[Any]:
        """*collective*. The values of all workers, in order of rank, as JSON gives them back: a tuple is a list."""
        return [json.loads(text) for text in self.all_gather_bytes(json.dumps(value).encode())]

    def barrier(self) -> None:
        """*collective*. Returns once every worker has called it."""
        self.all_gather(torch.zeros(1, dtype=torch.uint8))

    def allocate(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """*local*. Uninitialised memory from which this transport sends fastest, aligned to 64 bytes."""
        return allocate(numel, dtype, device)

    def share(self, flat: Tensor) -> bool:
        """*collective*. Puts ``flat``, a whole tensor from ``allocate`` that is the same on all workers, into one memory that
        the workers of a host have in common, at the address that it has. Then a worker's writes are everybody's, and ``publish``
        moves nothing on this host.

        Returns:
            Whether this transport can do that; the same on all workers of a host.
        """
        return False

    def unshare(self, flat: Tensor) -> None:  # noqa: B027 - where nothing is shared there is nothing to do
        """*local*. Gives this worker a copy of its own again, if ``flat`` is shared. Nobody may write to it meanwhile."""

    def common(self, numel: int, dtype: torch.dtype, mine: Tensor | None = None) -> Tensor | None:
        """*collective*. Memory that the workers of this host have in common: a worker's writes are everybody's, and it stays for
        as long as any of them holds on to it, however the others end.

        Args:
            numel: Elements of the flat tensor, the same on all workers.
            mine: What this worker has from an earlier call, perhaps with other workers; None: nothing yet. If some have
                nothing yet, they get the same memory.

        Returns:
            The memory, zeroed if it is new and aligned to 64 bytes; None where this transport has no such memory.
        """
        return mine if self.size == 1 else None

    def close(self) -> None:  # noqa: B027 - most transports hold nothing
        """*local*. Ends this worker's part; others that still wait for it get a ``WorkerFailure``."""
