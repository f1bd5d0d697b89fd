"""What no step with W workers on one host can be faster than: the compute of one worker's share, and the bytes it must move.

**Compute**: forward and backward over the worker's share of the batch, in W processes at once that exchange nothing. The
gradients are dropped. glibc is told to keep freed memory, so that no page is taken from the kernel twice: PyTorch in its
usual state gives the large ones back and pays for them again in every step.

**Memory**: with n bytes of parameters, the worker streams, all W workers at once and on one thread each,

- (W−1)/W·n written: its gradient of the segments that others own, where they can read it;
- (W−1)/W·n read: the others' gradients of its own segment (n/W from each);
- n/W read: its own gradient, by the optimizer;
- 3·n/W read and written: parameters and both moments of AdamW, in place,

9/2·n at W = 2. Each of these is one pass over a buffer of its own of that size, with the fastest kernel that PyTorch has for
it (``zero_``, ``dot``, ``mul_``). Not counted: reading weights that another worker has changed, and everything that may
stay in a cache. A kernel call costs about a microsecond, which counts, six times: it shows in the tiny case only.
"""

from __future__ import annotations

import ctypes
import dataclasses

import torch
from peers import Made, Peer, Place, plain
from torch import Tensor
from workloads import Workload

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def moved_bytes(parameter_bytes: int, workers: int) -> int:
    """Bytes that one worker must move in a step, see the module."""
    own = parameter_bytes // workers
    return 2 * (parameter_bytes - own) + 7 * own


def make(workload: Workload, place: Place) -> Made:
    """The two parts of the limit as steps to be timed, "compute" and "memory"; "step" trains the weights that compute sees,
    as the peers do, on the whole batch: the time of a matrix product depends on the numbers in it."""
    _keep_freed_memory()
    training = plain(workload, Place(0, 1))
    parameters = list(training.model.parameters())
    inputs, targets = (place.share(tensor) for tensor in workload.batch())
    count = workload.count(targets)

    def compute() -> None:
        torch.autograd.grad(workload.loss(training.model(inputs), targets) / count, parameters)

    total = sum(parameter.numel() for parameter in parameters)
    own = total // place.workers
    written, read = torch.ones(total - own), torch.ones(total - own)
    gradient, *changed = (torch.ones(own) for _ in range(4))

    def memory() -> None:
        written.zero_()
        _read(read)
        _read(gradient)
        for tensor in changed:
            tensor.mul_(1.0)

    return dataclasses.replace(training, steps={**training.steps, "compute": compute, "memory": memory})


def _read(tensor: Tensor) -> None:
    torch.dot(tensor, tensor)


def _keep_freed_memory() -> None:
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):  # glibc; 32 MiB is the most that it accepts as mmap threshold
        library.mallopt(M_TRIM_THRESHOLD, 2**30)
        library.mallopt(M_MMAP_THRESHOLD, 2**25)


LIMIT = Peer(name="limit", make=make)
