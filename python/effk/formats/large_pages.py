"""Memory in large pages for packed weights that PyTorch makes or loads; packing operations have their own
(``csrc/torch/tensor.h``).

A product with one row is bound by reading its weight, and in pages of 4 KiB, each a miss of the address cache, reading is
slower.
"""

from __future__ import annotations

import contextlib
import mmap

import numpy as np
import torch
from torch import Tensor

PAGE = 2 << 20


def reserve(nbytes: int) -> Tensor:
    """uint8 ``[nbytes]``, aligned to a large page. What does not fill a last one is in small ones, or up to 2 MiB would be
    wasted."""
    # Private: the system gives shared memory no large pages unless it was told to (shmem_enabled).
    block = mmap.mmap(-1, nbytes + PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory = np.frombuffer(block, dtype=np.uint8)
    start = -memory.ctypes.data % PAGE
    if hasattr(mmap, "MADV_HUGEPAGE") and nbytes >= PAGE:
        with contextlib.suppress(OSError):  # a hint; some kernels do not know it
            block.madvise(mmap.MADV_HUGEPAGE, start, nbytes // PAGE * PAGE)
    return torch.from_numpy(memory[start : start + nbytes])


def empty_like(t: Tensor) -> Tensor:
    """A contiguous tensor of the shape and dtype of ``t``; in large pages on the CPU, from 2 MiB on."""
    if t.device.type != "cpu" or t.nbytes < PAGE:
        return torch.empty_like(t, memory_format=torch.contiguous_format)
    return reserve(t.nbytes).view(t.dtype).view(t.shape)


def moved(t: Tensor) -> Tensor:
    """A copy of ``t`` there, or ``t`` itself if it is contiguous and too small for a large page or not on the CPU."""
    if t.device.type != "cpu" or t.nbytes < PAGE:
        return t.contiguous()
    return empty_like(t).copy_(t)
