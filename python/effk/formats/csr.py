"""Sparse FP16 outliers of a weight, in compressed sparse rows.

``out_ptr`` int32 ``[N + 1]``, ``out_col`` uint16 ``[nnz]`` (int32 when ``K > 65536``; ascending in a row), ``out_val``
fp16 ``[nnz]``. The value is *added* to the dense weight, so a full-precision outlier sits on a dense code that means
zero ("replace", LLM-MQ section 3 of the paper), and a correction sits on any code ("residual").
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

MAX_UINT16_COLUMNS = 65536


class Csr(NamedTuple):
    """The three arrays of a sparse matrix; the field names are those of the stored tensors without ``out_``."""

    ptr: Tensor
    col: Tensor
    val: Tensor


def column_dtype(k: int) -> torch.dtype:
    """The stored type of column indices for ``k`` columns."""
    return torch.uint16 if k <= MAX_UINT16_COLUMNS else torch.int32


def csr_from_mask(values: Tensor, mask: Tensor) -> Csr:
    """The entries of ``values`` ``[N, K]`` where ``mask`` (bool ``[N, K]``) is set, rounded to fp16.

    Raises:
        ValueError: shapes differ, the mask is not boolean, or a value is not finite in fp16.
    """
    if mask.dtype != torch.bool or values.dim() != 2 or mask.shape != values.shape:
        raise ValueError(
            f"csr_from_mask: mask: expected bool {list(values.shape)}, got {mask.dtype} {list(mask.shape)}"
        )
    rows, cols = mask.nonzero(as_tuple=True)
    val = values[rows, cols].to(torch.float16)
    if not bool(val.isfinite().all()):
        raise ValueError(
            "csr_from_mask: values: expected outliers that are finite in fp16, got a larger or non-finite one"
        )
    ptr = torch.zeros(values.shape[0] + 1, dtype=torch.int32, device=values.device)
    ptr[1:] = mask.sum(dim=1).cumsum(0).to(torch.int32)
    return Csr(ptr, cols.to(torch.int32).to(column_dtype(values.shape[1])), val)


def row_index(ptr: Tensor) -> Tensor:
    """The row of every entry, int64 ``[nnz]``."""
    counts = (ptr[1:] - ptr[:-1]).long()
    return torch.repeat_interleave(torch.arange(counts.numel(), device=ptr.device), counts)


def tile_order(ptr: Tensor, tile_rows: int = 16) -> Tensor:
    """Where kernels keep the entries: position of each of theirs among the entries in row order, int64 ``[nnz]``.

    Entries of a tile of rows lie rank by rank: the first of each row that has one, rows ascending, then the second ones,
    and so on (``csrc/formats/t16.h``). ``in_tiles = in_rows[tile_order(ptr)]``.
    """
    rows = row_index(ptr)
    if rows.numel() == 0:
        return rows
    rank = torch.arange(rows.numel(), device=ptr.device) - ptr[:-1].long()[rows]
    ranks = int(rank.max()) + 1
    return ((rows // tile_rows * ranks + rank) * tile_rows + rows % tile_rows).argsort()


def reorder(entries: Tensor, order: Tensor, inverse: bool = False) -> Tensor:
    """``entries[order]``, or what had to be there before it was so reordered; any 16-bit type included."""
    plain = entries.view(torch.int16) if entries.element_size() == 2 else entries  # uint16 cannot be indexed
    moved = torch.empty_like(plain).scatter_(0, order, plain) if inverse else plain[order]
    return moved.view(entries.dtype)


def validate_csr(csr: Csr, n: int, k: int) -> None:
    """Raise ``ValueError`` naming the field unless the arrays form a legal ``[n, k]`` matrix."""
    ptr, col, val = csr
    if ptr.dtype != torch.int32 or list(ptr.shape) != [n + 1]:
        raise ValueError(f"out_ptr: expected int32 [{n + 1}], got {ptr.dtype} {list(ptr.shape)}")
    if int(ptr[0]) != 0 or bool((ptr[1:] < ptr[:-1]).any()):
        raise ValueError("out_ptr: expected row pointers that start at 0 and never fall, got others")
    nnz = int(ptr[-1])
    if col.dtype != column_dtype(k) or list(col.shape) != [nnz]:
        raise ValueError(f"out_col: expected {column_dtype(k)} [{nnz}], got {col.dtype} {list(col.shape)}")
    if val.dtype != torch.float16 or list(val.shape) != [nnz]:
        raise ValueError(f"out_val: expected torch.float16 [{nnz}], got {val.dtype} {list(val.shape)}")
    if nnz == 0:
        return
    columns = col.to(torch.int64)
    if int(columns.min()) < 0 or int(columns.max()) >= k:
        raise ValueError(f"out_col: expected columns in [0, {k}), got {int(columns.min())}..{int(columns.max())}")
    flat = row_index(ptr) * k + columns
    if bool((flat[1:] <= flat[:-1]).any()):
        raise ValueError("out_col: expected strictly ascending columns within each row, got others")
    if not bool(val.isfinite().all()):
        raise ValueError("out_val: expected finite values, got NaN or Inf")
