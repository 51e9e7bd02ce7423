"""Linear layers with low-bit weights, low-bit activations and 16-bit outlier columns, on ``torch.ops.effk.quik_linear``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ..formats import hadamard
from ..formats.quik import BITS, QuikWeight
from ..formats.wq import WqWeight
from .frozen import FrozenDtypes
from .siblings import SiblingProducts, may_share

ACTIVATION_BITS = (4, 8, 16)
QUANTIZERS = ("kernel", "sim")


class QuikLinear(FrozenDtypes):
    """``y = x W^T + bias`` with frozen W; x fp32, bf16 or fp16 ``[..., in_features]``, base columns rounded token by token.

    Buffers, made once from the canonical form (:mod:`effk.formats.quik`)::

        packed    uint8 [tiles, chunks, 64]   base codes as the kernels of wq_linear read them
        scales    fp32  [tiles, 1, 16]        reduced  fp32 [N], sums of the base weights
        w_out     uint8, packed outlier columns (dense_pack)
        int_idx   int32 [base columns]        fp_idx   int32 [outliers]      base, step   int8, the rotation
        bias      [N], follows ``.to(dtype)``

    w_out and fp_idx only with outliers, the indices only where the columns are not in order, base and step only for a
    ``rotated`` weight, whose input is rotated first. ``state_dict`` holds this form; files hold the canonical one.

    ``bits_a`` is 4, 8, or 16: activations as they are. ``quantizer`` is "kernel" (each token's own range; eight tokens or
    fewer may stay unrounded, on the weight-only path) or "sim" (a range with 0 in it and an integer zero point, always
    rounded): figures of accuracy are made with "sim", of speed with "kernel", and do not compare across the two.
    """

    format_buffers: ClassVar[tuple[str, ...]] = (
        "packed", "scales", "reduced", "w_out", "int_idx", "fp_idx", "base", "step",
    )  # fmt: skip

    def __init__(
        self, n: int, k: int, outliers: int, bits: int, bits_a: int, quantizer: str = "kernel", rotated: bool = False
    ) -> None:
        super().__init__()
        for name, value, known in (
            ("bits", bits, BITS), ("bits_a", bits_a, ACTIVATION_BITS), ("quantizer", quantizer, QUANTIZERS),
        ):  # fmt: skip
            if value not in known:
                raise ValueError(f"QuikLinear: {name}: expected one of {known}, got {value!r}")
        if bits_a < bits:
            raise ValueError(f"QuikLinear: bits_a: expected at least the weight's {bits}, got {bits_a}")
        self.out_features, self.in_features, self.outliers = n, k, outliers
        self.bits, self.bits_a, self.quantizer, self.rotated = bits, bits_a, quantizer, rotated
        self._out_dtype, self.pattern = torch.float16, None  # of the stored form; kernels do not see them
        self._power = hadamard.factors(k)[1]
        for name in (*self.format_buffers, "bias"):
            self.register_buffer(name, None)
        object.__setattr__(self, "_shared", None)  # not registered: the siblings belong to the model, not to this layer

    @classmethod
    def from_weight(
        cls, weight: QuikWeight, bias: Tensor | None = None, bits_a: int = 8, quantizer: str = "kernel"
    ) -> QuikLinear:
        """Pack ``weight`` for the kernels.

        Raises:
            ValueError: the weight is malformed, ``bias`` is not ``[n]``, or a choice does not exist.
        """
        weight.validate()
        if bias is not None and (tuple(bias.shape) != (weight.n,) or not bias.is_floating_point()):
            raise ValueError(
                f"QuikLinear: bias: expected floating point [{weight.n}], got {bias.dtype} {list(bias.shape)}"
            )
        module = cls(weight.n, weight.k, weight.outliers, weight.bits, bits_a, quantizer, weight.rotated)
        base = weight.base
        module.packed, module.scales, _, _ = torch.ops.effk.wq_pack(
            base.qweight, base.scales, None, None, base.n, base.k, base.bits, base.group_size
        )
        module.reduced = weight.reduced()
        if weight.outliers:
            form = {torch.float16: "fp16", torch.bfloat16: "bf16"}[weight.w_out.dtype]
            module.w_out = torch.ops.effk.dense_pack(weight.w_out, form)
            behind = torch.arange(base.k, weight.k, dtype=torch.int32, device=weight.fp_idx.device)
            if not torch.equal(weight.fp_idx, behind):
                module.int_idx, module.fp_idx = weight.int_idx, weight.fp_idx
        module._out_dtype, module.pattern = weight.w_out.dtype, weight.pattern
        if weight.rotated:
            module.base = hadamard.base_matrix(hadamard.factors(weight.k)[2]).clone()
            module.step = hadamard.sylvester(min(module._power, 64)).clone()
        module.bias = None if bias is None else bias.detach().clone()
        return module

    @property
    def n_base(self) -> int:
        """Base columns."""
        return self.in_features - self.outliers

    def to_weight(self) -> QuikWeight:
        """The canonical form back; exact inverse of :meth:`from_weight`."""
        n, k = self.out_features, self.n_base
        qweight, scales, _ = torch.ops.effk.wq_unpack(self.packed, self.scales, None, n, k, self.bits, 0)
        fp_idx, w_out = self.fp_idx, torch.empty((n, 0), dtype=self._out_dtype, device=self.packed.device)
        if fp_idx is None:
            fp_idx = torch.arange(k, self.in_features, dtype=torch.int32, device=self.packed.device)
        if self.outliers:
            w_out = torch.ops.effk.dense_unpack(self.w_out, n, self.outliers).to(self._out_dtype)
        return QuikWeight(
            WqWeight(n, k, self.bits, 0, qweight, scales), fp_idx, w_out, self.in_features, self.rotated, self.pattern
        )

    def dequantize(self) -> Tensor:
        """The weight as fp32 ``[N, K]``, for unrotated inputs."""
        return self.to_weight().dequantize()

    def rotate(self, x: Tensor) -> Tensor:
        """``x`` as the stored columns meet it."""
        if not self.rotated:
            return x
        return hadamard.apply(x, self.base, self.step, self._power)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` ``[..., in_features]`` to ``[..., out_features]`` of the same dtype."""
        if self._shared is not None and may_share(x):
            return self._shared.one(self, x)
        return self.alone(x)

    def alone(self, x: Tensor) -> Tensor:
        """``forward`` without sharing work with layers over the same input."""
        return self.product(self.rotate(x), self.bits_a, self._buffers["bias"])

    def product(self, x: Tensor, bits_a: int, bias: Tensor | None) -> Tensor:
        """The kernel's product of ``x``, already rotated, with activations of ``bits_a``."""
        b = self._buffers
        return torch.ops.effk.quik_linear.default(
            x, b["packed"], b["scales"], b["reduced"], b["w_out"], bias, b["int_idx"], b["fp_idx"],
            self.out_features, self.n_base, self.bits, bits_a, self.quantizer,
        )  # fmt: skip

    def extra_repr(self) -> str:
        rotated = ", rotated" if self.rotated else ""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"bits={self.bits}, bits_a={self.bits_a}, outliers={self.outliers}, quantizer={self.quantizer}{rotated}"
        )


