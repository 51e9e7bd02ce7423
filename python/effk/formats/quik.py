"""The canonical weight of ``quik_linear``, "effk-quik" version 1: low-bit base columns and 16-bit outlier columns.

A weight ``W[N, K]`` is cut by columns. ``outliers`` columns, listed in ``fp_idx``, are stored in 16 bits; the others, in
ascending order, are signed codes of 4 or 8 bits with one scale a row::

    W[n, int_idx[j]] = scales[n] * (code[n, j] - 2**(bits-1))        base: a symmetric WqWeight with one group a row
    W[n, fp_idx[j]]  = w_out[n, j]

With a ``pattern`` at least half of the base weights are zero, two of every four ("2:4") or two pairs of every four
("pair4:8"); only the codes of the rest are stored, with 2 bits each, or each pair, that say which they are
(:mod:`effk.ops.sp24`): 3 bits a weight instead of 4 in the first, 2.5 in the second.

Scales are fp32: products with them are summed over thousands of columns. With ``rotated`` all this is said of ``W R``, the
weight for inputs ``x R`` (:mod:`.hadamard`).

Source: Ashkboos et al., "QUIK", 2023 (arXiv:2310.09259); the released code's layout is read by :func:`from_released`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..ops import sp24
from .bitstream import pack_codes, row_bytes, unpack_codes
from .hadamard import rotate
from .wq import WqWeight, _check

VERSION = 1
BITS = (4, 8)
OUTLIER_DTYPES = (torch.float16, torch.bfloat16)
MAX_BASE = 131071  # columns: sums of 128 * 128 then stay below 2^31

_BASE_TENSORS = ("qweight", "scales")


def weight_bytes(n: int, k: int, bits: int, outliers: int, pattern: str | None = None) -> int:
    """Stored bytes of a weight before it exists; equals :meth:`QuikWeight.nbytes`.

    ``bits`` bits a base weight (rows of whole bytes; with a pattern half of them and their places), 16 an outlier weight, an
    fp32 scale a row, an int32 index an outlier column.
    """
    return n * sum(_row(k - outliers, bits, pattern)) + 4 * n + outliers * (2 * n + 4)


@dataclass(frozen=True, eq=False)
class QuikWeight:
    """One weight in canonical form.

    Attributes:
        base: the base columns: 4 or 8 bits, one group a row, fp32 scales, no zero points, table or sparse part.
        fp_idx: int32 ``[outliers]``, distinct columns of ``W``.
        w_out: fp16 or bf16 ``[n, outliers]``, in the order of ``fp_idx``.
        k: columns of ``W``.
        rotated: whether the columns are those of ``W R``.
        pattern: None, "2:4" or "pair4:8", of the base columns.
    """

    base: WqWeight
    fp_idx: Tensor
    w_out: Tensor
    k: int
    rotated: bool = False
    pattern: str | None = None

    @classmethod
    def from_codes(
        cls,
        codes: Tensor,
        scales: Tensor,
        values: Tensor,
        fp_idx: Tensor,
        *,
        bits: int,
        dtype: torch.dtype = torch.float16,
        rotated: bool = False,
        pattern: str | None = None,
    ) -> QuikWeight:
        """Build and validate a weight.

        Args:
            codes: unsigned, uint8 ``[N, K]``; those of outlier columns are ignored.
            scales: fp32 ``[N]``.
            values: floating ``[N, K]``, of which the outlier columns are stored as ``dtype``.
            fp_idx: integers ``[outliers]``.
        """
        columns = base_columns(codes.shape[1], fp_idx)
        base = WqWeight.from_codes(codes[:, columns], scales.float().unsqueeze(1), bits=bits, group_size=0)
        w_out = values[:, fp_idx.long()].to(dtype).contiguous()
        weight = cls(base, fp_idx.to(torch.int32), w_out, codes.shape[1], rotated, pattern)
        weight.validate()
        return weight

    @property
    def n(self) -> int:
        """Rows (outputs)."""
        return self.base.n

    @property
    def bits(self) -> int:
        """Of a base weight."""
        return self.base.bits

    @property
    def outliers(self) -> int:
        """Outlier columns."""
        return self.fp_idx.numel()

    @property
    def int_idx(self) -> Tensor:
        """int32 ``[k - outliers]``, the base columns of ``W``, ascending."""
        return base_columns(self.k, self.fp_idx).to(torch.int32)

    def reduced(self) -> Tensor:
        """fp32 ``[n]``: the sum of every row's dequantised base weights, from an exact sum of codes."""
        codes = self.base.codes().to(torch.int64).sum(1) - self.base.k * (1 << (self.bits - 1))
        return (codes.double() * self.base.scales[:, 0].double()).float()

    def stored(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight whose columns are stored, ``[n, k]``: ``W``, or ``W R`` if ``rotated``. Exact in float64."""
        dense = torch.empty((self.n, self.k), dtype=dtype, device=self.w_out.device)
        dense[:, self.int_idx.long()] = self.base.dequantize(dtype)
        dense[:, self.fp_idx.long()] = self.w_out.to(dtype)
        return dense

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """``W`` as ``dtype`` ``[n, k]``; exact in float64 unless ``rotated``."""
        return rotate(self.stored(dtype), inverse=True) if self.rotated else self.stored(dtype)

    def nbytes(self) -> int:
        """True stored bytes; see :func:`weight_bytes`."""
        return weight_bytes(self.n, self.k, self.bits, self.outliers, self.pattern)

    def bits_per_weight(self) -> float:
        """True bits per weight, scales and outlier columns included."""
        return 8 * self.nbytes() / (self.n * self.k)

    def geometry(self) -> dict[str, Any]:
        """The JSON record from which, with the tensors of :meth:`to_state`, the weight can be rebuilt and checked."""
        return {
            "n": self.n,
            "k": self.k,
            "bits": self.bits,
            "outliers": self.outliers,
            "out_dtype": str(self.w_out.dtype).removeprefix("torch."),
            "rotated": self.rotated,
            "pattern": self.pattern,
        }

    def to_state(self) -> dict[str, Tensor]:
        """The stored tensors by name; fp_idx and w_out with outlier columns only, meta with a pattern only."""
        state = {name: getattr(self.base, name) for name in _BASE_TENSORS}
        if self.pattern is not None:
            values, meta = torch.ops.effk.sp24_compress(self._signed(), self.pattern)
            state["qweight"] = pack_codes((values + _half(self.bits)).to(torch.uint8), self.bits)
            state["meta"] = meta
        return state | ({"fp_idx": self.fp_idx, "w_out": self.w_out} if self.outliers else {})

    @classmethod
    def from_state(cls, state: dict[str, Tensor], geometry: dict[str, Any]) -> QuikWeight:
        """Inverse of :meth:`to_state` and :meth:`geometry`; checks that the two agree and validates the weight.

        Raises:
            ValueError: missing or surplus tensors, or any violation that :meth:`validate` names.
        """
        expected = state_shapes(geometry)
        if set(state) != set(expected):
            raise ValueError(f"state: expected tensors {sorted(expected)}, got {sorted(state)}")
        n, k, bits, outliers = (geometry[key] for key in ("n", "k", "bits", "outliers"))
        qweight = state["qweight"]
        if geometry["pattern"] is not None:
            values = (unpack_codes(qweight, (k - outliers) // 2, bits).to(torch.int16) - _half(bits)).to(torch.int8)
            dense = torch.ops.effk.sp24_decompress(values, state["meta"], k - outliers, geometry["pattern"])
            qweight = pack_codes((dense.to(torch.int16) + _half(bits)).to(torch.uint8), bits)
        base = WqWeight(n, k - outliers, bits, 0, qweight, state["scales"])
        none = {
            "fp_idx": torch.empty(0, dtype=torch.int32),
            "w_out": torch.empty((n, 0), dtype=_dtypes()[geometry["out_dtype"]]),
        }
        rest = none | {name: state[name] for name in none if name in state}
        weight = cls(base, rest["fp_idx"], rest["w_out"], k, geometry["rotated"], geometry["pattern"])
        weight.validate()
        if "meta" in state and not all(torch.equal(state[name], t) for name, t in weight.to_state().items()):
            raise ValueError("meta: expected the ascending places of the stored codes, got others")
        return weight

    def validate(self) -> None:
        """Check every field against the format.

        Raises:
            ValueError: naming the field, what was expected and what came.
        """
        base = self.base
        if base.bits not in BITS:
            raise ValueError(f"base.bits: expected one of {BITS}, got {base.bits!r}")
        if base.group_size != 0 or base.scales.dtype != torch.float32:
            raise ValueError(
                f"base: expected one group a row with fp32 scales, got group_size {base.group_size} and {base.scales.dtype}"
            )
        if base.zeros is not None or base.codebook is not None or base.out_val is not None:
            raise ValueError("base: expected no zero points, codebook or sparse part, got one of them")
        base.validate()
        if not (base.scales > 0).all():
            raise ValueError("base.scales: expected positive values, got others")
        check_columns(self.k, self.outliers, base.bits)
        if base.k + self.outliers != self.k:
            raise ValueError(
                f"k: expected {base.k} base and {self.outliers} outlier columns to make {self.k}, "
                f"got {base.k + self.outliers}"
            )
        _check("fp_idx", self.fp_idx, (torch.int32,), (self.outliers,))
        if self.outliers:
            low, high = int(self.fp_idx.min()), int(self.fp_idx.max())
            if low < 0 or high >= self.k:
                raise ValueError(f"fp_idx: expected columns in [0, {self.k}), got {low}..{high}")
            if (distinct := self.fp_idx.unique().numel()) != self.outliers:
                raise ValueError(f"fp_idx: expected {self.outliers} distinct columns, got {distinct}")
        _check("w_out", self.w_out, OUTLIER_DTYPES, (self.n, self.outliers))
        if not bool(self.w_out.isfinite().all()):
            raise ValueError("w_out: expected finite values, got NaN or Inf")
        if type(self.rotated) is not bool:
            raise ValueError(f"rotated: expected a boolean, got {self.rotated!r}")
        check_pattern(self.pattern, base.k)
        if self.pattern is not None and not bool(sp24.fits(self._signed(), self.pattern).all()):
            raise ValueError(f"base: expected the zeros of pattern {self.pattern}, got a row with too few")

    def _signed(self) -> Tensor:
        return (self.base.codes().to(torch.int16) - _half(self.bits)).to(torch.int8)

    def to(self, device: torch.device | str) -> QuikWeight:
        """The same weight with all tensors on ``device``."""
        return dataclasses.replace(
            self, base=self.base.to(device), fp_idx=self.fp_idx.to(device), w_out=self.w_out.to(device)
        )


def check_columns(k: int, outliers: int, bits: int) -> None:
    """Raise ``ValueError`` unless ``outliers`` of ``k`` columns leave base columns that can be packed and summed."""
    base = k - outliers
    if not 0 <= outliers < k:
        raise ValueError(f"outliers: expected 0 to {k - 1} of {k} columns, got {outliers}")
    if bits == 4 and base % 2:
        raise ValueError(f"outliers: expected an even number of base columns for 4 bits, got {k} - {outliers} = {base}")
    if base > MAX_BASE:
        raise ValueError(f"k: expected at most {MAX_BASE} base columns, got {base}")


def check_pattern(pattern: str | None, base: int) -> None:
    """Raise ``ValueError`` unless ``pattern`` exists and ``base`` columns are whole units of it."""
    if pattern is None:
        return
    if pattern not in sp24.PATTERNS:
        raise ValueError(f"pattern: expected None or one of {sp24.PATTERNS}, got {pattern!r}")
    unit = 8 if pattern == "pair4:8" else 4
    if base % unit:
        raise ValueError(f"pattern: expected a multiple of {unit} base columns for {pattern}, got {base}")


def base_columns(k: int, fp_idx: Tensor) -> Tensor:
    """int64: the columns of ``range(k)`` that are not in ``fp_idx``, ascending."""
    base = torch.ones(k, dtype=torch.bool, device=fp_idx.device)
    base[fp_idx.long()] = False
    return base.nonzero().flatten()


def state_shapes(geometry: dict[str, Any]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every stored tensor of a weight with this :meth:`QuikWeight.geometry`.

    Raises:
        ValueError: a field is missing, unknown, or not legal.
    """
    fields = {"n", "k", "bits", "outliers", "out_dtype", "rotated", "pattern"}
    if not isinstance(geometry, dict) or set(geometry) != fields:
        raise ValueError(f"geometry: expected fields {sorted(fields)}, got {sorted(geometry)}")
    n, k, bits, outliers = (geometry[name] for name in ("n", "k", "bits", "outliers"))
    for name, value in (("n", n), ("k", k), ("bits", bits), ("outliers", outliers)):
        if type(value) is not int or value < 0:
            raise ValueError(f"geometry: {name}: expected a non-negative integer, got {value!r}")
    if bits not in BITS:
        raise ValueError(f"geometry: bits: expected one of {BITS}, got {bits!r}")
    try:
        check_columns(k, outliers, bits)
        check_pattern(geometry["pattern"], k - outliers)
    except ValueError as error:
        raise ValueError(f"geometry: {error}") from None
    if type(geometry["rotated"]) is not bool or geometry["out_dtype"] not in _dtypes():
        raise ValueError(f"geometry: out_dtype, rotated: got {geometry['out_dtype']!r}, {geometry['rotated']!r}")
    codes, places = _row(k - outliers, bits, geometry["pattern"])
    shapes = {"qweight": ((n, codes), torch.uint8), "scales": ((n, 1), torch.float32)}
    if geometry["pattern"] is not None:
        shapes["meta"] = ((n, places), torch.uint8)
    if outliers:
        shapes["fp_idx"] = ((outliers,), torch.int32)
        shapes["w_out"] = ((n, outliers), _dtypes()[geometry["out_dtype"]])
    return shapes


# ---- the released layout ---------------------------------------------------------------------------


def from_released(
    int_weight: Tensor,
    weights_scales: Tensor,
    fp_weight: Tensor,
    int_indices: Tensor,
    fp_indices: Tensor,
    bits: int,
) -> QuikWeight:
    """A layer of the released code as a canonical weight; its base columns, there by rising activation, are sorted.

    Args:
        int_weight: 4 bits: uint8 ``[N, K_b / 2]`` with column 2j in the low nibble of byte j and 2j + 1 in the high one,
            two's complement; 8 bits: int8 ``[N, K_b]``.
        weights_scales: ``[N, 1]``, any floating dtype.
        fp_weight: ``[N, outliers]``, fp16 or bf16.
        int_indices, fp_indices: the columns, in the order of the weights.

    Raises:
        ValueError: shapes or dtypes do not fit, or the indices are not a partition of the columns.
    """
    if bits not in BITS:
        raise ValueError(f"from_released: bits: expected one of {BITS}, got {bits!r}")
    n, base = weights_scales.shape[0], int_indices.numel()
    if bits == 4:
        _check("from_released: int_weight", int_weight, (torch.uint8,), (n, base // 2))
        codes = unpack_nibbles(int_weight)
    else:
        _check("from_released: int_weight", int_weight, (torch.int8,), (n, base))
        codes = int_weight
    k = base + fp_indices.numel()
    if not torch.equal(torch.cat((int_indices, fp_indices)).long().sort().values, torch.arange(k)):
        raise ValueError(f"from_released: indices: expected each of {k} columns once, got others")
    codes = (codes.to(torch.int16) + (1 << (bits - 1))).to(torch.uint8)[:, int_indices.argsort()]
    packed = WqWeight.from_codes(codes, weights_scales.reshape(n, 1).float(), bits=bits, group_size=0)
    weight = QuikWeight(packed, fp_indices.to(torch.int32), fp_weight.contiguous(), k)
    weight.validate()
    return weight


def unpack_nibbles(packed: Tensor) -> Tensor:
    """uint8 ``[..., J]`` of two's complement nibbles, low one first, as int8 ``[..., 2 J]``."""
    both = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)
    return (both ^ 8).to(torch.int8) - 8


def pack_nibbles(codes: Tensor) -> Tensor:
    """Inverse of :func:`unpack_nibbles`; int8 ``[..., 2 J]`` in [-8, 7]."""
    low, high = (codes[..., i::2].to(torch.uint8) & 15 for i in (0, 1))
    return low | (high << 4)


def split_meta(meta: Tensor) -> tuple[Tensor, Tensor]:
    """The released code's activation vector ``[2 M]``, scale and zero by turns, as two fp32 ``[M]``."""
    if meta.dim() != 1 or meta.numel() % 2:
        raise ValueError(f"split_meta: meta: expected [2 M], got {list(meta.shape)}")
    return meta[0::2].float(), meta[1::2].float()


def _row(base: int, bits: int, pattern: str | None) -> tuple[int, int]:
    """Bytes of a row's codes and of their places."""
    if pattern is None:
        return row_bytes(base, bits), 0
    return row_bytes(base // 2, bits), sp24.meta_bytes(base, pattern)


def _half(bits: int) -> int:
    return 1 << (bits - 1)


def _dtypes() -> dict[str, torch.dtype]:
    return {str(d).removeprefix("torch."): d for d in OUTLIER_DTYPES}
