"""``torch.ops.effk.bitmask_linear``: a linear layer whose weight is mostly zero, stored as a bit each and the other values.

Formula, for a weight ``W[n, k]``, with int8 values ``W = scale * code``, one scale a row or a group of columns::

    compute "float":  y = x W^T + bias                                     fp32
    compute "int8":   sx = max|x| / 127 of a token (1 if that is 0), q = clip(rint(x / sx), -127, 127)
                      y[n] = sx sum_g scale[n, g] (sum_k in g q[k] code[n, k]) + bias[n]         inner sums exact

Bytes a weight at a share s of zeros: ``(1 - s) b + 1/8``, b = 4, 2 or 1 for fp32, bf16 or int8. Below
s = 1 / (8 b) the dense weight is smaller, and :func:`pack` warns.

Operations (library ``effk``; ``weight`` stands for values, masks, ptr, scale, row_sum, see :class:`BitmaskWeight`):

    bitmask_pack(w, keep, scale, values, group) -> weight
        w fp32, bf16 or fp16 [n, k], finite, or int8 codes with their scale fp32 [n, groups]. keep bool or uint8 [n, k]: what
        to store; None: what is not zero. values "fp32", "bf16" or "int8" (symmetric: the largest kept magnitude of a group to
        127; codes that round to 0 are not stored). group: columns that share a scale, a multiple of 64; 0: the row.
    bitmask_unpack(values, masks, ptr, scale, n, k) -> [n, k]   values as stored (codes) without a scale, fp32 with
    bitmask_linear(x, weight, bias, n, k, compute) -> y         x fp32, bf16, fp16 [..., k]; y [..., n] like x
    bitmask_validate(values, masks, ptr, n, k) -> int64 [1]     the number of values; an error where masks, ptr and values
                                                                do not belong together

Shapes and dtypes: values fp32, bf16 or int8 ``[stored + 64 bytes]``, masks int64 ``[panels, blocks, 8]``, ptr int64
``[panels + 1]``, panels of 8 rows, blocks of 64 columns; scale fp32 and row_sum int32 ``[n, groups]``; bias ``[n]``. Layout:
``csrc/formats/bitmask.h``. k is at most 131071 with int8 values.

Errors: RuntimeError naming the operation, the argument, what was expected and what came, before any work. A call checks
shapes and the end of ptr; a weight that comes from a file has to pass bitmask_validate first, because a mask with more bits
than there are values would be read beyond them.

A row of y depends neither on the other rows nor on the number of threads; compute "int8" gives equal bits on all tiers. A token
with NaN or infinity gives NaN in compute "int8".

Source: bitmask compression as in compressed-tensors; sparse weights for decoding on CPUs: Kurtic et al., "Sparse Fine-tuning for
Inference Acceleration of Large Language Models", 2023, arXiv:2310.06927; expansion in registers: AbouElhamayed et al., "SparAMX",
2025, arXiv:2502.12444.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _C

VALUES = ("fp32", "bf16", "int8")
BYTES = {"fp32": 4, "bf16": 2, "int8": 1}
PANEL, BLOCK, TAIL_BYTES = 8, 64, 64


class BitmaskWeight(NamedTuple):
    """A packed weight, in the argument order of the operation."""

    values: Tensor
    masks: Tensor
    ptr: Tensor
    scale: Tensor | None
    row_sum: Tensor | None
    n: int
    k: int

    @property
    def stored(self) -> int:
        """How many values there are."""
        return self.values.numel() - TAIL_BYTES // self.values.element_size()

    @property
    def nbytes(self) -> int:
        """Bytes that a product with one token reads."""
        tensors = (self.values, self.masks, self.ptr, self.scale, self.row_sum)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def break_even(values: str) -> float:
    """The share of zeros below which the dense weight of the same type is smaller."""
    return 1 / (8 * BYTES[values])


def groups(k: int, group: int) -> int:
    """Scales of a row of ``k`` columns."""
    return 1 if group == 0 or group >= k else -(-k // group)


def pack(
    w: Tensor, keep: Tensor | None = None, scale: Tensor | None = None, values: str = "int8", group: int = 0
) -> BitmaskWeight:
    """The packed form of ``w [n, k]``; a warning where so little is zero that the dense form is smaller."""
    parts = torch.ops.effk.bitmask_pack(w, keep, scale, values, group)
    n, k = w.shape
    weight = BitmaskWeight(*parts[:3], *((t if t.numel() else None) for t in parts[3:]), n, k)
    zeros = 1 - weight.stored / (n * k)
    if zeros < break_even(values):
        warnings.warn(
            f"bitmask_pack: w: expected at least {break_even(values):.1%} zeros, below which the dense weight is smaller, "
            f"got {zeros:.1%}",
            stacklevel=2,
        )
    return weight


def unpack(weight: BitmaskWeight) -> Tensor:
    """``W [n, k]``: fp32 from int8 values, else as stored."""
    return torch.ops.effk.bitmask_unpack(weight.values, weight.masks, weight.ptr, weight.scale, weight.n, weight.k)


def linear(x: Tensor, weight: BitmaskWeight, bias: Tensor | None = None, compute: str = "float") -> Tensor:
    """The operation on a packed weight."""
    return torch.ops.effk.bitmask_linear(x, *weight[:5], bias, weight.n, weight.k, compute)


# ---- float64 reference ---------------------------------------------------------------------------


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (fp32 integers) and scale ``[m, 1]`` of tokens ``[m, k]``, as compute "int8" defines them, in fp32."""
    x = x.float()
    scale = x.abs().amax(1, keepdim=True) / 127
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return (x / scale).clamp(-127, 127).round(), scale


