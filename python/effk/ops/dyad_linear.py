"""``torch.ops.effk.dyad_linear``: a linear layer, its weight the sum of two permuted block-diagonal matrices (DYAD).

Formula, for ``wl`` and ``wu`` of n blocks ``(n, d_out, d_in)``, f_in = n d_in, f_out = n d_out, y = act(W x + bias)::

    W = B(wl) + R(wu)        B: W[d*d_out + o, d*d_in + i] = wl[d, o, i]

    variant   R puts wu[d, o, i] at          the two components read and write
    it        [d*d_out + o, i*n + d]         x in blocks and x by residues mod n;  y in blocks
    ot        [o*n + d, d*d_in + i]          x in blocks;                          y in blocks, y by residues
    dt        [o*n + d, i*n + d]             x in blocks and by residues;          y in blocks, y by residues

Where both components have an entry at the same place, W is their sum. Of the multiply-adds and parameters of a dense
layer 2/n remain. "-CAT", the concatenated evaluation of "it", is how "it" is computed. act: see
:mod:`effk.ops.activation`.

Operations (library ``effk``):

    dyad_linear(x, wl, wu, bias, variant, layout, act) -> y
    dyad_linear_backward(gy, x, wl, wu, variant, layout, mask) -> (gx, gwl, gwu, gbias)      of the linear part
    dyad_pack(wl, wu, variant, dtype) -> packed              once per weight; dtype "fp32", "bf16" or "fp16"
    dyad_linear_packed(x, packed, f_out, bias, variant, layout, act) -> y
    dyad_ff(x, packed1, b1, packed2, b2, f_hidden, f_out, act, variant) -> y       layer 2 of act of layer 1, by tiles
    dyad_to_dense(wl, wu, variant) -> W                      (f_out, f_in), dtype of wl
    dyad_wq_linear(x, packed, scales, zeros, codebook, bias, n_dyad, f_out, f_in, bits, group_size, variant, compute)

Shapes and dtypes: x in layout "tokens" ``(..., f_in)`` with y ``(..., f_out)``, in layout "features" ``(f_in, T)`` with
y ``(f_out, T)``; dyad_ff and dyad_wq_linear take tokens. x, wl and wu fp32, bf16 or fp16, wl and wu alike; y has the
dtype of x. bias ``(f_out,)``: any of these. n: any number that divides both sides; 1 gives
the sum of two dense matrices. No tokens are fine. packed: uint8, opaque: a header that names what it holds, and panels;
the same bytes on every machine and tier. mask: which of x, wl, wu, bias need a gradient; the others come back empty. gx
has the dtype of x, gwl and gwu that of the weights, gbias is fp32.

Sums are fp32. x bf16 meets bf16 weights in BF16 dot products where the CPU has them; every other pair is widened to
fp32, which is exact: x is never rounded to the dtype of the weights.

Quantised blocks: one :class:`effk.formats.wq.WqWeight` in the packed form of :mod:`effk.ops.wq_linear`, made of the
matrix that :func:`stacked` puts together; d_out has to be a multiple of 16. ``compute`` as there.

Errors: RuntimeError naming the operation, the argument, what was expected and what came, before any work; a packed
buffer of another kind, variant or size, or a damaged one, is one of them.

A token's result depends on neither the other tokens nor the number of threads. Gradients: dyad_linear in x, wl, wu and
bias; with an activation its backward computes the sums before it again (relu: reads the result instead), while the
function :func:`dyad_linear` keeps them. The other operations in x and biases, weights being frozen; they expand the
weight for it, at the cost of a dense layer. dyad_to_dense in wl and wu. Second derivatives of dyad_linear raise. Under
autocast x, wl and wu are cast, biases not.

Source: Chandy, Gangal, Yang, Maggiotti, "DYAD: A Descriptive Yet Abjuring Density efficient approximation to linear
neural network layers", 2023, arXiv:2312.06881. Only "it" has been released; "ot" and "dt" follow from the names there.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from effk.formats.wq import WqWeight

from . import activation, autocast, wq_linear
from .dense_linear import bias_gradient, dtype_name, packed_bytes

VARIANTS = ("it", "ot", "dt")
LAYOUTS = ("tokens", "features")


def dyad_linear(
    x: Tensor,
    wl: Tensor,
    wu: Tensor,
    bias: Tensor | None = None,
    variant: str = "it",
    layout: str = "tokens",
    act: str = "none",
) -> Tensor:
    """The operation for x of any strides; differentiable in x, wl, wu and bias.

    Where a gradient is wanted, an activation is a step of its own, and what it acted on is kept, in the dtype of x:
    that is faster than computing it again, which ``torch.ops.effk.dyad_linear`` does to save the memory. In 16 bits the
    result then has one more rounding than without gradients.
    """
    apart = (
        act != "none" and torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, wl, wu, bias))
    )
    y = torch.ops.effk.dyad_linear(x.contiguous(), wl, wu, bias, variant, layout, "none" if apart else act)
    return activation.apply(y, act) if apart else y


def pack(wl: Tensor, wu: Tensor, variant: str = "it", dtype: torch.dtype | None = None) -> Tensor:
    """Both components as ``dyad_linear_packed`` reads them, rounded to ``dtype``; None keeps their own."""
    name = dtype_name("dyad_pack", wl.dtype if dtype is None else dtype)
    return torch.ops.effk.dyad_pack(wl.contiguous(), wu.contiguous(), variant, name)


# ---- where the entries are -----------------------------------------------------------------------


class Support(NamedTuple):
    """Rows and columns of W at which the entries of a component stand; shapes that broadcast to (n, d_out, d_in)."""

    rows: Tensor
    columns: Tensor


def support(n: int, d_out: int, d_in: int, variant: str, device: Any = None) -> tuple[Support, Support]:
    """The places of ``wl`` and ``wu``: the table of this module."""
    d = torch.arange(n, device=device)[:, None, None]
    o = torch.arange(d_out, device=device)[:, None]
    i = torch.arange(d_in, device=device)
    rows, columns = d * d_out + o, d * d_in + i
    by_residue = Support(
        o * n + d if variant in ("ot", "dt") else rows, i * n + d if variant in ("it", "dt") else columns
    )
    return Support(rows, columns), by_residue


def from_dense(w: Tensor, n: int, variant: str = "it") -> tuple[Tensor, Tensor]:
    """The components nearest to a dense ``w`` (Frobenius): its entries at their places, the others dropped.

    What two entries share is split in halves, so that ``dyad_to_dense`` gives exactly ``w`` there. Half of a random
    matrix's energy and more is lost, ``1 - (2/n - 1/n**2)``: see ``docs/dyad.md`` for better conversions.

    Raises:
        ValueError: ``n`` does not divide both sides, ``w`` is no matrix, or the variant does not exist.
    """
    if w.dim() != 2 or n < 1 or any(side % n for side in w.shape):
        raise ValueError(f"from_dense: w: expected a matrix with sides divisible by n = {n}, got {list(w.shape)}")
    if variant not in VARIANTS:
        raise ValueError(f"from_dense: variant: expected one of {VARIANTS}, got {variant!r}")
    places = support(n, w.shape[0] // n, w.shape[1] // n, variant, w.device)
    count = torch.zeros_like(w)
    for place in places:
        count[place] += 1  # no place twice within a component
    wl, wu = ((w / count.clamp(min=1))[place].contiguous() for place in places)
    return wl, wu


# ---- quantised blocks: one matrix for both components --------------------------------------------


def stacked(wl: Tensor, wu: Tensor, variant: str = "it") -> Tensor:
    """The matrix to be quantised for ``dyad_wq_linear``: what one row of a product needs, side by side.

    "it": ``(f_out, 2 d_in)``, row d*d_out + o is ``[wl[d, o] | wu[d, o]]``. "ot", "dt": ``(2 f_out, d_in)``, all rows
    of wl, then those of wu.
    """
    return torch.cat((wl, wu), dim=2 if variant == "it" else 0).flatten(0, 1)


def unstacked(w: Tensor, n: int, variant: str = "it") -> tuple[Tensor, Tensor]:
    """The inverse of :func:`stacked`: ``wl`` and ``wu``, views."""
    if variant == "it":
        wl, wu = w.view(n, -1, w.shape[1]).chunk(2, dim=2)
    else:
        wl, wu = w.view(2 * n, -1, w.shape[1]).chunk(2, dim=0)
    return wl, wu


# ---- float64 reference ---------------------------------------------------------------------------


def reference_to_dense(wl: Tensor, wu: Tensor, variant: str = "it") -> Tensor:
    """W in float64, entry by entry from the table of this module."""
    n, d_out, d_in = wl.shape
    w = torch.zeros(n * d_out, n * d_in, dtype=torch.float64, device=wl.device)
    for place, component in zip(support(n, d_out, d_in, variant, wl.device), (wl, wu), strict=True):
        w[place] += component.double()
    return w


def reference(
    x: Tensor,
    wl: Tensor,
    wu: Tensor,
    bias: Tensor | None = None,
    variant: str = "it",
    layout: str = "tokens",
    act: str = "none",
) -> Tensor:
    """``act(W x + bias)`` in float64 with the dense W; independent of the kernels."""
    w = reference_to_dense(wl, wu, variant)
    z = w @ x.double() if layout == "features" else x.double() @ w.T
    if bias is not None:
        z = z + (bias.double()[:, None] if layout == "features" else bias.double())
    return activation.reference(z, act)


def reference_backward(
    gy: Tensor, x: Tensor, wl: Tensor, wu: Tensor, variant: str = "it", layout: str = "tokens"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, wl, wu and bias of the linear part, float64, from the gradient of the dense W."""
    w, features = reference_to_dense(wl, wu, variant), layout == "features"
    gx = w.T @ gy.double() if features else gy.double() @ w
    g, rows = (t.double().T if features else t.double().reshape(-1, t.shape[-1]) for t in (gy, x))
    gw = g.T @ rows
    gwl, gwu = (gw[place] for place in support(*wl.shape, variant, wl.device))
    return gx, gwl, gwu, g.sum(0)


