"""Linear layers over low-bit weights, running on ``torch.ops.effk``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..formats.wq import WqWeight
from ..ops import wq_linear
from .frozen import FrozenDtypes
from .siblings import SiblingProducts, may_share

COMPUTE_FORMS = ("float", "int8")


class WqLinear(FrozenDtypes):
    """``y = x W^T + bias`` with a frozen low-bit ``W[out_features, in_features]``; x fp32, bf16 or fp16 ``[..., K]``.

    The buffers are the kernel's packed form (``csrc/formats/t16.h``), made once from the canonical form::

        packed    uint8 [tiles, chunks, bytes]      scales   fp16 or fp32 [tiles, groups, 16]
        zeros     uint8 [tiles, groups, 16]         codebook fp32 [2**bits] or [tiles, 2**bits, 16]
        out_ptr   int32 [N + 1]                     out_col  uint16 or int32 [nnz]
        out_val   fp16 [nnz]                        bias     [N], follows ``.to(dtype)``

    all but the first two optional. ``state_dict`` holds this form; files hold the canonical one (:mod:`effk.hub`).
    ``compute`` is "float" or "int8" (activations quantised on the fly, about 1 % error); it never changes by itself.
    Gradients flow to ``x`` only.
    """

    format_buffers: ClassVar[tuple[str, ...]] = (
        "packed",
        "scales",
        "zeros",
        "codebook",
        "out_ptr",
        "out_col",
        "out_val",
    )

    def __init__(self, n: int, k: int, bits: int, group_size: int, compute: str = "float") -> None:
        super().__init__()
        if compute not in COMPUTE_FORMS:
            raise ValueError(f"WqLinear: compute: expected one of {COMPUTE_FORMS}, got {compute!r}")
        self.out_features, self.in_features = n, k
        self.bits, self.group_size, self.compute = bits, group_size, compute
        for name in (*self.format_buffers, "bias"):
            self.register_buffer(name, None)
        object.__setattr__(self, "_shared", None)  # not registered: the siblings belong to the model, not to this layer

    @classmethod
    def from_weight(cls, weight: WqWeight, bias: Tensor | None = None, compute: str = "float") -> WqLinear:
        """Pack ``weight`` for the kernels.

        Raises:
            ValueError: the weight is malformed, ``bias`` is not ``[n]``, or ``compute`` does not exist for this weight.
        """
        weight.validate()
        if bias is not None and (tuple(bias.shape) != (weight.n,) or not bias.is_floating_point()):
            raise ValueError(
                f"WqLinear: bias: expected floating point [{weight.n}], got {bias.dtype} {list(bias.shape)}"
            )
        if compute == "int8" and weight.codebook is not None and weight.codebook.dim() == 2:
            raise ValueError("WqLinear: compute: expected 'float' for a codebook per row, got 'int8'")
        module = cls(weight.n, weight.k, weight.bits, weight.group_size, compute)
        packed = wq_linear.pack(weight)
        for name, tensor in zip(cls.format_buffers, packed.tensors, strict=True):
            setattr(module, name, tensor)
        module.bias = None if bias is None else bias.detach().clone()
        return module

    def to_weight(self) -> WqWeight:
        """The canonical form back; exact inverse of :meth:`from_weight`."""
        return wq_linear.unpack(wq_linear.PackedWeight(*self._weight_args(), *self._geometry()))

    def dequantize(self) -> Tensor:
        """The weight as fp32 ``[N, K]``, outliers included."""
        return torch.ops.effk.wq_dequantize(*self._weight_args(), *self._geometry())

    def forward(self, x: Tensor) -> Tensor:
        """``x`` ``[..., in_features]`` to ``[..., out_features]`` of the same dtype."""
        if self._shared is not None and may_share(x):
            return self._shared.one(self, x)
        return self.alone(x)

    def alone(self, x: Tensor) -> Tensor:
        """``forward`` without sharing work with layers over the same input."""
        return torch.ops.effk.wq_linear.default(
            x, *self._weight_args(), self._buffers["bias"],
            self.out_features, self.in_features, self.bits, self.group_size, self.compute,
        )  # fmt: skip

    def extra_repr(self) -> str:
        group = self.group_size or "row"
        sparse = "" if self.out_val is None else f", outliers={self.out_val.numel()}"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"bits={self.bits}, group_size={group}, compute={self.compute}{sparse}"
        )

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__ | {"_buffers": dict(self._buffers)}
        if (columns := self._buffers["out_col"]) is not None and columns.dtype == torch.uint16:
            state["_buffers"]["out_col"] = columns.view(torch.int16)  # PyTorch pickles uint16 but cannot unpickle it
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if (columns := self._buffers["out_col"]) is not None and columns.dtype == torch.int16:
            self._buffers["out_col"] = columns.view(torch.uint16)

    def _weight_args(self) -> tuple[Tensor | None, ...]:
        b = self._buffers  # attribute look-up of seven buffers would cost as much as a small product
        return b["packed"], b["scales"], b["zeros"], b["codebook"], b["out_ptr"], b["out_col"], b["out_val"]

    def _geometry(self) -> tuple[int, int, int, int]:
        return self.out_features, self.in_features, self.bits, self.group_size


class WqMultiLinear(SiblingProducts):
    """Several :class:`WqLinear` over one input in one kernel call: q, k, v, or gate and up.

    ``forward(x)`` returns all products. The activations are read and (int8 form) quantised once, and the threads share
    one region; each product is bit for bit what its layer alone would give. :meth:`attach` makes the layers of an existing
    model share their calls.
    """

    def __init__(self, layers: Sequence[WqLinear]) -> None:
        """Raises ValueError unless there are at least two layers with equal ``in_features`` and ``compute``."""
        inputs = {layer.in_features for layer in layers}
        forms = {layer.compute for layer in layers}
        if len(layers) < 2 or len(inputs) != 1 or len(forms) != 1:
            raise ValueError(
                "WqMultiLinear: layers: expected two or more with one in_features and one compute, "
                f"got {len(layers)} with {sorted(inputs)} and {sorted(forms)}"
            )
        super().__init__(layers)
        self._rows = [layer.out_features for layer in layers]
        self._bits = [layer.bits for layer in layers]
        self._groups = [layer.group_size for layer in layers]

    def forward(self, x: Tensor) -> list[Tensor]:
        """Products of ``x`` ``[..., in_features]`` with every layer, in order."""
        layers = self._modules["layers"]._modules.values()
        weights = [layer._weight_args() for layer in layers]
        first = next(iter(layers))
        return torch.ops.effk.wq_multi_linear.default(
            x,
            *map(list, zip(*weights, strict=True)),
            [layer._buffers["bias"] for layer in layers],
            self._rows,
            first.in_features,
            self._bits,
            self._groups,
            first.compute,
        )
