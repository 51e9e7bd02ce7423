"""The canonical sparse weight, "effk-bitmask" version 1: row by row, a bit for every weight and the values that are kept.

    bitmask  uint8 [n, ceil(k / 8)]   bit i of byte j: column 8 j + i is kept; bits beyond k are 0
    values   fp32, bf16 or int8 [stored]   row by row, columns ascending
    row_ptr  int64 [n + 1]            where a row begins in values
    scales   fp32 [n, groups]         int8 only: W = code * scale; a group is ``group`` columns (a multiple of 64) or the row

This is the content of compressed-tensors' "sparse-bitmask" (there ``compressed``, ``bitmask``, ``row_offsets``). What kernels
read is made from it when a model is loaded (``csrc/formats/bitmask.h``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

VERSION = 1
DTYPES = {32: torch.float32, 16: torch.bfloat16, 8: torch.int8}  # bits of a value
MAX_COLUMNS = 131071  # of int8 values: sums of 127 * 128 then stay below 2^31
_MOST = 1 << 40  # weights of one layer, far beyond any


def groups(k: int, group: int) -> int:
    """Scales of a row."""
    return 1 if group == 0 else -(-k // group)


def weight_bytes(n: int, k: int, bits: int, stored: int, group: int = 0) -> int:
    """Bytes of a weight with ``stored`` values before it exists; equals :meth:`BitmaskTensor.nbytes`."""
    return stored * bits // 8 + n * (-(-k // 8)) + 8 * (n + 1) + (4 * n * groups(k, group) if bits == 8 else 0)


def pack_bits(keep: Tensor) -> Tensor:
    """bool ``[n, k]`` to uint8 ``[n, ceil(k / 8)]``, the first column in the lowest bit."""
    n, k = keep.shape
    padded = torch.nn.functional.pad(keep.to(torch.uint8), (0, -k % 8)).view(n, -1, 8)
    return (padded << torch.arange(8, dtype=torch.uint8)).sum(2, dtype=torch.uint8)


def unpack_bits(bitmask: Tensor, k: int) -> Tensor:
    """The inverse: bool ``[n, k]``."""
    bits = (bitmask[:, :, None] >> torch.arange(8, dtype=torch.uint8)) & 1
    return bits.flatten(1)[:, :k].bool()


def expand(values: Tensor, bitmask: Tensor, k: int) -> Tensor:
    """The dense ``[n, k]`` of ``values`` at the set bits, zeros elsewhere.

    Raises:
        ValueError: not as many values as bits, or bits beyond column ``k``.
    """
    keep = unpack_bits(bitmask, bitmask.shape[1] * 8)
    if bool(keep[:, k:].any()):
        raise ValueError(f"bitmask: expected no bits beyond column {k}, got some")
    keep = keep[:, :k]
    if int(keep.sum()) != values.numel():
        raise ValueError(f"bitmask: expected {values.numel()} bits, as many as values, got {int(keep.sum())}")
    dense = torch.zeros(keep.shape, dtype=values.dtype)
    return dense.masked_scatter_(keep, values)


@dataclass(frozen=True, eq=False)
class BitmaskTensor:
    """One weight in canonical form; see the module's docstring."""

    n: int
    k: int
    values: Tensor
    bitmask: Tensor
    row_ptr: Tensor
    scales: Tensor | None = None
    group: int = 0

    @classmethod
    def from_dense(cls, w: Tensor, scales: Tensor | None = None, group: int = 0) -> BitmaskTensor:
        """From ``w [n, k]`` fp32 or bf16, or int8 codes with their scales: what is not zero is kept."""
        keep = w != 0
        row_ptr = torch.cat((torch.zeros(1, dtype=torch.int64), keep.sum(1).cumsum(0)))
        weight = cls(*w.shape, w[keep], pack_bits(keep), row_ptr, scales, group)
        weight.validate()
        return weight

    @property
    def bits(self) -> int:
        """Of a value."""
        return self.values.element_size() * 8

    @property
    def sparsity(self) -> float:
        """The share of zeros."""
        return 1 - self.values.numel() / (self.n * self.k)

    def dense(self) -> Tensor:
        """``[n, k]`` as stored: codes, or the weight."""
        return expand(self.values, self.bitmask, self.k)

    def dequantize(self) -> Tensor:
        """The weight as fp32 ``[n, k]``."""
        dense = self.dense().float()
        if self.scales is None:
            return dense
        return dense * self.scales.repeat_interleave(self.group or self.k, 1)[:, : self.k]

    def nbytes(self) -> int:
        """Stored bytes."""
        return weight_bytes(self.n, self.k, self.bits, self.values.numel(), self.group)

    def bits_per_weight(self) -> float:
        """Stored bits, everything included, by weights, zeros included."""
        return self.nbytes() * 8 / (self.n * self.k)

    def geometry(self) -> dict[str, int]:
        """What the shapes of the tensors follow from, for the record of a model."""
        return {"n": self.n, "k": self.k, "bits": self.bits, "group_size": self.group, "stored": self.values.numel()}

    def to_state(self) -> dict[str, Tensor]:
        """The tensors by their stored names."""
        state = {"values": self.values, "bitmask": self.bitmask, "row_ptr": self.row_ptr}
        return state if self.scales is None else state | {"scales": self.scales}

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor], geometry: Mapping[str, Any]) -> BitmaskTensor:
        """The inverse; raises ValueError unless the tensors belong together."""
        scales = state.get("scales")
        tensors = (state["values"], state["bitmask"], state["row_ptr"])
        weight = cls(geometry["n"], geometry["k"], *tensors, scales, geometry["group_size"])
        weight.validate()
        return weight

    def validate(self) -> None:
        """Raise ``ValueError`` unless shapes, dtypes, bits, rows and values belong together."""
        shapes = state_shapes(self.geometry())
        for name, (shape, dtype) in shapes.items():
            t = getattr(self, name)
            if t is None or tuple(t.shape) != shape or t.dtype != dtype:
                got = "none" if t is None else f"{t.dtype} {list(t.shape)}"
                raise ValueError(f"bitmask: {name}: expected {dtype} {list(shape)}, got {got}")
        if self.bits != 8 and self.scales is not None:
            raise ValueError("bitmask: scales: expected none beside floating-point values, got some")
        keep = unpack_bits(self.bitmask, self.bitmask.shape[1] * 8)
        if bool(keep[:, self.k :].any()):
            raise ValueError(f"bitmask: bitmask: expected no bits beyond column {self.k}, got some")
        begins = torch.cat((torch.zeros(1, dtype=torch.int64), keep.sum(1).cumsum(0)))
        if not torch.equal(begins, self.row_ptr) or int(begins[-1]) != self.values.numel():
            raise ValueError(
                "bitmask: row_ptr: expected the number of bits before each row and of all values, got others"
            )
        for name in ("values", "scales"):
            t = getattr(self, name)
            if t is not None and t.is_floating_point() and not bool(t.isfinite().all()):
                raise ValueError(f"bitmask: {name}: expected finite numbers, got others")


