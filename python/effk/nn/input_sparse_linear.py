"""Linear layers that read only the columns of inputs above a threshold, on ``torch.ops.effk.input_sparse_linear``."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..formats.neuron import check_rows, from_stored, to_stored
from .frozen import FrozenDtypes

_MOST_TOKENS = 8  # that share one list of columns in the kernel


class InputSparseLinear(FrozenDtypes):
    """``y = sum_j x_j W[:, j] + bias`` over the inputs j with ``|x_j| > threshold_j``; frozen.

    Exact where the threshold is 0 (None); above 0 an approximation of the dense layer, applied to every token alike.
    Up to eight tokens run on the kernel, which reads only the columns it needs; more, and inputs with gradients, on
    PyTorch.

    Buffers: ``columns`` packed rows of ``W^T`` (csrc/formats/neuron.h), ``scales``, ``bias`` and ``threshold`` fp32.
    """

    format_buffers: ClassVar[tuple[str, ...]] = ("columns", "scales", "bias", "threshold")

    def __init__(self, n: int, k: int, rows: str = "fp32", group: int = 0) -> None:
        super().__init__()
        check_rows("InputSparseLinear", rows, group)
        self.out_features, self.in_features, self.rows, self.group = n, k, rows, group
        for name in self.format_buffers:
            self.register_buffer(name, None)

    @classmethod
    def from_weight(
        cls,
        weight: Tensor,
        bias: Tensor | None = None,
        threshold: Tensor | float | None = None,
        rows: str = "fp32",
        group: int = 0,
    ) -> InputSparseLinear:
        """Pack ``weight`` ``[n, k]``.

        Raises:
            ValueError: a bias or thresholds of another length, or thresholds below 0.
        """
        n, k = weight.shape
        module = cls(n, k, rows, group)
        packed, scales = torch.ops.effk.relu_ffn_pack(weight.detach().contiguous(), True, rows, group)
        return module.finish(packed, scales if scales.numel() else None, bias, threshold)

    def finish(
        self, columns: Tensor, scales: Tensor | None, bias: Tensor | None, threshold: Tensor | float | None
    ) -> InputSparseLinear:
        """Check and take the tensors."""
        self.columns, self.scales = columns, scales
        if bias is not None and tuple(bias.shape) != (self.out_features,):
            raise ValueError(f"InputSparseLinear: bias: expected [{self.out_features}], got {list(bias.shape)}")
        self.bias = None if bias is None else bias.detach().float().contiguous().clone()
        if threshold is not None:
            values = torch.as_tensor(threshold).detach().float().reshape(-1).clone()
            if values.numel() not in (1, self.in_features) or not bool((values >= 0).all()):
                raise ValueError(f"InputSparseLinear: threshold: expected 1 or {self.in_features} values of at least 0")
            self.threshold = values
        return self

    @classmethod
    def from_stored(
        cls,
        stored: dict[str, Tensor],
        n: int,
        k: int,
        rows: str,
        group: int,
        bias: Tensor | None,
        threshold: Tensor | None,
    ) -> InputSparseLinear:
        """Exact inverse of :meth:`stored`."""
        return cls(n, k, rows, group).finish(*from_stored(stored, rows, n), bias, threshold)

    def stored(self) -> dict[str, Tensor]:
        """What a file holds of ``W^T`` (:mod:`effk.formats.neuron`)."""
        return to_stored(self.columns, self.scales, self.rows, self.out_features)

    @property
    def exact(self) -> bool:
        """Whether only zeros are left out."""
        return self.threshold is None or not bool(self.threshold.any())

    def to_dense(self) -> Tensor:
        """The weight ``[n, k]``, fp32."""
        return torch.ops.effk.relu_ffn_unpack(self.columns, self.scales, self.rows, self.out_features).t()

    def kept(self, x: Tensor) -> Tensor:
        """Which inputs count, bool like x."""
        cut = torch.zeros(1) if self.threshold is None else self.threshold
        return ~(x.float().abs() <= cut)

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() // self.in_features > _MOST_TOKENS or (x.requires_grad and torch.is_grad_enabled()):
            bias = None if self.bias is None else self.bias.to(x.dtype)
            return linear(torch.where(self.kept(x), x, 0.0), self.to_dense().to(x.dtype), bias)
        b = self._buffers
        return torch.ops.effk.input_sparse_linear.default(
            x.contiguous(), b["columns"], b["scales"], b["bias"], b["threshold"], self.rows, self.out_features
        )[0]

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"rows={self.rows}, {'exact' if self.exact else 'approximate'}"
        )
