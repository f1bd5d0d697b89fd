"""Memory that other processes of this host can map: anonymous files, without names. Everything here is *local*.

A worker's memory outlives the other workers, and the transports that it was made for: whoever has mapped a region keeps it,
however its maker ends.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

_MAP_FIXED = 0x10  # mman.h

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]


class Region:
    """A stretch of memory, mapped by this process. Its pages are made when they are first touched: of a gradient, this
    worker's own part never is.

    Args:
        fd: The open file; this object closes it when it goes.
        nbytes: Its size.

    Attributes:
        memory: uint8 ``[nbytes]``.
        shown: The file that its addresses show now, if that is another one.
    """

    def __init__(self, fd: int, nbytes: int) -> None:
        self.fd = fd
        self.nbytes = nbytes
        self.shown: int | None = None
        self._map = mmap.mmap(fd, nbytes)
        self.memory = torch.frombuffer(self._map, dtype=torch.uint8)

    @classmethod
    def make(cls, nbytes: int) -> Region:
        """New memory, zeroed."""
        fd = make_file(nbytes)
        try:
            return cls(fd, nbytes)
        except BaseException:
            os.close(fd)
            raise

    def show(self, fd: int) -> None:
        """From now on this region's addresses show the memory of ``fd``, which has the same size."""
        protection, flags = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED | _MAP_FIXED
        address = self.memory.data_ptr()
        if _libc.mmap(address, self.nbytes, protection, flags, fd, 0) != address:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


class Memory:
    """What one worker has allocated so that others can read it, and what it has in common with those of its host."""

    def __init__(self) -> None:
        self._regions: dict[int, Region] = {}
        self._starts: list[tuple[int, int, int]] = []  # (address, bytes, region)
        self._spare: dict[int, list[int]] = {}  # regions that nobody uses any more, by size
        self._commons: dict[int, int] = {}  # descriptors of mapped files, by address

    # ------------------------------------------------------------------ own memory

    def allocate(self, nbytes: int) -> Tensor:
        """uint8 ``[nbytes]``, uninitialised."""
        if self._spare.get(nbytes):
            return self._regions[self._spare[nbytes].pop()].memory
        region = Region.make(nbytes)
        number = len(self._regions)
        self._regions[number] = region
        self._starts.append((region.memory.data_ptr(), nbytes, number))
        return region.memory

    def recycle(self, keep: Sequence[Tensor]) -> None:
        """From now on all that was allocated, but for these tensors, may be given out again."""
        kept = {self.place(tensor)[0] for tensor in keep}
        self._spare = {}
        for number, region in self._regions.items():
            if number not in kept:
                self._spare.setdefault(region.nbytes, []).append(number)

    def place(self, tensor: Tensor) -> tuple[int | None, int]:
        """The number of the region that the tensor lies in, None if in none, and the offset in bytes."""
        address = tensor.data_ptr()
        for start, nbytes, region in self._starts:
            if start <= address < start + nbytes:
                return region, address - start
        return None, 0

    def descriptor(self, number: int) -> int:
        """The open file of a region."""
        return self._regions[number].fd

    # ------------------------------------------------------------------ in common

    def is_whole(self, flat: Tensor) -> bool:
        """Whether the tensor is all of a region that was allocated."""
        number, offset = self.place(flat)
        return number is not None and not offset and self._regions[number].nbytes == flat.nbytes

    def is_common(self, flat: Tensor) -> bool:
        """Whether the tensor, as a whole, lies in common memory."""
        return self.common_descriptor(flat) is not None

    def common_descriptor(self, flat: Tensor) -> int | None:
        """The open file of common memory that the tensor is the whole of; None if it is none."""
        address = flat.data_ptr()
        if address in self._commons:
            return self._commons[address]
        number, offset = self.place(flat)
        return self._regions[number].shown if number is not None and not offset else None

    def join(self, nbytes: int, descriptor: int) -> Tensor:
        """Maps common memory; takes the descriptor over. uint8 ``[nbytes]``. It is left with the last tensor that lies in it."""
        mapping = mmap.mmap(descriptor, nbytes)
        memory = torch.frombuffer(mapping, dtype=torch.uint8)
        self._commons[memory.data_ptr()] = descriptor
        weakref.finalize(mapping, _leave, self._commons, memory.data_ptr(), descriptor).atexit = False
        return memory

    def show(self, flat: Tensor, descriptor: int) -> None:
        """The region that ``flat`` is the whole of shows common memory from now on; takes the descriptor over."""
        region = self._regions[self.place(flat)[0] or 0]
        region.show(descriptor)
        region.shown = descriptor
        os.ftruncate(region.fd, 0)  # the memory that nobody sees now

    def unshow(self, flat: Tensor) -> None:
        """Gives the region a copy of its own again, if it shows common memory."""
        number, _ = self.place(flat)
        if number is None or self._regions[number].shown is None:
            return
        region = self._regions[number]
        os.ftruncate(region.fd, region.nbytes)
        mine = mmap.mmap(region.fd, region.nbytes)
        torch.frombuffer(mine, dtype=torch.uint8).copy_(region.memory)
        region.show(region.fd)
        if region.shown is not None:
            os.close(region.shown)
        region.shown = None


def _leave(commons: dict[int, int], address: int, descriptor: int) -> None:
    if commons.get(address) == descriptor:  # else another mapping is there by now
        del commons[address]
    os.close(descriptor)


def make_file(nbytes: int, like: Tensor | None = None) -> int:
    """An open anonymous file of that size: zeros, or the bytes of ``like``."""
    fd = os.memfd_create("unisono", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, nbytes)
        if like is not None:
            mapped(os.dup(fd), nbytes).copy_(like.view(torch.uint8))
    except BaseException:
        os.close(fd)
        raise
    return fd


def mapped(fd: int, nbytes: int | None) -> Tensor:
    """Maps a file and closes it: uint8."""
    try:
        return torch.frombuffer(mmap.mmap(fd, nbytes or os.fstat(fd).st_size), dtype=torch.uint8)
    finally:
        os.close(fd)
