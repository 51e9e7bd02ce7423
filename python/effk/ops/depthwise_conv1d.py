"""``torch.ops.effk.depthwise_conv1d``: short convolutions, one filter per channel, both layouts, any padding.

Formula, for a filter ``w[H, K]``, with x = 0 outside 0 .. L-1::

    s[t] = bias[h] + sum_{j=0}^{K-1} w[h, j] x[t + (K-1) - j - pad_left]       0 <= t < L + pad_left + pad_right - K + 1
    y[t] = s[t]                     act "none"
         = s[t] / (1 + exp(-s[t]))  act "silu"

Causal: ``pad_left = K - 1, pad_right = 0``; then ``w[h, 0]`` multiplies the current sample (``nn.Conv1d`` stores its
taps the other way round: ``w = conv.weight[:, 0].flip(1)``).

Operations (library ``effk``):

    depthwise_conv1d(x, w, bias, pad_left, pad_right, layout, act) -> y
    depthwise_conv1d_backward(gy, x, w, bias, pad_left, pad_right, layout, act, mask) -> (gx, gw, gbias)

Shapes and dtypes: x, y ``(B, H, L)`` in layout "bhl", ``(B, L, H)`` in layout "blh", fp32, bf16 or fp16, dense. w
``(H, K)``, K >= 1, and bias ``(H,)``: fp32, or the dtype of x. Arithmetic is fp32. mask: which of x, w, bias need a
gradient; the others come back empty. Gradients have the dtypes of what they belong to; sums over batch and time are
fp32. The backward of "silu" computes s again.

Errors: RuntimeError naming the operation, the argument, what was expected and what came, before any work. Negative
padding and an empty result are errors. Second derivatives raise. Under autocast x is cast.

Source: the short convolution that FlashFFTConv (Fu et al., 2023, arXiv:2311.05908) releases beside the long one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import autocast

LAYOUTS = ("bhl", "blh")
ACTS = ("none", "silu")


def depthwise_conv1d(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None = None,
    pad_left: int | None = None,
    pad_right: int = 0,
    layout: str = "bhl",
    act: str = "none",
) -> Tensor:
    """The operation with causal padding as the default, for x of any strides; differentiable in x, w and bias."""
    left = w.shape[-1] - 1 if pad_left is None else pad_left
    return torch.ops.effk.depthwise_conv1d(x.contiguous(), w, bias, left, pad_right, layout, act)


# ---- float64 reference ---------------------------------------------------------------------------


def reference(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None = None,
    pad_left: int = 0,
    pad_right: int = 0,
    layout: str = "bhl",
    act: str = "none",
) -> Tensor:
    """The formula of this module in float64, one shifted product per tap; independent of the kernels."""
    s = _before_act(_bhl(x, layout), w, bias, pad_left, pad_right)
    y = s * torch.sigmoid(s) if act == "silu" else s
    return _bhl(y, layout)


def reference_backward(
    gy: Tensor,
    x: Tensor,
    w: Tensor,
    bias: Tensor | None = None,
    pad_left: int = 0,
    pad_right: int = 0,
    layout: str = "bhl",
    act: str = "none",
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, w and bias in float64."""
    x, gs, w = _bhl(x, layout), _bhl(gy, layout), w.double()
    if act == "silu":
        s = _before_act(x, w, bias, pad_left, pad_right)
        gs = gs * torch.sigmoid(s) * (1 + s * (1 - torch.sigmoid(s)))
    length, taps, outputs = x.shape[-1], w.shape[1], gs.shape[-1]
    padded = torch.nn.functional.pad(x, (pad_left, pad_right))
    gpadded, gw = torch.zeros_like(padded), torch.zeros_like(w)
    for j in range(taps):
        first = taps - 1 - j
        gpadded[..., first : first + outputs] += w[:, j, None] * gs
        gw[:, j] = (gs * padded[..., first : first + outputs]).sum(dim=(0, 2))
    return _bhl(gpadded[..., pad_left : pad_left + length], layout), gw, gs.sum(dim=(0, 2))


def _bhl(x: Tensor, layout: str) -> Tensor:
    return x.double().transpose(1, 2) if layout == "blh" else x.double()


def _before_act(x: Tensor, w: Tensor, bias: Tensor | None, pad_left: int, pad_right: int) -> Tensor:
    w, taps = w.double(), w.shape[1]
    padded = torch.nn.functional.pad(x, (pad_left, pad_right))
    outputs = padded.shape[-1] - taps + 1
    shifted = (w[:, j, None] * padded[..., taps - 1 - j :][..., :outputs] for j in range(taps))
    return sum(shifted, torch.zeros((), dtype=torch.float64) if bias is None else bias.double()[:, None])


# ---- shapes, for torch.compile and export --------------------------------------------------------


@torch.library.register_fake("effk::depthwise_conv1d")
def _(x, w, bias, pad_left, pad_right, layout, act):
    torch._check(x.dim() == 3, lambda: f"depthwise_conv1d: x: expected three dimensions, got {list(x.shape)}")
    time = 2 if layout == "bhl" else 1
    shape = list(x.shape)
    shape[time] = shape[time] + pad_left + pad_right - w.shape[1] + 1
    return x.new_empty(shape)


@torch.library.register_fake("effk::depthwise_conv1d_backward")
def _(gy, x, w, bias, pad_left, pad_right, layout, act, mask):
    gbias = w.new_empty((0,)) if bias is None or not mask[2] else bias.new_empty(bias.shape)
    return x.new_empty(x.shape if mask[0] else (0,)), w.new_empty(w.shape if mask[1] else (0,)), gbias


# ---- gradients -----------------------------------------------------------------------------------


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, w, bias, *ctx.how = inputs
    ctx.save_for_backward(x, w, bias)


def _backward(ctx: Any, gy: Tensor) -> tuple[Any, ...]:
    mask = [bool(need) for need in ctx.needs_input_grad[:3]]
    grads = torch.ops.effk.depthwise_conv1d_backward(gy.contiguous(), *ctx.saved_tensors, *ctx.how, mask)
    return *(grad if want else None for grad, want in zip(grads, mask, strict=True)), *[None] * 4


torch.library.register_autograd("effk::depthwise_conv1d", _backward, setup_context=_setup)


def _no_second_derivative(ctx: Any, *grads: Any) -> Any:
    raise RuntimeError("depthwise_conv1d_backward: second derivatives are not implemented")


torch.library.register_autograd("effk::depthwise_conv1d_backward", _no_second_derivative)


# ---- autocast: x takes the autocast dtype; w and bias stay as they are ----------------------------

autocast.cast_arguments("depthwise_conv1d")
