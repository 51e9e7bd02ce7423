"""``torch.ops.effk.quik_linear``: a linear layer whose weights and activations are 4 or 8 bits, but for outlier columns.

Formula. The columns of x are ``int_idx`` (base, K_b of them) and ``fp_idx`` (outliers, n_o), of W likewise. Of a row of
base columns in b = bits_a bits, h = 2**(b-1), L = 2**b - 1, lo and hi its least and greatest value, in fp32::

    mode "kernel"   s = max((hi - lo) / L, 1e-6)    z = lo          q = clip(rint((x - lo) * (1 / s)), 0, L) - h
    mode "sim"      lo = min(lo, 0), hi = max(hi, 0), both 0: -1 and 1
                    s = (hi - lo) / L               zi = rint(-lo / s), z = -s zi
                                                    q = clip(rint(x * (1 / s)) + zi, 0, L) - h

    A = q (u - 2**(bits_w-1))^T                     exact in int32; u: unsigned codes of the weight
    y = s w_scale A + (z + h s) w_reduced + bias + x[fp_idx] w_out^T          fp32, rounded once
    w_reduced[n] = w_scale[n] sum_k (u - 2**(bits_w-1))[n, k]                 see :func:`reduced`

"kernel" fits the range of the row, "sim" includes 0 and represents it exactly: the published accuracy tables are "sim",
the published speeds are "kernel".

Operations (library ``effk``):

    quik_quantize(x, int_idx, fp_idx, n_base, bits, mode) -> (qx, scale, zero, x_out)
    quik_int_matmul(qx, packed, f_out, n_base, bits_w, bits_a) -> acc                          int32 [M, f_out]
    quik_dequantize(acc, scale, zero, w_scale, w_reduced, y_in, bits_a, dtype) -> y            y_in added before rounding
    quik_linear(x, packed, w_scale, w_reduced, w_out, bias, int_idx, fp_idx, f_out, n_base, bits_w, bits_a, mode) -> y
    quik_multi_linear(x, packed, ...) -> [y]      several weights over one x, in lists: quantised once, same bits

Shapes and dtypes: x fp32, bf16 or fp16 ``[..., K]`` with any leading dimensions, made contiguous if it is not; M rows
when flattened. int_idx int32 ``[n_base]``, fp_idx int32 ``[K - n_base]``: every column once, in any order (runs of
neighbours are fast); both None: the first n_base columns are base. qx int8 ``[M, n_base]``, or uint8
``[M, ceil(n_base / 2)]`` in 4 bits, column 2j in the low nibble, two's complement. scale, zero fp32 ``[M]``. x_out
``[M, n_o]`` as x. packed uint8 and w_scale fp32 ``[tiles, 1, 16]``: as ``wq_pack`` returns them for a symmetric weight
``[f_out, n_base]`` of one group a row. w_reduced fp32 ``[f_out]``. w_out: ``dense_pack`` of ``[f_out, n_o]``, None when
n_o is 0. bias ``[f_out]``: fp32, bf16 or fp16. y_in ``[M, f_out]``: any of these. bits_w 4 or 8; bits_a 4, 8, or 16:
x is not quantised. dtype "fp32", "bf16", "fp16". n_base at most 131071, the bound of the accumulator.

Weight-only: with bits_a = 16, and in mode "kernel" with at most :data:`FEW_ROWS` rows of x, the same bytes run through
the kernels of :mod:`effk.ops.wq_linear`, which round no activation: faster there, and closer to the float layer. So in
mode "kernel" a row's result depends on which side of that limit M is; in mode "sim" it never does.

NaN or infinity in a row of x gives a row of NaN (weight-only: what IEEE arithmetic gives), other rows are as without it.
Otherwise results depend neither on the other rows nor on the number of threads; the integer product is exact on every
tier. M = 0 is fine.

Errors: RuntimeError naming the operation, the argument, what was expected and what came, before any work. There are no
gradients: the weight is frozen and the rounding of x has none; where one is asked for, backward raises. Under autocast
x is cast.

Source: Ashkboos, Markov, Frantar, Zhong, Wang, Ren, Hoefler, Alistarh, "QUIK: Towards End-to-End 4-Bit Inference on
Generative Large Language Models", 2023, arXiv:2310.09259, algorithm 1; mode "sim" as the released code simulates it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from effk.formats.wq import WqWeight

from . import autocast, dense_linear

MODES = ("kernel", "sim")
FEW_ROWS = 8  # csrc/ops/quik_linear/quik_linear.h


class PackedQuik(NamedTuple):
    """A weight as kernels read it, in the argument order of the operations."""

    packed: Tensor
    w_scale: Tensor
    w_reduced: Tensor
    w_out: Tensor | None
    f_out: int
    n_base: int
    bits_w: int


def reduced(base: WqWeight) -> Tensor:
    """``w_reduced`` of a symmetric weight with one scale a row: fp32 ``[n]``, from exact integer sums."""
    sums = base.codes().long().sum(1) - base.k * (1 << (base.bits - 1))
    return (base.scales[:, 0].double() * sums).float()


def pack(base: WqWeight, w_out: Tensor | None = None) -> PackedQuik:
    """The base columns and the outlier columns ``[n, n_o]`` (fp32, bf16 or fp16, kept; None for no outliers).

    Raises:
        ValueError: ``base`` is not symmetric with one scale a row in 4 or 8 bits, or the rows of ``w_out`` are others.
    """
    plain = base.zeros is None and base.codebook is None and base.out_ptr is None and base.group_size == 0
    if not plain or base.bits not in (4, 8):
        raise ValueError("pack: base: expected a symmetric weight of 4 or 8 bits with one scale a row and no outliers")
    if w_out is not None and (w_out.dim() != 2 or w_out.shape[0] != base.n):
        raise ValueError(f"pack: w_out: expected ({base.n}, n_o), got {tuple(w_out.shape)}")
    packed, scales, _, _ = torch.ops.effk.wq_pack(
        base.qweight, base.scales.float(), None, None, base.n, base.k, base.bits, 0
    )
    outliers = None if w_out is None or w_out.shape[1] == 0 else dense_linear.pack(w_out)
    return PackedQuik(packed, scales, reduced(base).to(scales.device), outliers, base.n, base.k, base.bits)


def linear(
    x: Tensor,
    weight: PackedQuik,
    bias: Tensor | None = None,
    int_idx: Tensor | None = None,
    fp_idx: Tensor | None = None,
    bits_a: int = 8,
    mode: str = "kernel",
) -> Tensor:
    """``torch.ops.effk.quik_linear`` on a :class:`PackedQuik`."""
    return torch.ops.effk.quik_linear(x, *weight[:4], bias, int_idx, fp_idx, *weight[4:], bits_a, mode)


def multi_linear(
    x: Tensor,
    weights: list[PackedQuik],
    biases: list[Tensor | None] | None = None,
    int_idx: Tensor | None = None,
    fp_idx: Tensor | None = None,
    bits_a: int = 8,
    mode: str = "kernel",
) -> list[Tensor]:
    """``torch.ops.effk.quik_multi_linear``: one result per weight, each as :func:`linear` would give it, bit for bit."""
    n_base = weights[0].n_base if weights else x.shape[-1]
    for i, weight in enumerate(weights):
        if weight.n_base != n_base:
            raise ValueError(
                f"multi_linear: weights[{i}]: expected n_base = {n_base} as weights[0] has, got {weight.n_base}"
            )
    columns = [[weight[i] for weight in weights] for i in range(7)]
    return torch.ops.effk.quik_multi_linear(
        x,
        *columns[:4],
        biases if biases is not None else [None] * len(weights),
        int_idx,
        fp_idx,
        columns[4],
        n_base,
        columns[6],
        bits_a,
        mode,
    )


# ---- float64 reference ---------------------------------------------------------------------------


def act_quant(x: Tensor, bits: int, mode: str = "kernel") -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scale and zero of the rows of ``x`` ``[M, K_b]`` (finite), in float64: what fp32 approximates.

    Returns:
        Stored codes (signed) float64 ``[M, K_b]``, scale ``[M]``, zero ``[M]``: x is about ``s (q + h) + z``.
    """
    x = x.double()
    top, half = 2**bits - 1, 2 ** (bits - 1)
    lo, hi = x.amin(1), x.amax(1)
    if mode == "kernel":
        s = ((hi - lo) / top).clamp(min=1e-6)
        q = ((x - lo[:, None]) / s[:, None]).round().clamp(0, top)
        return q - half, s, lo
    lo, hi = lo.clamp(max=0), hi.clamp(min=0)
    flat = (lo == 0) & (hi == 0)
    lo, hi = torch.where(flat, -1.0, lo), torch.where(flat, 1.0, hi)
    s = ((hi - lo) / top).clamp(min=torch.finfo(torch.float32).tiny)
    zi = (-lo / s).round()
    q = ((x / s[:, None]).round() + zi[:, None]).clamp(0, top)
    return q - half, s, -s * zi


