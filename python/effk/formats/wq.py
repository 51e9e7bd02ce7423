"""The canonical low-bit weight, "effk-wq" version 1: what files hold, independent of any kernel.

A weight ``W[N, K]`` is ``b``-bit unsigned codes in groups of ``G`` columns of one row (``g = k // G``)::

    W[n, k] = scales[n, g] * (code[n, k] - zeros[n, g])     integer codes; zeros are 2**(b-1) when absent
            = scales[n, g] * codebook[code[n, k]]           codebook, shared or one table a row
            + outliers[n, k]                                 optional, sparse, fp16

Kernels read another layout (``csrc/formats/t16.h``) that ``torch.ops.effk.wq_pack`` builds from this one at load.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .bitstream import BITS, pack_codes, row_bytes, unpack_codes
from .codebooks import CODEBOOKS, FP4, NF2, NF3, NF4
from .csr import Csr, column_dtype, csr_from_mask, row_index, validate_csr

__all__ = [
    "BITS", "CODEBOOKS", "FP4", "GROUP_SIZES", "NF2", "NF3", "NF4", "TILE_ROWS", "VERSION", "Csr", "WqWeight",
    "csr_from_mask", "normalize_group_size", "num_groups", "pack_codes", "unpack_codes", "weight_bytes",
]  # fmt: skip

VERSION = 1
GROUP_SIZES = (0, 32, 64, 128, 256)  # 0: one group per row
TILE_ROWS = 16  # kernels work on tiles of 16 rows, so a weight is cut there
SCALE_DTYPES = (torch.float16, torch.float32)

_TENSORS = ("qweight", "scales", "zeros", "codebook", "out_ptr", "out_col", "out_val")
_OPTIONAL = _TENSORS[2:]


def normalize_group_size(group_size: int) -> int:
    """A legal group size with -1 written as 0 (both: one group per row).

    Raises:
        ValueError: the size is not supported.
    """
    size = 0 if group_size == -1 else group_size
    if size not in GROUP_SIZES or isinstance(size, bool):
        raise ValueError(f"group_size: expected one of {GROUP_SIZES} or -1, got {group_size!r}")
    return size


def num_groups(k: int, group_size: int) -> int:
    """Groups in a row of ``k`` columns; the last one may be short."""
    return 1 if group_size == 0 else -(-k // group_size)


def weight_bytes(
    n: int,
    k: int,
    bits: int,
    group_size: int,
    *,
    zeros: bool = False,
    scale_bytes: int = 2,
    codebook: str | None = None,
    outliers: int = 0,
) -> int:
    """Stored bytes of a weight before it exists; equals :meth:`WqWeight.nbytes` of one with these properties.

    ``codebook`` is None, "shared" or "row"; ``outliers`` is the number of sparse entries, where 0 means no sparse part
    at all (a part without entries would still store its row pointers).
    """
    groups = num_groups(k, normalize_group_size(group_size))
    total = n * row_bytes(k, bits) + n * groups * (scale_bytes + int(zeros))
    if codebook is not None:
        total += (n if codebook == "row" else 1) * (1 << bits) * 4
    if outliers:
        total += (n + 1) * 4 + outliers * (column_dtype(k).itemsize + 2)
    return total


@dataclass(frozen=True, eq=False)
class WqWeight:
    """One low-bit weight in canonical form.

    Attributes:
        n, k: rows (outputs) and columns (inputs).
        bits: 2, 3, 4 or 8.
        group_size: 32, 64, 128, 256, or 0 for one group per row.
        qweight: uint8 ``[n, ceil(k*bits/8)]``, each row a little-endian bit stream of codes.
        scales: fp16 or fp32 ``[n, groups]``; may be negative.
        zeros: uint8 ``[n, groups]`` zero-point codes, or None for the symmetric ``2**(bits-1)``.
        codebook: fp32 ``[2**bits]`` or ``[n, 2**bits]``, or None for integer codes; excludes ``zeros`` and 8 bits.
        out_ptr, out_col, out_val: sparse outliers added to the dense part (see :mod:`effk.formats.csr`), or all None.
    """

    n: int
    k: int
    bits: int
    group_size: int
    qweight: Tensor
    scales: Tensor
    zeros: Tensor | None = None
    codebook: Tensor | None = None
    out_ptr: Tensor | None = None
    out_col: Tensor | None = None
    out_val: Tensor | None = None

    @classmethod
    def from_codes(
        cls,
        codes: Tensor,
        scales: Tensor,
        *,
        bits: int,
        group_size: int,
        zeros: Tensor | None = None,
        codebook: Tensor | None = None,
        outliers: Csr | None = None,
    ) -> WqWeight:
        """Build and validate a weight from unpacked codes uint8 ``[N, K]``; other arguments as the attributes."""
        ptr, col, val = outliers if outliers is not None else (None, None, None)
        weight = cls(
            n=codes.shape[0],
            k=codes.shape[1],
            bits=bits,
            group_size=normalize_group_size(group_size),
            qweight=pack_codes(codes, bits),
            scales=scales.contiguous(),
            zeros=None if zeros is None else zeros.contiguous(),
            codebook=None if codebook is None else codebook.float().contiguous(),
            out_ptr=ptr,
            out_col=col,
            out_val=val,
        )
        weight.validate()
        return weight

    @property
    def groups(self) -> int:
        """Groups in a row."""
        return num_groups(self.k, self.group_size)

    @property
    def outliers(self) -> Csr | None:
        """The sparse part, or None."""
        return None if self.out_ptr is None else Csr(self.out_ptr, self.out_col, self.out_val)

    def codes(self) -> Tensor:
        """The codes, uint8 ``[n, k]``."""
        return unpack_codes(self.qweight, self.k, self.bits)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight as ``dtype`` ``[n, k]``, outliers included, by the formula of this module in plain PyTorch.

        Computed in float64 when ``dtype`` is float64 (exact but for the last product), otherwise in fp32.
        """
        work = torch.float64 if dtype == torch.float64 else torch.float32
        width = self.group_size or self.k
        codes = torch.nn.functional.pad(self.codes(), (0, self.groups * width - self.k)).reshape(
            self.n, self.groups, width
        )
        if self.codebook is None:
            zero = float(1 << (self.bits - 1)) if self.zeros is None else self.zeros.to(work).unsqueeze(-1)
            values = codes.to(work) - zero
        elif self.codebook.dim() == 1:
            values = self.codebook.to(work)[codes.long()]
        else:
            values = self.codebook.to(work).gather(1, codes.flatten(1).long()).reshape(codes.shape)
        dense = (values * self.scales.to(work).unsqueeze(-1)).flatten(1)[:, : self.k]
        if self.out_ptr is not None:
            dense = dense.contiguous()
            dense[row_index(self.out_ptr), self.out_col.long()] += self.out_val.to(work)
        return dense.to(dtype).contiguous()

    def nbytes(self) -> int:
        """True stored bytes: codes, scales, zeros, codebook, and the sparse part with its row pointers."""
        return sum(t.numel() * t.element_size() for t in self.to_state().values())

    def bits_per_weight(self) -> float:
        """True bits per weight, metadata and outliers included."""
        return 8 * self.nbytes() / (self.n * self.k)

    def geometry(self) -> dict[str, Any]:
        """The JSON record from which, with the tensors of :meth:`to_state`, the weight can be rebuilt and checked."""
        return {
            "n": self.n,
            "k": self.k,
            "bits": self.bits,
            "group_size": self.group_size,
            "scale_dtype": str(self.scales.dtype).removeprefix("torch."),
            "zeros": self.zeros is not None,
            "codebook": None if self.codebook is None else ("shared", "row")[self.codebook.dim() - 1],
            "outliers": None if self.out_val is None else self.out_val.numel(),
        }

    def to_state(self) -> dict[str, Tensor]:
        """The tensors that exist, by their stored names."""
        return {name: t for name in _TENSORS if (t := getattr(self, name)) is not None}

    @classmethod
    def from_state(cls, state: dict[str, Tensor], geometry: dict[str, Any]) -> WqWeight:
        """Inverse of :meth:`to_state` and :meth:`geometry`; checks that the two agree and validates the weight.

        Raises:
            ValueError: missing or surplus tensors, or any violation that :meth:`validate` names.
        """
        expected = set(state_shapes(geometry))
        if set(state) != expected:
            raise ValueError(f"state: expected tensors {sorted(expected)}, got {sorted(state)}")
        weight = cls(**{key: geometry[key] for key in ("n", "k", "bits", "group_size")}, **state)
        weight.validate()
        if weight.geometry() != dict(geometry):
            raise ValueError(f"state: expected geometry {dict(geometry)}, got {weight.geometry()}")
        return weight

    def validate(self) -> None:
        """Check every field against the format.

        Raises:
            ValueError: naming the field, what was expected and what came.
        """
        n, k, bits = self.n, self.k, self.bits
        if bits not in BITS:
            raise ValueError(f"bits: expected one of {BITS}, got {bits!r}")
        if self.group_size not in GROUP_SIZES:
            raise ValueError(f"group_size: expected one of {GROUP_SIZES}, got {self.group_size!r}")
        if n < 0 or k < 1:
            raise ValueError(f"n, k: expected n >= 0 and k >= 1, got {n} and {k}")
        _check("qweight", self.qweight, (torch.uint8,), (n, row_bytes(k, bits)))
        padding = row_bytes(k, bits) * 8 - k * bits
        if padding and n and int(self.qweight[:, -1].max()) >> (8 - padding):
            raise ValueError(f"qweight: expected {padding} zero padding bits at the end of each row, got others")
        _check("scales", self.scales, SCALE_DTYPES, (n, self.groups))
        if not bool(self.scales.isfinite().all()):
            raise ValueError("scales: expected finite values, got NaN or Inf")
        if self.zeros is not None:
            _check("zeros", self.zeros, (torch.uint8,), (n, self.groups))
            if self.zeros.numel() and int(self.zeros.max()) >= 1 << bits:
                raise ValueError(f"zeros: expected codes below {1 << bits}, got {int(self.zeros.max())}")
        if self.codebook is not None:
            if self.zeros is not None:
                raise ValueError("zeros: expected none beside a codebook, got some")
            if bits == 8:
                raise ValueError("codebook: expected none with 8 bits, got one")
            shape = (1 << bits,) if self.codebook.dim() == 1 else (n, 1 << bits)
            _check("codebook", self.codebook, (torch.float32,), shape)
            if not bool(self.codebook.isfinite().all()):
                raise ValueError("codebook: expected finite values, got NaN or Inf")
        sparse = [getattr(self, name) is not None for name in ("out_ptr", "out_col", "out_val")]
        if any(sparse) != all(sparse):
            raise ValueError("out_ptr, out_col, out_val: expected all or none, got some")
        if all(sparse):
            validate_csr(self.outliers, n, k)

    def rows(self, start: int, stop: int) -> WqWeight:
        """Rows ``[start, stop)`` as a weight of their own (views where possible).

        Raises:
            ValueError: a bound is not a multiple of 16 (``stop`` may also be ``n``), or out of range.
        """
        if not 0 <= start <= stop <= self.n or start % TILE_ROWS or (stop % TILE_ROWS and stop != self.n):
            raise ValueError(
                f"rows: expected 0 <= start <= stop <= {self.n} at multiples of {TILE_ROWS}, got [{start}, {stop})"
            )
        cut = {
            name: None if (t := getattr(self, name)) is None else t[start:stop]
            for name in ("qweight", "scales", "zeros")
        }
        if self.codebook is not None and self.codebook.dim() == 2:
            cut["codebook"] = self.codebook[start:stop]
        if self.out_ptr is not None:
            first, last = int(self.out_ptr[start]), int(self.out_ptr[stop])
            cut["out_ptr"] = self.out_ptr[start : stop + 1] - first
            cut["out_col"], cut["out_val"] = self.out_col[first:last], self.out_val[first:last]
        return dataclasses.replace(self, n=stop - start, **cut)

    def to(self, device: torch.device | str) -> WqWeight:
        """The same weight with all tensors on ``device``."""
        return dataclasses.replace(self, **{name: t.to(device) for name, t in self.to_state().items()})


