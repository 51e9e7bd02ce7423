"""``torch.ops.effk.wq_grouped_linear``: the experts of a mixture, each a low-bit weight, over rows sorted by expert.

Formula, for ``E`` experts with weights ``W_e[N, K]`` as :mod:`effk.ops.wq_linear` defines them (integer codes)::

    y[m] = x[m] W_e^T + bias[e]      for offsets[e] <= m < offsets[e + 1]

Every row is bit for bit what ``wq_linear`` with that expert's weight gives; all experts are one parallel region.

Operations (library ``effk``; ``weight`` stands for packed, scales, zeros):

    wq_grouped_linear(x, offsets, weight, bias, n, k, bits, group_size, compute)      [T, k] -> [T, n], dtype of x
    wq_grouped_linear_backward(grad, offsets, weight, n, k, bits, group_size)         grad @ W_e: [T, n] -> [T, k], as grad

Shapes and dtypes: x fp32, bf16 or fp16 ``[T, k]``, rows sorted by expert; offsets int32 ``[E + 1]``, ascending from 0 to T,
equal neighbours for an expert without rows. packed uint8 ``[E, tiles, chunks, chunk_bytes]``, scales fp16 or fp32
``[E, tiles, groups, 16]``, zeros uint8 of that shape or None, bias ``[E, n]`` fp32, bf16, fp16 or None. Layout of an expert:
``csrc/formats/t16.h``. group_size is 32, 64, 128, 256, or 0 for one group per row. ``compute`` as in ``wq_linear``.

Errors: RuntimeError naming the operation, the argument, what was expected and what came, before any work; among them
offsets that descend, do not begin at 0 or do not end at T.

A row of the result depends on neither the other rows nor the number of threads. Differentiable with respect to x and bias.
Under autocast x is cast.

Source: tokens sorted by expert before one grouped product, as in "Who Says Elephants Can't Run" (Kim et al., 2022,
arXiv:2211.10017), for the low-bit experts of MoQE (Kim, Fahim and Awadalla, 2023, arXiv:2310.02410).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from effk.formats.wq import WqWeight

from . import autocast
from . import wq_linear as wq


class PackedExperts(NamedTuple):
    """The experts' weights as kernels read them, in the argument order of the operations."""

    packed: Tensor
    scales: Tensor
    zeros: Tensor | None
    n: int
    k: int
    bits: int
    group_size: int

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """The three tensors."""
        return self[:3]

    @property
    def geometry(self) -> tuple[int, int, int, int]:
        """n, k, bits, group_size."""
        return self[3:]


def pack(weight: WqWeight, experts: int) -> PackedExperts:
    """Canonical form ``[experts * n, k]``, the experts' rows one after the other, to kernel layout.

    Raises:
        ValueError: rows that are no multiple of ``experts``, a codebook or outliers, which experts do not have.
    """
    if experts < 1 or weight.n % experts:
        raise ValueError(f"wq_grouped_linear.pack: experts: expected a divisor of {weight.n} rows, got {experts}")
    if weight.codebook is not None or weight.out_ptr is not None:
        raise ValueError("wq_grouped_linear.pack: weight: expected integer codes alone, got a codebook or outliers")
    n = weight.n // experts
    geometry = (n, weight.k, weight.bits, weight.group_size)
    if n % wq.TILE_ROWS == 0:  # whole tiles: the packed stack is the packed experts, in one allocation with large pages
        whole = wq.pack(weight)
        packed, scales, zeros = (None if t is None else t.view(experts, -1, *t.shape[1:]) for t in whole.tensors[:3])
        return PackedExperts(packed, scales, zeros, *geometry)
    parts = [wq.pack(expert_of(weight, experts, expert)).tensors[:3] for expert in range(experts)]
    packed, scales, zeros = (None if c[0] is None else torch.stack(c) for c in zip(*parts, strict=True))
    return PackedExperts(packed, scales, zeros, *geometry)