CLIPS = tuple(1 - i / 100 for i in range(80))  # of the search; the exponent of its error is the released code's
CLIP_NORM = 2.4


def weight_quant(w: Tensor, bits: int, clip_search: bool = False) -> tuple[Tensor, Tensor]:
    """Symmetric codes of the rows of ``w`` ``[N, K_b]`` and their scales, float64.

    ``clip_search`` tries scales of 100 % to 21 % of the largest magnitude for the least ``sum |q s - w|**2.4``; ties
    keep the larger.

    Returns:
        Signed codes float64 ``[N, K_b]``, scales ``[N]``.
    """
    w = w.double()
    top = 2 ** (bits - 1) - 1
    largest = w.abs().amax(1)
    largest = torch.where(largest == 0, 1.0, largest)

    def codes(s: Tensor) -> Tensor:
        return (w / s[:, None]).round().clamp(-top - 1, top)

    best, scale = torch.full_like(largest, torch.inf), largest / top
    for p in CLIPS if clip_search else CLIPS[:1]:
        s = p * largest / top
        error = (codes(s) * s[:, None] - w).abs().pow(CLIP_NORM).sum(1)
        better = error < best
        best, scale = torch.where(better, error, best), torch.where(better, s, scale)
    return codes(scale), scale


def columns(int_idx: Tensor | None, fp_idx: Tensor | None, k: int, n_base: int) -> tuple[Tensor, Tensor]:
    """Base and outlier columns as index tensors, whether given or not."""
    order = torch.arange(k)
    base = order[:n_base] if int_idx is None else int_idx.long()
    return base, order[n_base:] if fp_idx is None else fp_idx.long()