class QuikMultiLinear(SiblingProducts):
    """Several :class:`QuikLinear` over one input in one kernel call: the input is split and rounded once for all.

    ``forward(x)`` returns all products, each bit for bit what its layer alone would give. :meth:`attach` makes the layers
    of an existing model share their calls.
    """

    def __init__(self, layers: Sequence[QuikLinear]) -> None:
        """Raises ValueError unless there are at least two layers that round the same columns of one input alike."""
        if len(layers) < 2 or not all(same_input(layers[0], layer) for layer in layers):
            raise ValueError(
                "QuikMultiLinear: layers: expected two or more that agree in in_features, outlier columns, bits_a and "
                f"quantizer, and are not rotated, got {[layer.extra_repr() for layer in layers]}"
            )
        super().__init__(layers)
        self._rows = [layer.out_features for layer in layers]
        self._bits = [layer.bits for layer in layers]

    def forward(self, x: Tensor) -> list[Tensor]:
        """Products of ``x`` ``[..., in_features]`` with every layer, in order."""
        buffers = [layer._buffers for layer in self._modules["layers"]._modules.values()]
        first = self.layers[0]
        return torch.ops.effk.quik_multi_linear.default(
            x,
            *([b[name] for b in buffers] for name in ("packed", "scales", "reduced", "w_out", "bias")),
            buffers[0]["int_idx"],
            buffers[0]["fp_idx"],
            self._rows,
            first.n_base,
            self._bits,
            first.bits_a,
            first.quantizer,
        )


def same_input(a: QuikLinear, b: QuikLinear) -> bool:
    """Whether two layers would round one input to the same numbers, so that one rounding serves both."""

    def key(layer: QuikLinear) -> tuple[object, ...]:
        return layer.in_features, layer.outliers, layer.bits_a, layer.quantizer, layer.rotated, layer.fp_idx is None

    if key(a) != key(b) or a.rotated:
        return False
    return a.fp_idx is None or torch.equal(a.fp_idx, b.fp_idx)