def unpack(experts: PackedExperts) -> WqWeight:
    """The exact inverse of :func:`pack`."""
    parts: list[Sequence[Tensor]] = []
    for expert in range(experts.packed.shape[0]):
        zeros = None if experts.zeros is None else experts.zeros[expert]
        parts.append(torch.ops.effk.wq_unpack(experts.packed[expert], experts.scales[expert], zeros, *experts.geometry))
    qweight, scales, zeros = (torch.cat(column) for column in zip(*parts, strict=True))
    n, k, bits, group_size = experts.geometry
    return WqWeight(len(parts) * n, k, bits, group_size, qweight, scales, None if experts.zeros is None else zeros)


def grouped_linear(
    x: Tensor, offsets: Tensor, experts: PackedExperts, bias: Tensor | None = None, compute: str = "float"
) -> Tensor:
    """``torch.ops.effk.wq_grouped_linear`` on :class:`PackedExperts`."""
    return torch.ops.effk.wq_grouped_linear(x, offsets, *experts.tensors, bias, *experts.geometry, compute)


def expert_of(weight: WqWeight, experts: int, expert: int) -> WqWeight:
    """One expert's rows of a canonical weight ``[experts * n, k]``."""
    n = weight.n // experts
    rows = slice(expert * n, (expert + 1) * n)
    zeros = None if weight.zeros is None else weight.zeros[rows]
    return WqWeight(n, weight.k, weight.bits, weight.group_size, weight.qweight[rows], weight.scales[rows], zeros)


# ---- float64 reference ---------------------------------------------------------------------------


def reference(
    x: Tensor, offsets: Sequence[int], weight: WqWeight, bias: Tensor | None = None, compute: str = "float"
) -> Tensor:
    """The formula of this module in float64, from the canonical form ``[E * n, k]``: float64 ``[T, n]``."""
    experts = len(offsets) - 1
    y = torch.empty(x.shape[0], weight.n // experts, dtype=torch.float64)
    for expert in range(experts):
        rows = slice(offsets[expert], offsets[expert + 1])
        if rows.start == rows.stop:
            continue
        own = None if bias is None else bias[expert]
        y[rows] = wq.reference(x[rows], expert_of(weight, experts, expert), own, compute)
    return y


# ---- shapes, gradient, autocast ------------------------------------------------------------------


def _rows(op: str, name: str, x: Tensor, k: int) -> int:
    torch._check(x.dim() == 2 and x.shape[-1] == k, lambda: f"{op}: {name}: expected [rows, {k}], got {list(x.shape)}")
    return x.shape[0]


@torch.library.register_fake("effk::wq_grouped_linear")
def _(x, offsets, packed, scales, zeros, bias, n, k, bits, group_size, compute):
    return x.new_empty((_rows("wq_grouped_linear", "x", x, k), n))


@torch.library.register_fake("effk::wq_grouped_linear_backward")
def _(grad, offsets, packed, scales, zeros, n, k, bits, group_size):
    return grad.new_empty((_rows("wq_grouped_linear_backward", "grad", grad, n), k))


def _keep_weight(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, offsets, packed, scales, zeros, bias, *geometry, _compute = inputs
    ctx.save_for_backward(offsets, packed, scales, zeros)
    ctx.geometry = geometry
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    offsets, *tensors = ctx.saved_tensors
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = torch.ops.effk.wq_grouped_linear_backward(grad, offsets, *tensors, *ctx.geometry)
    if ctx.needs_input_grad[5]:
        experts = offsets.shape[0] - 1
        rows = torch.arange(grad.shape[0], dtype=torch.int32, device=grad.device)
        owner = torch.searchsorted(offsets[1:], rows, right=True)
        grad_bias = grad.new_zeros(experts, grad.shape[1]).index_add(0, owner, grad).to(ctx.bias_dtype)
    return grad_x, *[None] * 4, grad_bias, *[None] * 5


torch.library.register_autograd("effk::wq_grouped_linear", _backward, setup_context=_keep_weight)

autocast.cast_arguments("wq_grouped_linear")