def reference(
    x: Tensor,
    base: WqWeight,
    w_out: Tensor | None = None,
    bias: Tensor | None = None,
    int_idx: Tensor | None = None,
    fp_idx: Tensor | None = None,
    bits_a: int = 8,
    mode: str = "kernel",
    quantized: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Tensor:
    """The formula of this module in float64; independent of the kernels and their layout.

    Args:
        x: ``[..., K]``.
        quantized: codes (signed, as numbers), scale and zero of the rows, to be taken instead of :func:`act_quant`'s: a
            quotient next to a half rounds to either side in fp32, which is one step of the code.

    Returns:
        float64 ``[..., n]``.
    """
    rows = x.reshape(-1, x.shape[-1])
    in_base, outlier = columns(int_idx, fp_idx, x.shape[-1], base.k)
    codes = base.codes().double() - (1 << (base.bits - 1))
    scale = base.scales[:, 0].double()
    if bits_a == 16:
        y = rows[:, in_base].double() @ (codes * scale[:, None]).T
    else:
        q, s, z = (t.double() for t in quantized or act_quant(rows[:, in_base].float(), bits_a, mode))
        offset = z + 2 ** (bits_a - 1) * s
        y = (s[:, None] * scale) * (q @ codes.T) + offset[:, None] * (codes * scale[:, None]).sum(1)
    if w_out is not None:
        y = y + rows[:, outlier].double() @ w_out.double().T
    if bias is not None:
        y = y + bias.double()
    bad = torch.zeros(len(rows), dtype=torch.bool) if bits_a == 16 else ~rows.isfinite().all(1)
    y[bad] = torch.nan
    return y.reshape(*x.shape[:-1], base.n)


# ---- shapes, for torch.compile and export --------------------------------------------------------


def _rows(op: str, x: Tensor) -> int:
    torch._check(x.dim() >= 1, lambda: f"{op}: x: expected [..., K], got a scalar")
    m = 1
    for side in x.shape[:-1]:
        m = m * side
    return m


@torch.library.register_fake("effk::quik_quantize")
def _(x, int_idx, fp_idx, n_base, bits, mode):
    m = _rows("quik_quantize", x)
    return (
        x.new_empty((m, n_base if bits == 8 else (n_base + 1) // 2), dtype=torch.int8 if bits == 8 else torch.uint8),
        x.new_empty((m,), dtype=torch.float32),
        x.new_empty((m,), dtype=torch.float32),
        x.new_empty((m, x.shape[-1] - n_base)),
    )


@torch.library.register_fake("effk::quik_int_matmul")
def _(qx, packed, f_out, n_base, bits_w, bits_a):
    return qx.new_empty((qx.shape[0], f_out), dtype=torch.int32)


@torch.library.register_fake("effk::quik_dequantize")
def _(acc, scale, zero, w_scale, w_reduced, y_in, bits_a, dtype):
    names = {name: of for of, name in dense_linear.DTYPES.items()}
    torch._check(dtype in names, lambda: f"quik_dequantize: dtype: expected 'fp32', 'bf16' or 'fp16', got {dtype!r}")
    return acc.new_empty(acc.shape, dtype=names[dtype])


@torch.library.register_fake("effk::quik_linear")
def _(x, packed, w_scale, w_reduced, w_out, bias, int_idx, fp_idx, f_out, n_base, bits_w, bits_a, mode):
    _rows("quik_linear", x)
    return x.new_empty((*x.shape[:-1], f_out))


@torch.library.register_fake("effk::quik_multi_linear")
def _(x, packed, w_scale, w_reduced, w_out, bias, int_idx, fp_idx, f_out, n_base, bits_w, bits_a, mode):
    _rows("quik_multi_linear", x)
    return [x.new_empty((*x.shape[:-1], rows)) for rows in f_out]


# ---- no gradients, and autocast ------------------------------------------------------------------


def _no_gradient(op: str) -> None:
    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Nothing to keep."""

    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(f"{op}: gradients are not implemented: the weight is frozen and activations are rounded")

    torch.library.register_autograd(f"effk::{op}", backward, setup_context=setup)


for _op in ("quik_quantize", "quik_int_matmul", "quik_dequantize", "quik_linear", "quik_multi_linear"):
    _no_gradient(_op)
for _op in ("quik_quantize", "quik_linear", "quik_multi_linear"):
    autocast.cast_arguments(_op)
