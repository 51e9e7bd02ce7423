"""Linear layers with sparse weights, on ``torch.ops.effk.bitmask_linear``."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..formats import large_pages
from ..formats.bitmask import BitmaskTensor
from ..ops import bitmask_linear as op
from .frozen import FrozenDtypes

COMPUTE = ("float", "int8")
_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.int8: "int8"}


class BitmaskLinear(FrozenDtypes):
    """``y = x W^T + bias`` with frozen, mostly zero W; x fp32, bf16 or fp16 ``[..., in_features]``.

    Buffers, made once from the canonical form (:mod:`effk.formats.bitmask`): ``values``, ``masks``, ``ptr``, and with
    int8 values ``scale`` and ``row_sum``, as the operation takes them; ``bias``, which follows ``.to(dtype)``. ``state_dict``
    holds this form, and loading one checks it; files of models hold the canonical one.

    ``compute`` "float" leaves activations as they are; "int8" rounds each token to 8 bits and needs int8 values.
    """

    format_buffers: ClassVar[tuple[str, ...]] = ("values", "masks", "ptr", "scale", "row_sum")

    def __init__(self, n: int, k: int, compute: str = "float") -> None:
        super().__init__()
        if compute not in COMPUTE:
            raise ValueError(f"BitmaskLinear: compute: expected one of {COMPUTE}, got {compute!r}")
        self.out_features, self.in_features, self.compute = n, k, compute
        for name in (*self.format_buffers, "bias"):
            self.register_buffer(name, None)

    @classmethod
    def from_weight(cls, weight: BitmaskTensor, bias: Tensor | None = None, compute: str = "float") -> BitmaskLinear:
        """Pack ``weight`` for the kernels.

        Raises:
            ValueError: the weight is malformed, ``bias`` is not ``[n]``, or compute "int8" without int8 values.
        """
        weight.validate()
        if bias is not None and (tuple(bias.shape) != (weight.n,) or not bias.is_floating_point()):
            raise ValueError(
                f"BitmaskLinear: bias: expected floating point [{weight.n}], got {bias.dtype} {list(bias.shape)}"
            )
        if compute == "int8" and weight.bits != 8:
            raise ValueError(f"BitmaskLinear: compute: expected 'float' for values of {weight.bits} bits, got 'int8'")
        module = cls(weight.n, weight.k, compute)
        dense, keep = weight.dense(), None
        if weight.bits != 8 and weight.values.numel() and not bool(weight.values.all()):  # a file may keep zeros
            keep = dense != 0
        module._take(op.pack(dense, keep, weight.scales, _NAMES[dense.dtype], weight.group))
        module.bias = None if bias is None else bias.detach().clone()
        return module

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, values: str = "int8", group: int = 0, compute: str = "float"
    ) -> BitmaskLinear:
        """The zeros of ``linear.weight`` left out; int8 values are rounded to the nearest."""
        n, k = linear.weight.shape
        module = cls(n, k, compute)
        module._take(op.pack(linear.weight.detach().contiguous(), None, None, values, group))
        module.bias = None if linear.bias is None else linear.bias.detach().clone()
        return module

    def _take(self, weight: op.BitmaskWeight) -> None:
        self.values, self.masks, self.ptr, self.scale, self.row_sum = weight[:5]

    @property
    def packed(self) -> op.BitmaskWeight:
        """The weight as the operation takes it."""
        buffers = (self._buffers[name] for name in self.format_buffers)
        return op.BitmaskWeight(*buffers, self.out_features, self.in_features)

    @property
    def group(self) -> int:
        """Columns that share a scale; 0: the row."""
        if self.scale is None or self.scale.shape[1] == 1:
            return 0
        blocks = -(-self.in_features // op.BLOCK)
        return next(
            g * op.BLOCK for g in range(1, blocks) if op.groups(self.in_features, g * op.BLOCK) == self.scale.shape[1]
        )

    @property
    def sparsity(self) -> float:
        """The share of zeros."""
        return 1 - self.packed.stored / (self.out_features * self.in_features)

    def to_weight(self) -> BitmaskTensor:
        """The canonical form back."""
        weight = self.packed
        dense = torch.ops.effk.bitmask_unpack(weight.values, weight.masks, weight.ptr, None, weight.n, weight.k)
        return BitmaskTensor.from_dense(dense, self.scale, self.group)

    def dequantize(self) -> Tensor:
        """The weight as fp32 ``[N, K]``."""
        return op.unpack(self.packed).float()

    def forward(self, x: Tensor) -> Tensor:
        return op.linear(x.contiguous(), self.packed, self.bias, self.compute)

    def extra_repr(self) -> str:
        kind = "empty" if self.values is None else f"{_NAMES[self.values.dtype]}, sparsity={self.sparsity:.3f}"
        return f"{self.in_features}, {self.out_features}, {kind}, compute={self.compute!r}"

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: dict[str, Any], strict: bool, missing: list[str],
        unexpected: list[str], errors: list[str],
    ) -> None:  # fmt: skip
        parts = [state_dict.get(prefix + name) for name in ("values", "masks", "ptr")]
        if all(isinstance(t, Tensor) for t in parts):
            try:
                torch.ops.effk.bitmask_validate(*parts, self.out_features, self.in_features)
            except RuntimeError as error:
                errors.append(f"{prefix}: {error}")
                return
            for name in self.format_buffers:  # as many values as come
                t = state_dict.get(prefix + name)
                if isinstance(t, Tensor):
                    self._buffers[name] = large_pages.empty_like(t)
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
