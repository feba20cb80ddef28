"""Memory for what a merge computes: one mapping, in huge pages where these are at hand, used again by the next merge.

The system zeroes fresh memory page by page as it is first written to. In pages of 4 KiB that takes twice as long as LoRA's
products. Huge pages take a sixth of it, but for those that a virtual machine has to ask its host for.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import time
import weakref
from collections.abc import Iterable

import torch

LINE = 64  # bytes; tensors begin at one, as those of torch's own allocator
SLOW = 1e-3  # seconds; small pages of the same size take less

# The mapping of the merged graph that was let go of last. The system may take its pages at any time (MADV_FREE).
spare: list[mmap.mmap] = []


class Memory:
    """Room for tensors like the given ones, each with a storage of its own; torch's memory where there are no mappings."""

    def __init__(self, tensors: Iterable[torch.Tensor]):
        size = sum(map(room, tensors))
        self.used, self.buffer, self.huge = 0, None, False
        if size and hasattr(mmap, "MADV_FREE") and hasattr(mmap, "MADV_HUGEPAGE"):
            self.mapping = mapping_of(size)
            # lives as long as the last tensor in it
            self.buffer = (ctypes.c_char * size).from_buffer(self.mapping)
            weakref.finalize(self.buffer, let_go, self.mapping).atexit = False
            self.huge = advised(self.mapping, mmap.MADV_HUGEPAGE)

    def like(self, tensor: torch.Tensor) -> torch.Tensor:
        """An uninitialised tensor, contiguous. Raises ValueError if there is no room left."""
        if self.buffer is None or not room(tensor):
            return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        start, self.used = self.used, self.used + room(tensor)
        if self.huge:
            begun = time.perf_counter()
            self.mapping[self.used - 1] = 0
            if time.perf_counter() - begun > SLOW:
                self.huge = False
                advised(self.mapping, mmap.MADV_NOHUGEPAGE)
        flat = torch.frombuffer(self.buffer, dtype=tensor.dtype, offset=start, count=tensor.numel())
        return flat.view(tensor.shape)


def room(tensor: torch.Tensor) -> int:
    """Bytes that a tensor takes in a mapping."""
    return math.ceil(tensor.nbytes / LINE) * LINE if tensor.device.type == "cpu" else 0


def mapping_of(size: int) -> mmap.mmap:
    """The spare mapping if it is large enough, else a new one."""
    with contextlib.suppress(IndexError):
        if len(found := spare.pop()) >= size:
            return found
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def let_go(mapping: mmap.mmap) -> None:
    """Nothing reads it any more."""
    if advised(mapping, mmap.MADV_FREE):
        spare[:] = [mapping]


def advised(mapping: mmap.mmap, advice: int) -> bool:
    """Whether the system takes the advice; one without huge pages does not."""
    with contextlib.suppress(OSError):
        mapping.madvise(advice)
        return True
    return False
