"""ReLU behind a normalisation: stage 2 of relufication."""

from __future__ import annotations

from torch import Tensor, nn


class ReluNorm(nn.Module):
    """``relu(norm(x))``: the inputs of the projections behind it become sparse (Mirzadeh et al., 2310.04564, stage 2).

    ``norm`` keeps its parameters.
    """

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        if isinstance(norm, ReluNorm):
            raise ValueError("ReluNorm: norm: expected a norm without a ReLU behind it, got one that has it")
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x).relu()