def reference_wq(
    x: Tensor,
    weight: WqWeight,
    n_dyad: int,
    bias: Tensor | None = None,
    variant: str = "it",
    compute: str = "float",
) -> Tensor:
    """``dyad_wq_linear`` in float64 from the canonical weight: :func:`effk.ops.wq_linear.reference` block by block."""
    parts = 1 if variant == "it" else 2
    d_out, d_in = weight.n // (parts * n_dyad), weight.k * parts // 2
    rows = x.reshape(-1, n_dyad * d_in)
    blocks, residues = rows.unflatten(1, (n_dyad, d_in)), rows.unflatten(1, (d_in, n_dyad)).transpose(1, 2)
    y = torch.zeros(len(rows), n_dyad * d_out, dtype=torch.float64)
    for d in range(n_dyad):
        first = d * d_out
        if variant == "it":
            both = torch.cat((blocks[:, d], residues[:, d]), dim=1)
            y[:, first : first + d_out] = wq_linear.reference(both, weight.rows(first, first + d_out), None, compute)
            continue
        upper = weight.rows(weight.n // 2 + first, weight.n // 2 + first + d_out)
        y[:, first : first + d_out] += wq_linear.reference(
            blocks[:, d], weight.rows(first, first + d_out), None, compute
        )
        y[:, d::n_dyad] += wq_linear.reference((blocks if variant == "ot" else residues)[:, d], upper, None, compute)
    return (y if bias is None else y + bias.double()).reshape(*x.shape[:-1], n_dyad * d_out)


# ---- shapes, for torch.compile and export --------------------------------------------------------


def _check_weights(op: str, wl: Tensor, wu: Tensor) -> tuple[int, int, int]:
    torch._check(wl.dim() == 3, lambda: f"{op}: wl: expected (n, d_out, d_in), got {list(wl.shape)}")
    torch._check(
        wu.shape == wl.shape and wu.dtype == wl.dtype,
        lambda: f"{op}: wu: expected {wl.dtype} {list(wl.shape)} as wl, got {wu.dtype} {list(wu.shape)}",
    )
    return wl.shape


def _like(op: str, x: Tensor, f_in: int | None, f_out: int, layout: str) -> Tensor:
    if layout == "features":
        torch._check(x.dim() == 2, lambda: f"{op}: x: expected (f_in, T), got {list(x.shape)}")
    torch._check(x.dim() >= 1, lambda: f"{op}: x: expected (..., f_in), got a scalar")
    given = x.shape[0 if layout == "features" else -1]
    torch._check(f_in is None or given == f_in, lambda: f"{op}: x: expected {f_in} features, got {list(x.shape)}")
    return x.new_empty((f_out, x.shape[1]) if layout == "features" else (*x.shape[:-1], f_out))


@torch.library.register_fake("effk::dyad_linear")
def _(x, wl, wu, bias, variant, layout, act):
    n, d_out, d_in = _check_weights("dyad_linear", wl, wu)
    return _like("dyad_linear", x, n * d_in, n * d_out, layout)


@torch.library.register_fake("effk::dyad_linear_backward")
def _(gy, x, wl, wu, variant, layout, mask):
    n, d_out, _ = _check_weights("dyad_linear_backward", wl, wu)
    shapes = (x.shape, wl.shape, wu.shape, (n * d_out,))
    dtypes = (x.dtype, wl.dtype, wu.dtype, torch.float32)
    return tuple(
        x.new_empty(shape if wanted else (0,), dtype=dtype)
        for shape, dtype, wanted in zip(shapes, dtypes, mask, strict=True)
    )


@torch.library.register_fake("effk::dyad_pack")
def _(wl, wu, variant, dtype):
    blocks = _check_weights("dyad_pack", wl, wu)
    size = packed_bytes("dyad_packed_bytes", wl.device, *blocks, variant, dtype)
    return wl.new_empty((size,), dtype=torch.uint8)


@torch.library.register_fake("effk::dyad_linear_packed")
def _(x, packed, f_out, bias, variant, layout, act):
    return _like("dyad_linear_packed", x, None, f_out, layout)


@torch.library.register_fake("effk::dyad_ff")
def _(x, packed1, b1, packed2, b2, f_hidden, f_out, act, variant):
    return _like("dyad_ff", x, None, f_out, "tokens")


@torch.library.register_fake("effk::dyad_to_dense")
def _(wl, wu, variant):
    n, d_out, d_in = _check_weights("dyad_to_dense", wl, wu)
    return wl.new_empty((n * d_out, n * d_in))


@torch.library.register_fake("effk::dyad_wq_linear")
def _(x, packed, scales, zeros, codebook, bias, n_dyad, f_out, f_in, bits, group_size, variant, compute):
    return _like("dyad_wq_linear", x, f_in, f_out, "tokens")


# ---- gradients -----------------------------------------------------------------------------------


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, wl, wu, bias, ctx.variant, ctx.layout, ctx.act = inputs
    ctx.save_for_backward(x, wl, wu, bias, output if ctx.act == "relu" else None)


def _backward(ctx: Any, gy: Tensor) -> tuple[Any, ...]:
    x, wl, wu, bias, z = ctx.saved_tensors
    if ctx.act not in ("none", "relu"):
        z = torch.ops.effk.dyad_linear(x, wl, wu, bias, ctx.variant, ctx.layout, "none")
    mask = [bool(needed) for needed in ctx.needs_input_grad[:4]]
    grads = torch.ops.effk.dyad_linear_backward(
        activation.gradient(gy, z, ctx.act).contiguous(), x, wl, wu, ctx.variant, ctx.layout, mask
    )
    gx, gwl, gwu, gbias = (grad if wanted else None for grad, wanted in zip(grads, mask, strict=True))
    return gx, gwl, gwu, None if gbias is None else gbias.to(bias.dtype), None, None, None


torch.library.register_autograd("effk::dyad_linear", _backward, setup_context=_setup)


def _no_second_derivative(ctx: Any, *grads: Any) -> Any:
    raise RuntimeError("dyad_linear_backward: second derivatives are not implemented")


torch.library.register_autograd("effk::dyad_linear_backward", _no_second_derivative)


def _setup_to_dense(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    wl, _, ctx.variant = inputs
    ctx.blocks = wl.shape


def _to_dense_backward(ctx: Any, gw: Tensor) -> tuple[Any, ...]:
    wanted = zip(support(*ctx.blocks, ctx.variant, gw.device), ctx.needs_input_grad[:2], strict=True)
    return *(gw[place] if needed else None for place, needed in wanted), None


torch.library.register_autograd("effk::dyad_to_dense", _to_dense_backward, setup_context=_setup_to_dense)


def _expanded(packed: Tensor, f_in: int, f_out: int, variant: str) -> Tensor:
    """W^T ``(f_in, f_out)`` fp32 of a packed weight: its product with the identity, which rounds shared places only."""
    unit = torch.eye(f_in, dtype=torch.float32, device=packed.device)
    return torch.ops.effk.dyad_linear_packed(unit, packed, f_out, None, variant, "tokens", "none")


def _setup_packed(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, packed, ctx.f_out, bias, ctx.variant, ctx.layout, ctx.act = inputs
    ctx.save_for_backward(x, packed, bias)


def _packed_backward(ctx: Any, gy: Tensor) -> tuple[Any, ...]:
    x, packed, bias = ctx.saved_tensors
    how, features = (ctx.variant, ctx.layout), ctx.layout == "features"
    gz, gx = gy, None
    if ctx.act != "none":
        z = torch.ops.effk.dyad_linear_packed(x, packed, ctx.f_out, bias, *how, "none")
        gz = activation.gradient(gy, z, ctx.act)
    if ctx.needs_input_grad[0]:
        wt = _expanded(packed, x.shape[0 if features else -1], ctx.f_out, ctx.variant)
        gx = (wt @ gz.float() if features else gz.float() @ wt.T).to(x.dtype)
    gbias = bias_gradient(gz.T if features else gz, bias if ctx.needs_input_grad[3] else None)
    return gx, None, None, gbias, None, None, None


torch.library.register_autograd("effk::dyad_linear_packed", _packed_backward, setup_context=_setup_packed)


def _setup_ff(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, packed1, b1, packed2, b2, ctx.f_hidden, ctx.f_out, ctx.act, ctx.variant = inputs
    ctx.save_for_backward(x, packed1, b1, packed2, b2)


def _ff_backward(ctx: Any, gy: Tensor) -> tuple[Any, ...]:
    x, packed1, b1, packed2, b2 = ctx.saved_tensors
    needs, variant = ctx.needs_input_grad, ctx.variant
    gx = gb1 = None
    if needs[0] or needs[2]:
        z = torch.ops.effk.dyad_linear_packed(x, packed1, ctx.f_hidden, b1, variant, "tokens", "none")
        gh = gy.float() @ _expanded(packed2, ctx.f_hidden, ctx.f_out, variant).T
        gz = activation.gradient(gh, z.float(), ctx.act)
        gb1 = bias_gradient(gz, b1 if needs[2] else None)
        if needs[0]:
            gx = (gz @ _expanded(packed1, x.shape[-1], ctx.f_hidden, variant).T).to(x.dtype)
    return gx, None, gb1, None, bias_gradient(gy, b2 if needs[4] else None), None, None, None, None


torch.library.register_autograd("effk::dyad_ff", _ff_backward, setup_context=_setup_ff)


def _setup_wq(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, *tensors, bias, n_dyad, f_out, f_in, bits, group_size, ctx.variant, _ = inputs
    ctx.save_for_backward(*tensors, bias)
    ctx.n_dyad, ctx.f_in = n_dyad, f_in
    stacked_n, stacked_k = (f_out, 2 * f_in // n_dyad) if ctx.variant == "it" else (2 * f_out, f_in // n_dyad)
    ctx.geometry = (stacked_n, stacked_k, bits, group_size)


def _wq_backward(ctx: Any, gy: Tensor) -> tuple[Any, ...]:
    *tensors, bias = ctx.saved_tensors
    gx = None
    if ctx.needs_input_grad[0]:
        weight = torch.ops.effk.wq_dequantize(*tensors, None, None, None, *ctx.geometry)
        wl, wu = (w.contiguous() for w in unstacked(weight, ctx.n_dyad, ctx.variant))
        like_x = gy.new_empty((*gy.shape[:-1], ctx.f_in))
        gx = torch.ops.effk.dyad_linear_backward(
            gy.contiguous(), like_x, wl, wu, ctx.variant, "tokens", [True, False, False, False]
        )[0]
    return gx, *[None] * 4, bias_gradient(gy, bias if ctx.needs_input_grad[5] else None), *[None] * 7


torch.library.register_autograd("effk::dyad_wq_linear", _wq_backward, setup_context=_setup_wq)

autocast.cast_arguments("dyad_linear", (0, 1, 2))
for _name in ("dyad_linear_packed", "dyad_ff", "dyad_wq_linear"):
    autocast.cast_arguments(_name)
