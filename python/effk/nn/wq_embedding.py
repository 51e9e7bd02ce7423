"""Token embedding in 8 bits, and a head tied to it."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from ..formats.wq import TILE_ROWS, WqWeight
from .wq_linear import WqLinear


class WqEmbedding(WqLinear):
    """Rows ``W[ids]`` of a symmetric 8-bit weight ``[num_embeddings, embedding_dim]``, in the dtype of the model.

    It holds the packed form of :class:`WqLinear`, from which single rows can be read, so that a tied head multiplies by
    the very same bytes (:class:`WqTiedHead`). ``forward`` maps int64 or int32 ids of any shape to ``[..., K]``.
    """

    format_buffers: ClassVar[tuple[str, ...]] = WqLinear.format_buffers

    def __init__(self, n: int, k: int, bits: int, group_size: int, compute: str = "float") -> None:
        super().__init__(n, k, bits, group_size, compute)
        self.num_embeddings, self.embedding_dim = n, k
        # Empty: only carries the dtype of the results, which follows ``.to(dtype)`` as a plain embedding's would.
        self.register_buffer("like", torch.empty(0), persistent=False)

    @classmethod
    def from_weight(cls, weight: WqWeight, bias: Tensor | None = None, compute: str = "float") -> WqEmbedding:
        """Pack an 8-bit symmetric weight; ``bias`` must be None.

        Raises:
            ValueError: other bits, zeros, codebook, outliers or a bias.
        """
        if weight.bits != 8 or weight.to_state().keys() != {"qweight", "scales"} or bias is not None:
            raise ValueError(
                "WqEmbedding: weight: expected 8 bits, symmetric, without codebook, outliers or bias, "
                f"got {weight.bits} bits with {sorted(weight.to_state())}"
            )
        return super().from_weight(weight, None, compute)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the rows that ``forward`` returns."""
        return self.like.dtype

    def forward(self, ids: Tensor) -> Tensor:
        """Rows for ``ids``, ``[*ids.shape, embedding_dim]``."""
        tile, row = ids // TILE_ROWS, ids % TILE_ROWS
        # t16 with 8 bits: a unit is [16 rows][4 k], so a row is byte [row, :] of every unit of its tile.
        units = self.packed.view(self.packed.shape[0], -1, TILE_ROWS, 4)
        codes = units[tile, :, row].flatten(-2)[..., : self.embedding_dim]
        scales = self.scales[tile, :, row].float()
        width = self.group_size or self.embedding_dim
        scales = scales.repeat_interleave(width, dim=-1)[..., : self.embedding_dim]
        return ((codes.float() - 128.0) * scales).to(self.like.dtype)

    def project(self, x: Tensor) -> Tensor:
        """``x W^T``: logits of hidden states ``[..., embedding_dim]``, by the kernel."""
        return super().forward(x)


class WqTiedHead(nn.Module):
    """A language-model head that owns nothing: it multiplies by the weight of a :class:`WqEmbedding`, plus a bias."""

    def __init__(self, embedding: WqEmbedding, bias: Tensor | None = None) -> None:
        super().__init__()
        object.__setattr__(self, "_embedding", embedding)  # not registered: it moves, saves and loads with the model
        self.register_buffer("bias", None if bias is None else bias.detach().clone())
        self.in_features, self.out_features = embedding.embedding_dim, embedding.num_embeddings

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[..., num_embeddings]`` of ``x`` ``[..., embedding_dim]``."""
        logits = self._embedding.project(x)
        return logits if self.bias is None else logits + self.bias

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, tied to the embedding"
