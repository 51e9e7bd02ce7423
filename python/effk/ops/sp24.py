"""``torch.ops.effk.sp24_matmul``: int8 weights of which half the columns are zero in a pattern, stored as the other half.

    pattern "2:4"       of every 4 adjacent columns at most 2 are not zero
    pattern "pair4:8"   of every 4 adjacent pairs of columns at most 2 are not zero: what sparse 4-bit tensor cores take

Operations (library ``effk``):

    sp24_compress(w, pattern) -> (values, meta)
    sp24_decompress(values, meta, k, pattern) -> w            the inverse, exact
    sp24_matmul(qx, values, meta, pattern) -> acc             qx W^T, int32, exact

Shapes and dtypes: w int8 ``[n, k]``, k a multiple of 4 (2:4) or 8 (pair4:8), at most 131071. values int8 ``[n, k / 2]``:
the kept columns, ascending. meta uint8: 2 bits a kept column, the low bits of a byte first, ``[n, ceil(k / 8)]``; in
pairs 2 bits a kept pair, ``[n, ceil(k / 16)]``. So 5/8 of the bytes of w, in pairs 9/16. qx int8 ``[m, k]``, acc
``[m, n]``. Layout: ``csrc/ops/sp24/sp24.h``. On CPUs, which have no sparse dot products, the size is the gain: the
weight is expanded a few rows at a time, once for all rows of qx.

Errors: RuntimeError naming the operation, the argument, what was expected and what came, before any work; a row that
breaks the pattern is one.

Source: the 2:4 pattern of Mishra et al., "Accelerating Sparse Deep Neural Networks", 2021, arXiv:2104.08378; the
pair-wise one is that of the s4 operands of ``mma.sp`` in the PTX ISA; with quantisation: Ashkboos et al., "QUIK", 2023,
arXiv:2310.09259, section 4.3.
"""

from __future__ import annotations

import torch
from torch import Tensor

PATTERNS = ("2:4", "pair4:8")


def meta_bytes(k: int, pattern: str) -> int:
    """Bytes of a row of meta."""
    kept = k // 4 if pattern == "pair4:8" else k // 2
    return (kept + 3) // 4


def fits(w: Tensor, pattern: str) -> Tensor:
    """Of each row of ``w`` ``[n, k]``, whether it has the pattern: bool ``[n]``."""
    width = 2 if pattern == "pair4:8" else 1
    groups = (w != 0).unflatten(1, (-1, 4, width)).any(3)
    return (groups.sum(2) <= 2).all(1)


@torch.library.register_fake("effk::sp24_compress")
def _(w, pattern):
    torch._check(w.dim() == 2, lambda: f"sp24_compress: w: expected [n, k], got {list(w.shape)}")
    n, k = w.shape
    return w.new_empty((n, k // 2)), w.new_empty((n, meta_bytes(k, pattern)), dtype=torch.uint8)


@torch.library.register_fake("effk::sp24_decompress")
def _(values, meta, k, pattern):
    return values.new_empty((values.shape[0], k))


@torch.library.register_fake("effk::sp24_matmul")
def _(qx, values, meta, pattern):
    return qx.new_empty((qx.shape[0], values.shape[0]), dtype=torch.int32)
