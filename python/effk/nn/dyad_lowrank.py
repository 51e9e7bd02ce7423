"""A DYAD layer with a remainder of low rank."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from .dyad_linear import DyadLinear


class DyadLowRank(nn.Module):
    """``y = dyad(x) + A B x``, with ``A (out_features, rank)`` and ``B (rank, in_features)``; x ``(..., in_features)``.

    What a dense matrix leaves behind when it is converted is often of low rank; A and B cost ``rank (in + out)``
    parameters and two products of PyTorch. B starts as :class:`DyadLinear` draws its weights, A at zero.
    """

    def __init__(self, dyad: DyadLinear, rank: int) -> None:
        super().__init__()
        if rank < 1:
            raise ValueError(f"DyadLowRank: rank: expected at least 1, got {rank}")
        self.dyad = dyad
        self.in_features, self.out_features = dyad.in_features, dyad.out_features
        like = {"dtype": dyad.wl.dtype, "device": dyad.wl.device}
        self.a = nn.Parameter(torch.zeros(self.out_features, rank, **like))
        self.b = nn.Parameter(torch.empty(rank, self.in_features, **like))
        nn.init.uniform_(self.b, -(self.in_features**-0.5), self.in_features**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` ``(..., in_features)`` to ``(..., out_features)``."""
        return self.dyad(x) + linear(linear(x, self.b), self.a)

    def extra_repr(self) -> str:
        return f"rank={self.a.shape[1]}"