def reference(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """compute "float" in float64; ``w [n, k]`` is the dense weight."""
    return torch.nn.functional.linear(x.double(), w.double(), None if bias is None else bias.double())


def reference_int8(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None = None, group: int = 0) -> Tensor:
    """compute "int8" in float64 from dense codes ``[n, k]`` and scales ``[n, groups]``; rounding of x as defined in fp32."""
    q, sx = quantize(x)
    step = group or x.shape[1]
    y = torch.zeros(x.shape[0], codes.shape[0], dtype=torch.float64)
    for g in range(scale.shape[1]):
        part = slice(g * step, (g + 1) * step)
        y += (q[:, part].double() @ codes[:, part].double().T) * scale[:, g].double()
    y *= sx.double()
    return y if bias is None else y + bias.double()


# ---- shapes, for torch.compile and export --------------------------------------------------------


@torch.library.register_fake("effk::bitmask_pack")
def _(w, keep, scale, values, group):
    torch._check(w.dim() == 2, lambda: f"bitmask_pack: w: expected [n, k], got {list(w.shape)}")
    n, k = w.shape
    stored = torch.library.get_ctx().new_dynamic_size()
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}[values]
    scales = (n, groups(k, group)) if values == "int8" else (0,)
    panels, blocks = -(-n // PANEL), -(-k // BLOCK)
    return (
        w.new_empty((stored,), dtype=dtype),
        w.new_empty((panels, blocks, PANEL), dtype=torch.int64),
        w.new_empty((panels + 1,), dtype=torch.int64),
        w.new_empty(scales, dtype=torch.float32),
        w.new_empty(scales, dtype=torch.int32),
    )


@torch.library.register_fake("effk::bitmask_unpack")
def _(values, masks, ptr, scale, n, k):
    return values.new_empty((n, k), dtype=values.dtype if scale is None else torch.float32)


@torch.library.register_fake("effk::bitmask_linear")
def _(x, values, masks, ptr, scale, row_sum, bias, n, k, compute):
    torch._check(x.shape[-1] == k, lambda: f"bitmask_linear: x: expected [..., {k}], got {list(x.shape)}")
    return x.new_empty((*x.shape[:-1], n))


@torch.library.register_fake("effk::bitmask_validate")
def _(values, masks, ptr, n, k):
    return ptr.new_empty((1,))


# ---- no gradients --------------------------------------------------------------------------------


def _no_gradient(ctx: Any, *grads: Any) -> Any:
    raise RuntimeError("bitmask_linear: expected inputs without gradients, the operation has none")


torch.library.register_autograd("effk::bitmask_linear", _no_gradient)


def kernels() -> list[dict[str, Any]]:
    """The kernels there are, best first."""
    return [row for row in _C.kernel_table() if row["op"] == "bitmask_linear"]
