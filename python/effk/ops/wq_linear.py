"""``torch.ops.effk.wq_linear``: a linear layer whose weight is stored in 2, 3, 4 or 8 bits.

Formula, for a weight ``W[N, K]`` of unsigned ``b``-bit codes ``q`` in groups of ``G`` columns, ``g = k // G``::

    W[n, k] = s[n, g] * (q[n, k] - z[n, g])        integer codes; z = 2**(b-1) where there are no zeros
            = s[n, g] * T[q[n, k]]                 codebook T, shared or one a row
    y = x W^T + S x^T + bias                       S: sparse outliers, fp16, added to the dense part

``compute`` says how ``x`` meets the codes. ``"float"``: exact codes times floating-point activations, fp32 accumulation
(for bf16 activations through BF16 dot products, where the CPU has them). ``"int8"``: activations rounded to int8 in
groups of ``min(G, 128)`` columns, integer products; results change by about 1 %, so a recipe has to ask for it.

Operations (library ``effk``; ``weight`` stands for packed, scales, zeros, codebook, out_ptr, out_col, out_val):

    wq_pack(qweight, scales, zeros, codebook, n, k, bits, group_size)       canonical -> kernel layout, see :func:`pack`
    wq_unpack(packed, scales, zeros, n, k, bits, group_size)                the inverse
    wq_dequantize(weight, n, k, bits, group_size)                           W with its outliers, fp32 [n, k]
    wq_linear(x, weight, bias, n, k, bits, group_size, compute)             [..., k] -> [..., n], dtype of x
    wq_multi_linear(x, weights, ..., compute)                               several weights over one x, in lists
    wq_linear_backward(grad, weight, n, k, bits, group_size)                grad @ W: [..., n] -> [..., k], as grad

Shapes and dtypes: x fp32, bf16 or fp16, any leading dimensions, also none and empty ones; made contiguous if it is not.
packed uint8 ``[tiles, chunks, chunk_bytes]``, scales fp16 or fp32 ``[tiles, groups, 16]``, zeros uint8 of that shape,
codebook fp32 ``[2**bits]`` or ``[tiles, 2**bits, 16]`` (not at 8 bits), out_ptr int32 ``[n + 1]``, out_col uint16
``[nnz]`` (int32 when k > 65536) and out_val fp16 ``[nnz]`` in the order of tiles, bias fp32, bf16 or fp16 ``[n]``; all of
them contiguous.
Layout: ``csrc/formats/t16.h``. group_size is 32, 64, 128, 256, or 0 for one group per row.

Errors: RuntimeError naming the operation, the argument, what was expected and what came, before any work.

A row of the result depends on neither the other rows nor the number of threads. In the int8 form a row of x with NaN or
infinity gives a row of NaN, and one codebook a row is an error. wq_linear is differentiable with respect to x and bias,
wq_multi_linear with respect to x; weights are frozen. Under autocast x is cast.

Source: group-wise weight-only quantisation as in FineQuant (Kim et al., 2023, arXiv:2308.09723), sparse outliers beside
the quantised weight as in LLM-MQ (Li et al., 2023) and SqueezeLLM (Kim et al., 2023, arXiv:2306.07629).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from effk.formats import csr
from effk.formats.wq import WqWeight, num_groups

from . import autocast

TILE_ROWS = 16
MAX_ACT_GROUP = 128  # int8: activations are rounded in groups of at most this many columns


class PackedWeight(NamedTuple):
    """A weight as kernels read it, in the argument order of the operations."""

    packed: Tensor
    scales: Tensor
    zeros: Tensor | None
    codebook: Tensor | None
    out_ptr: Tensor | None
    out_col: Tensor | None
    out_val: Tensor | None
    n: int
    k: int
    bits: int
    group_size: int

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """The seven tensors."""
        return self[:7]

    @property
    def geometry(self) -> tuple[int, int, int, int]:
        """n, k, bits, group_size."""
        return self[7:]


def pack(weight: WqWeight) -> PackedWeight:
    """Canonical form to kernel layout; bit for bit inverted by :func:`unpack`."""
    geometry = (weight.n, weight.k, weight.bits, weight.group_size)
    packed, scales, zeros, codebook = torch.ops.effk.wq_pack(
        weight.qweight, weight.scales, weight.zeros, weight.codebook, *geometry
    )
    return PackedWeight(
        packed,
        scales,
        None if weight.zeros is None else zeros,
        None if weight.codebook is None else codebook,
        *_move_outliers(weight.out_ptr, weight.out_col, weight.out_val, inverse=False),
        *geometry,
    )


def unpack(packed: PackedWeight) -> WqWeight:
    """Kernel layout to canonical form."""
    qweight, scales, zeros = torch.ops.effk.wq_unpack(packed.packed, packed.scales, packed.zeros, *packed.geometry)
    codebook = packed.codebook
    if codebook is not None and codebook.dim() == 3:  # [tiles, 2**bits, 16] -> [n, 2**bits]
        codebook = codebook.transpose(1, 2).reshape(-1, codebook.shape[1])[: packed.n].contiguous()
    return WqWeight(
        *packed.geometry,
        qweight,
        scales,
        None if packed.zeros is None else zeros,
        codebook,
        *_move_outliers(packed.out_ptr, packed.out_col, packed.out_val, inverse=True),
    )


def _move_outliers(
    ptr: Tensor | None, col: Tensor | None, val: Tensor | None, inverse: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    if ptr is None or col is None or val is None:
        return ptr, col, val
    order = csr.tile_order(ptr, TILE_ROWS)
    return ptr, csr.reorder(col, order, inverse), csr.reorder(val, order, inverse)


def linear(x: Tensor, weight: PackedWeight, bias: Tensor | None = None, compute: str = "float") -> Tensor:
    """``torch.ops.effk.wq_linear`` on a :class:`PackedWeight`."""
    return torch.ops.effk.wq_linear(x, *weight.tensors, bias, *weight.geometry, compute)


def multi_linear(
    x: Tensor, weights: list[PackedWeight], biases: list[Tensor | None] | None = None, compute: str = "float"
) -> list[Tensor]:
    """``torch.ops.effk.wq_multi_linear``: one result per weight, each as :func:`linear` would give it, bit for bit."""
    k = weights[0].k if weights else x.shape[-1]
    for i, weight in enumerate(weights):
        if weight.k != k:
            raise ValueError(f"multi_linear: weights[{i}]: expected k = {k} as weights[0] has, got {weight.k}")
    columns = list(map(list, zip(*(weight.tensors for weight in weights), strict=True))) or [[]] * 7
    return torch.ops.effk.wq_multi_linear(
        x,
        *columns,
        biases if biases is not None else [None] * len(weights),
        [weight.n for weight in weights],
        k,
        [weight.bits for weight in weights],
        [weight.group_size for weight in weights],
        compute,
    )


# ---- float64 reference ---------------------------------------------------------------------------


def reference(x: Tensor, weight: WqWeight, bias: Tensor | None = None, compute: str = "float") -> Tensor:
    """The formulas of this module in float64, from the canonical form; independent of the kernels and their layout.

    The only fp32 steps are those that define the int8 form: rounding the activations, and rounding a codebook to bytes.

    Args:
        x: ``[..., k]``.

    Returns:
        float64 ``[..., n]``.
    """
    rows = x.reshape(-1, weight.k)
    if compute == "float":
        y = rows.double() @ dense_values(weight).mul_(expand_groups(weight.scales.double(), weight)).T
    else:
        y = _reference_int8(rows.float(), weight)
    if weight.out_ptr is not None:
        y += rows.double() @ outlier_matrix(weight).T
    if bias is not None:
        y += bias.double()
    return y.reshape(*x.shape[:-1], weight.n)


def dense_values(weight: WqWeight) -> Tensor:
    """Codes as numbers, before the scales: ``q - z`` or ``T[q]``, float64 ``[n, k]``."""
    codes = weight.codes()
    if weight.codebook is None:
        if weight.zeros is None:
            return codes.double() - (1 << (weight.bits - 1))
        return codes.double() - expand_groups(weight.zeros.double(), weight)
    tables = weight.codebook.double().expand(weight.n, -1)
    return tables.gather(1, codes.long())


def expand_groups(values: Tensor, weight: WqWeight) -> Tensor:
    """One value per group, ``[n, groups]``, repeated for every column: ``[n, k]``."""
    return values.repeat_interleave(weight.group_size or weight.k, dim=1)[:, : weight.k]


def outlier_matrix(weight: WqWeight) -> Tensor:
    """The sparse part as a dense float64 ``[n, k]``."""
    out = torch.zeros(weight.n, weight.k, dtype=torch.float64)
    for row in range(weight.n):
        first, last = int(weight.out_ptr[row]), int(weight.out_ptr[row + 1])
        out[row, weight.out_col[first:last].long()] = weight.out_val[first:last].double()
    return out


def quantize_activations(rows: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """int8 codes of ``rows`` fp32 ``[m, k]`` and the scale of each activation group, as the int8 form defines them.

    Per group of ``width = min(group_size or 128, 128)`` columns, in fp32: ``v = max|x|``, ``xq = rint(x * (127 / v))``,
    scale ``v / 127``. A group whose v is below 2**-119 (127 / v would not be finite) counts as zero; one with NaN or
    infinity has a NaN scale.

    Returns:
        xq float64 ``[m, k]`` (integers), scale float64 ``[m, groups]``.
    """
    width = min(group_size or MAX_ACT_GROUP, MAX_ACT_GROUP)
    m, k = rows.shape
    groups = num_groups(k, width)
    padded = torch.nn.functional.pad(rows, (0, groups * width - k)).reshape(m, groups, width)
    top = padded.abs().amax(dim=-1)
    finite = padded.isfinite().all(dim=-1)
    usable = finite & (top >= 2.0**-119)
    largest = torch.full_like(top, 127.0)  # a tensor, because number / tensor is reciprocal * number: another rounding
    inverse = torch.where(usable, largest / top, 0.0)
    codes = torch.where(usable[..., None], (padded * inverse[..., None]).round(), 0.0)
    scale = torch.where(usable, top / largest, 0.0).double()
    scale[~finite] = torch.nan
    return codes.double().reshape(m, -1)[:, :k], scale


def _reference_int8(rows: Tensor, weight: WqWeight) -> Tensor:
    codes, scale = quantize_activations(rows, weight.group_size)
    values = dense_values(weight)
    if weight.codebook is not None:  # a table becomes bytes on the grid of its largest entry
        top = weight.codebook.abs().amax(dim=-1, keepdim=True)
        largest = torch.full_like(top, 127.0)
        bytes_ = (weight.codebook * (largest / top)).round()
        tables = torch.where(top > 0, bytes_.double() * (top / largest).double(), 0.0).expand(weight.n, -1)
        values = tables.gather(1, weight.codes().long())
    values = values * expand_groups(weight.scales.double(), weight)
    width = min(weight.group_size or MAX_ACT_GROUP, MAX_ACT_GROUP)
    x = codes * scale.repeat_interleave(width, dim=1)[:, : weight.k]
    return x @ values.T


# ---- shapes, for torch.compile and export --------------------------------------------------------


def _ceil_div(a: int, b: int) -> int:
    return (a + b - 1) // b


def _absent(t: Tensor | None) -> bool:
    return t is None or t.shape == (0,)


@torch.library.register_fake("effk::wq_pack")
def _(qweight, scales, zeros, codebook, n, k, bits, group_size):
    tiles, grid = _ceil_div(n, TILE_ROWS), (_ceil_div(n, TILE_ROWS), num_groups(k, group_size), TILE_ROWS)
    chunk_k, chunk_bytes = (32, 192) if bits == 3 else (32 // bits, 64)
    table: tuple[int, ...] = (0,)
    if not _absent(codebook):
        table = (1 << bits,) if codebook.dim() == 1 else (tiles, 1 << bits, TILE_ROWS)
    return (
        qweight.new_empty((tiles, _ceil_div(k, chunk_k), chunk_bytes)),
        scales.new_empty(grid),
        qweight.new_empty((0,) if _absent(zeros) else grid),
        scales.new_empty(table, dtype=torch.float32),
    )


@torch.library.register_fake("effk::wq_unpack")
def _(packed, scales, zeros, n, k, bits, group_size):
    grid = (n, num_groups(k, group_size))
    return (
        packed.new_empty((n, _ceil_div(k * bits, 8))),
        scales.new_empty(grid),
        packed.new_empty((0,) if _absent(zeros) else grid),
    )


@torch.library.register_fake("effk::wq_dequantize")
def _(packed, scales, zeros, codebook, out_ptr, out_col, out_val, n, k, bits, group_size):
    return scales.new_empty((n, k), dtype=torch.float32)


def _row_shape(op: str, name: str, x: Tensor, k: int) -> tuple[int, ...]:
    torch._check(x.dim() >= 1 and x.shape[-1] == k, lambda: f"{op}: {name}: expected [..., {k}], got {list(x.shape)}")
    return x.shape[:-1]


@torch.library.register_fake("effk::wq_linear")
def _(x, packed, scales, zeros, codebook, out_ptr, out_col, out_val, bias, n, k, bits, group_size, compute):
    return x.new_empty((*_row_shape("wq_linear", "x", x, k), n))


@torch.library.register_fake("effk::wq_multi_linear")
def _(x, packed, scales, zeros, codebook, out_ptr, out_col, out_val, bias, n, k, bits, group_size, compute):
    return [x.new_empty((*_row_shape("wq_multi_linear", "x", x, k), rows)) for rows in n]


@torch.library.register_fake("effk::wq_linear_backward")
def _(grad, packed, scales, zeros, codebook, out_ptr, out_col, out_val, n, k, bits, group_size):
    return grad.new_empty((*_row_shape("wq_linear_backward", "grad", grad, n), k))


# ---- gradient with respect to x ------------------------------------------------------------------


def _keep_weight(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, *tensors, _bias, n, k, bits, group_size, _compute = inputs
    ctx.save_for_backward(*tensors)
    ctx.geometry = (n, k, bits, group_size)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    grad_x = None
    if ctx.needs_input_grad[0]:
        grad_x = torch.ops.effk.wq_linear_backward(grad, *ctx.saved_tensors, *ctx.geometry)
    grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.needs_input_grad[8] else None
    return grad_x, *[None] * 7, grad_bias, *[None] * 5


torch.library.register_autograd("effk::wq_linear", _backward, setup_context=_keep_weight)


def _keep_weights(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    _, *columns, bias, n, k, bits, group_size, _compute = inputs
    # What PyTorch wants for an argument without gradient: a list of None for a list of tensors, else one None.
    ctx.nothing = [[None] * len(c) if all(isinstance(t, Tensor) for t in c) else None for c in (*columns, bias)]
    ctx.weights = [
        (tensors, (rows, k, b, group)) for *tensors, rows, b, group in zip(*columns, n, bits, group_size, strict=True)
    ]


def _multi_backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    grad_x = None
    for grad, (tensors, geometry) in zip(grads, ctx.weights, strict=True):
        if grad is not None:
            part = torch.ops.effk.wq_linear_backward(grad, *tensors, *geometry)
            grad_x = part if grad_x is None else grad_x + part
    return grad_x, *ctx.nothing, *[None] * 5


torch.library.register_autograd("effk::wq_multi_linear", _multi_backward, setup_context=_keep_weights)


# ---- autocast: as a linear layer, x takes the autocast dtype; the weight and the bias stay as they are

autocast.cast_arguments("wq_linear")
autocast.cast_arguments("wq_multi_linear")