def state_shapes(geometry: Mapping[str, Any]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Names, shapes and dtypes of the stored tensors.

    Raises:
        ValueError: an illegal geometry.
    """
    fields = {"n", "k", "bits", "group_size", "stored"}
    if set(geometry) != fields or any(type(geometry[name]) is not int for name in fields):
        raise ValueError(f"bitmask: expected integers {sorted(fields)}, got {dict(geometry)}")
    n, k, bits, group, stored = (geometry[name] for name in ("n", "k", "bits", "group_size", "stored"))
    if n < 1 or k < 1 or n * k > _MOST:
        raise ValueError(f"bitmask: n, k: expected at least 1 and at most 2^40 together, got {n}, {k}")
    if bits not in DTYPES:
        raise ValueError(f"bitmask: bits: expected one of {tuple(DTYPES)}, got {bits}")
    if bits == 8 and k > MAX_COLUMNS:
        raise ValueError(f"bitmask: k: expected at most {MAX_COLUMNS} for 8 bits, got {k}")
    if group and (bits != 8 or group < 0 or group % 64 or group >= k):
        raise ValueError(f"bitmask: group_size: expected 0, or with 8 bits a multiple of 64 below k, got {group}")
    if not 0 <= stored <= n * k:
        raise ValueError(f"bitmask: stored: expected 0 to {n * k}, got {stored}")
    shapes = {
        "values": ((stored,), DTYPES[bits]),
        "bitmask": ((n, -(-k // 8)), torch.uint8),
        "row_ptr": ((n + 1,), torch.int64),
    }
    return shapes | ({"scales": ((n, groups(k, group)), torch.float32)} if bits == 8 else {})
