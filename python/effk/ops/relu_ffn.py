"""``torch.ops.effk.relu_ffn``: feed-forward layers that read only the neurons whose gate is not zero, and
``input_sparse_linear``, a linear layer that reads only the columns of non-zero inputs.

Formula, for every token, with neuron i = row i of Wg and Wu and column i of Wd::

    g = Wg x + bg;   u = Wu x + bu                    (without Wg: g = u, and u is no factor)
    a_i = gate(g_i), h_i = a_i u_i                    where neuron i is active and inside the mask, else 0
    y = Wd h + bd;   nnz = number of active neurons

    gate            a                    active             param
    relu            max(g, 0)            not g <= 0
    relu2           max(g, 0)^2          not g <= 0
    shifted_relu    max(g - b, 0)        not g <= b         b, one or one a neuron
    fatrelu         g                    not g <= t         t >= 0, one or one a neuron
    drelu           max(g, 0)            not g <= 0         h = a max(u, 0); needs Wg
    silu_threshold  q = g sigmoid(g)     not |q| < t        t >= 0, one or one a neuron; approximates SiLU
    gelu_gauss      gelu_tanh(g - c)     not g <= c         p: c = mean(g) + p std(g), p the z value of the quantile
    top_k           g                    k largest |g|      k; ties to the lower index

Skipping is exact: y is, bit for bit, what ``mode="dense"`` gives, which reads every neuron of up and down. y depends neither
on the number of threads nor on the other tokens of the batch. Sums are fp32, ascending in i; NaN gates are active.
Groups of at most 8 tokens share one list (the union of their active neurons) and read each row once.

Operations (library ``effk``):

    relu_ffn_pack(w, transpose, rows, group) -> (rows, scales)
        w (f, d) fp32, bf16 or fp16, finite; (d, f) with transpose, as the down projection is stored. rows "fp32", "bf16",
        "fp16", "int8", "int4". int8 and int4: symmetric, scales fp32 (f, groups); groups of 32, 64 or 128 columns of one
        row, 0: the row. Rows are uint8 (f, bytes), layout csrc/formats/neuron.h.
    relu_ffn_unpack(rows, scales, kind, d) -> w fp32 (f, d)
    relu_ffn(x, wg, wu, wd, sg, su, sd, bg, bu, bd, rows, gate, param, mask, mask_group, mode) -> (y, nnz)
        x (..., d) fp32, bf16 or fp16; wg (or None), wu, wd rows of f neurons; biases fp32; param fp32; mask uint8
        (1 or tokens, bytes), bit j % 8 of byte j // 8 for neurons [j m, (j + 1) m), m = mask_group. mode "sparse", "dense", or
        "auto": sparse, unless so many neurons are active that reading all in order is faster (the same result).
        y like x, nnz int32 (tokens,).
    input_sparse_linear(x, w, scales, bias, threshold, rows, f_out) -> (y, nnz)
        y = sum_j x_j w_j + bias over not |x_j| <= threshold_j; w are rows of length f_out, one an input
        (relu_ffn_pack of the weight with transpose); threshold fp32, one or one an input, None: 0.

Errors: RuntimeError naming the operation, the argument, what was expected and what came, before any work. Packed rows do not
carry d: an x of another length is noticed where the bytes of a row or the number of groups differ.

Source: Mirzadeh et al., "ReLU Strikes Back", 2023 (arXiv:2310.04564), section 4; gates of ProSparse (2402.13516, FATReLU),
TurboSparse (2406.05955, dReLU), CATS (2404.08763), Spark Transformer (2506.06644, statistical top-k).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _C

ROWS = ("fp32", "bf16", "fp16", "int8", "int4")
GATES = ("relu", "relu2", "shifted_relu", "fatrelu", "drelu", "silu_threshold", "gelu_gauss", "top_k")
APPROXIMATE = ("silu_threshold",)


def groups(d: int, group: int) -> int:
    """Scales of a row of ``d`` columns."""
    return 1 if group == 0 else -(-d // group)


def row_bytes(rows: str, d: int) -> int:
    """Bytes of a packed row: whole units of 64."""
    per_unit = dict(zip(ROWS, (16, 32, 32, 64, 128), strict=True))[rows]
    return -(-d // per_unit) * 64


# ---- float64 reference ---------------------------------------------------------------------------


def reference_gate(
    g: Tensor, gate: str, param: Tensor | None = None, allowed: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """a and activity (bool) of gates ``(tokens, f)`` in float64; ``allowed`` limits whom top_k ranks."""
    p = torch.zeros(1, dtype=torch.float64) if param is None else param.double()
    zero = torch.zeros((), dtype=torch.float64)
    if gate in ("relu", "drelu"):
        a, active = g, ~(g <= 0)
    elif gate == "relu2":
        a, active = g * g, ~(g <= 0)
    elif gate == "shifted_relu":
        a, active = g - p, ~(g <= p)
    elif gate == "fatrelu":
        a, active = g, ~(g <= p)
    elif gate == "silu_threshold":
        a = g * torch.sigmoid(g)
        active = ~(a.abs() < p)
    elif gate == "gelu_gauss":
        over = g - (g.mean(-1, keepdim=True) + p * g.std(-1, correction=0, keepdim=True))
        a, active = torch.nn.functional.gelu(over, approximate="tanh"), ~(over <= 0)
    else:
        size = g.abs() if allowed is None else torch.where(allowed, g.abs(), -torch.inf)
        order = size.sort(dim=-1, descending=True, stable=True).indices
        active = torch.zeros_like(g, dtype=torch.bool).scatter(-1, order[:, : int(p)], True)
        a = g
    return torch.where(active, a, zero), active


def expand_mask(mask: Tensor, group: int, f: int) -> Tensor:
    """Bits of a mask as bool ``(rows, f)``."""
    bits = (mask[:, :, None] >> torch.arange(8)) & 1
    return bits.flatten(1).bool().repeat_interleave(group, dim=1)[:, :f]


def reference(
    x: Tensor,
    wg: Tensor | None,
    wu: Tensor,
    wd: Tensor,
    bg: Tensor | None = None,
    bu: Tensor | None = None,
    bd: Tensor | None = None,
    gate: str = "relu",
    param: Tensor | None = None,
    mask: Tensor | None = None,
    mask_group: int = 1,
) -> tuple[Tensor, Tensor]:
    """y and nnz in float64 from plain weights: wg, wu ``(f, d)``, wd ``(d, f)``, x ``(tokens, d)``."""

    def linear(w: Tensor, b: Tensor | None) -> Tensor:
        return torch.nn.functional.linear(x.double(), w.double(), None if b is None else b.double())

    u = linear(wu, bu)
    g = u if wg is None else linear(wg, bg)
    allowed = None if mask is None else expand_mask(mask, mask_group, wu.shape[0])
    a, active = reference_gate(g, gate, param, allowed)
    if allowed is not None:
        active = active & allowed
    factor = 1.0 if wg is None else torch.where(u <= 0, 0.0, u) if gate == "drelu" else u
    h = torch.where(active, a * factor, 0.0)
    return torch.nn.functional.linear(h, wd.double(), None if bd is None else bd.double()), active.sum(-1)


# ---- shapes, for torch.compile and export --------------------------------------------------------


@torch.library.register_fake("effk::relu_ffn_pack")
def _(w, transpose, rows, group):
    f, d = w.shape[1 if transpose else 0], w.shape[0 if transpose else 1]
    scales = (f, groups(d, group)) if rows in ("int8", "int4") else (0,)
    return w.new_empty((f, row_bytes(rows, d)), dtype=torch.uint8), w.new_empty(scales, dtype=torch.float32)


@torch.library.register_fake("effk::relu_ffn_unpack")
def _(rows, scales, kind, d):
    return rows.new_empty((rows.shape[0], d), dtype=torch.float32)


@torch.library.register_fake("effk::relu_ffn")
def _(x, wg, wu, wd, sg, su, sd, bg, bu, bd, rows, gate, param, mask, mask_group, mode):
    return x.new_empty(x.shape), x.new_empty((x.shape[:-1].numel(),), dtype=torch.int32)


@torch.library.register_fake("effk::input_sparse_linear")
def _(x, w, scales, bias, threshold, rows, f_out):
    return x.new_empty((*x.shape[:-1], f_out)), x.new_empty((x.shape[:-1].numel(),), dtype=torch.int32)


# ---- no gradients --------------------------------------------------------------------------------


def _no_gradient(name: str) -> None:
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(f"{name}: expected inputs without gradients, the operation has none")

    torch.library.register_autograd(f"effk::{name}", backward)


for _name in ("relu_ffn", "input_sparse_linear"):
    _no_gradient(_name)


def kernels() -> list[dict[str, Any]]:
    """The kernels there are, best first."""
    return [row for row in _C.kernel_table() if row["op"] == "relu_ffn"]