def state_shapes(geometry: dict[str, Any]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every stored tensor of a weight with this :meth:`WqWeight.geometry`.

    Raises:
        ValueError: a field is missing, unknown, or not legal.
    """
    fields = {"n", "k", "bits", "group_size", "scale_dtype", "zeros", "codebook", "outliers"}
    if not isinstance(geometry, dict) or set(geometry) != fields:
        raise ValueError(f"geometry: expected fields {sorted(fields)}, got {sorted(geometry)}")
    n, k, bits, nnz = geometry["n"], geometry["k"], geometry["bits"], geometry["outliers"]
    for name, value in (("n", n), ("k", k), ("bits", bits), ("outliers", 0 if nnz is None else nnz)):
        if type(value) is not int or value < 0:
            raise ValueError(f"geometry: {name}: expected a non-negative integer, got {value!r}")
    if bits not in BITS:
        raise ValueError(f"geometry: bits: expected one of {BITS}, got {bits!r}")
    scale_dtypes = {str(d).removeprefix("torch."): d for d in SCALE_DTYPES}
    if geometry["scale_dtype"] not in scale_dtypes:
        raise ValueError(
            f"geometry: scale_dtype: expected one of {sorted(scale_dtypes)}, got {geometry['scale_dtype']!r}"
        )
    if geometry["codebook"] not in (None, "shared", "row") or type(geometry["zeros"]) is not bool:
        raise ValueError(f"geometry: codebook, zeros: got {geometry['codebook']!r}, {geometry['zeros']!r}")
    grid = (n, num_groups(k, normalize_group_size(geometry["group_size"])))
    shapes = {
        "qweight": ((n, row_bytes(k, bits)), torch.uint8),
        "scales": (grid, scale_dtypes[geometry["scale_dtype"]]),
    }
    if geometry["zeros"]:
        shapes["zeros"] = (grid, torch.uint8)
    if geometry["codebook"]:
        table = (1 << bits,)
        shapes["codebook"] = (table if geometry["codebook"] == "shared" else (n, *table), torch.float32)
    if nnz is not None:
        shapes |= {
            "out_ptr": ((n + 1,), torch.int32),
            "out_col": ((nnz,), column_dtype(k)),
            "out_val": ((nnz,), torch.float16),
        }
    return shapes


def _check(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...]) -> None:
    if tensor.dtype not in dtypes or tuple(tensor.shape) != shape:
        expected = " or ".join(str(d) for d in dtypes)
        raise ValueError(f"{name}: expected {expected} {list(shape)}, got {tensor.dtype} {list(tensor.shape)}")
