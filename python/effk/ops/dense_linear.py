"""``torch.ops.effk.dense_linear``: a linear layer with a dense weight, packed once for the register-blocked GEMM.

Formula, for a weight ``W[f_out, f_in]``::

    y = act(x W^T + bias)          act: "none", "relu", "gelu", "gelu_tanh" or "silu", see :mod:`effk.ops.activation`

Operations (library ``effk``):

    dense_pack(w, dtype) -> packed                          once per weight; dtype "fp32", "bf16" or "fp16"
    dense_linear(x, packed, f_out, bias, act) -> y
    dense_unpack(packed, f_out, f_in) -> w                  fp32: what the packed weight stands for

Shapes and dtypes: w ``(f_out, f_in)``; x ``(..., f_in)``, y ``(..., f_out)`` of the dtype of x; all fp32, bf16 or fp16.
bias ``(f_out,)``: any of these. packed: uint8, opaque: a header that names what it holds,
and panels; the same bytes on every machine and tier. Sums are fp32. x bf16 meets a bf16 weight in BF16 dot products
where the CPU has them; every other pair is widened to fp32, which is exact.

Errors: RuntimeError naming the operation, the argument, what was expected and what came, before any work; a packed
buffer of another kind or size, or a damaged one, is one of them.

A row of the result depends on neither the other rows nor the number of threads. Differentiable with respect to x and
bias; the weight is frozen. The backward unpacks the weight and, for activations, computes x W^T + bias again. Under
autocast x is cast.

It is the yardstick for :mod:`effk.ops.dyad_linear`, whose inner kernels it shares.

Source: the packing and blocking of Goto, van de Geijn, "Anatomy of High-Performance Matrix Multiplication", ACM TOMS
34(3), 2008, section 5.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effk import _C

from . import activation, autocast

DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}  # the names of the packed forms


def pack(w: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """``w`` ``(f_out, f_in)`` as the operation reads it, rounded to ``dtype``; None keeps the dtype of w."""
    return torch.ops.effk.dense_pack(w.contiguous(), dtype_name("dense_pack", w.dtype if dtype is None else dtype))


def dense_linear(x: Tensor, packed: Tensor, f_out: int, bias: Tensor | None = None, act: str = "none") -> Tensor:
    """The operation for x of any strides; differentiable in x and bias."""
    return torch.ops.effk.dense_linear(x.contiguous(), packed, f_out, bias, act)


def dtype_name(op: str, dtype: torch.dtype) -> str:
    """ "fp32", "bf16" or "fp16"; ValueError for another dtype."""
    if dtype not in DTYPES:
        raise ValueError(f"{op}: dtype: expected float32, bfloat16 or float16, got {str(dtype).removeprefix('torch.')}")
    return DTYPES[dtype]


# ---- float64 reference ---------------------------------------------------------------------------


def reference(x: Tensor, w: Tensor, bias: Tensor | None = None, act: str = "none") -> Tensor:
    """The formula of this module in float64, from the plain weight; independent of the kernels and their layout."""
    z = x.double() @ w.double().T
    return activation.reference(z if bias is None else z + bias.double(), act)


# ---- shapes, for torch.compile and export --------------------------------------------------------


def packed_bytes(name: str, device: torch.device, *arguments: Any) -> Any:
    """How long a packed weight is: the library knows for the CPU; elsewhere, and for symbolic sizes, the run tells."""
    if device.type in ("cpu", "meta") and all(isinstance(a, int | str) for a in arguments):
        return getattr(_C, name)(*arguments)
    return torch.library.get_ctx().new_dynamic_size()


@torch.library.register_fake("effk::dense_pack")
def _(w, dtype):
    torch._check(w.dim() == 2, lambda: f"dense_pack: w: expected (f_out, f_in), got {list(w.shape)}")
    return w.new_empty((packed_bytes("dense_packed_bytes", w.device, *w.shape, dtype),), dtype=torch.uint8)


@torch.library.register_fake("effk::dense_linear")
def _(x, packed, f_out, bias, act):
    torch._check(x.dim() >= 1, lambda: "dense_linear: x: expected (..., f_in), got a scalar")
    return x.new_empty((*x.shape[:-1], f_out))


@torch.library.register_fake("effk::dense_unpack")
def _(packed, f_out, f_in):
    return packed.new_empty((f_out, f_in), dtype=torch.float32)


# ---- gradients with respect to x and bias --------------------------------------------------------


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, packed, ctx.f_out, bias, ctx.act = inputs
    ctx.save_for_backward(x if ctx.act != "none" else None, packed, bias)
    ctx.f_in = x.shape[-1]


def _backward(ctx: Any, gy: Tensor) -> tuple[Any, ...]:
    x, packed, bias = ctx.saved_tensors
    gz, gx = gy, None
    if ctx.act != "none":
        gz = activation.gradient(gy, torch.ops.effk.dense_linear(x, packed, ctx.f_out, bias, "none"), ctx.act)
    if ctx.needs_input_grad[0]:
        gx = (gz.float() @ torch.ops.effk.dense_unpack(packed, ctx.f_out, ctx.f_in)).to(gy.dtype)
    return gx, None, None, bias_gradient(gz, bias if ctx.needs_input_grad[3] else None), None


def bias_gradient(gz: Tensor, bias: Tensor | None) -> Tensor | None:
    """Sum of ``(..., f_out)`` over all but the last dimension, fp32, as ``bias``; None for no bias."""
    return None if bias is None else gz.reshape(-1, gz.shape[-1]).float().sum(0).to(bias.dtype)


torch.library.register_autograd("effk::dense_linear", _backward, setup_context=_setup)
autocast.cast_arguments("dense_linear")
