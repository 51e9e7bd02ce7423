"""Keys and values of the sequences that a decoder is working on."""

from __future__ import annotations

from torch import Tensor

from ..ops import attention


class KVCache:
    """Room for ``sequences`` slots of ``capacity`` positions in every layer, allocated once: nothing moves while they grow.

    ``dtype`` "fp16" (the default), "int8" (a scale for every position and head, half the bytes) or "fp32". ``lengths[slot]``
    positions of a slot are in use.
    """

    def __init__(
        self, layers: int, sequences: int, capacity: int, kv_heads: int, head_dim: int, dtype: str = "fp16"
    ) -> None:
        """Raises ValueError for a size below 1 or an unknown dtype."""
        for name, value in (("sequences", sequences), ("capacity", capacity)):
            if value < 1:
                raise ValueError(f"KVCache: {name}: expected 1 or more, got {value}")
        if dtype not in attention.TYPES:
            raise ValueError(f"KVCache: dtype: expected one of {attention.TYPES}, got {dtype!r}")
        self.sequences, self.capacity, self.dtype = sequences, capacity, dtype
        self.lengths = [0] * sequences
        self.tensors: tuple[Tensor, Tensor, Tensor | None, Tensor | None] = attention.cache(
            sequences, kv_heads, capacity, head_dim, dtype, layers=layers
        )

    @property
    def bytes(self) -> int:
        """Bytes of the whole cache, used or not."""
        return sum(t.numel() * t.element_size() for t in self.tensors if t is not None)

    def truncate(self, slot: int, length: int) -> None:
        """Forget the positions from ``length`` on; 0 frees the slot.

        Raises:
            ValueError: a slot that is not there, or a length that it does not have.
        """
        if not 0 <= slot < self.sequences:
            raise ValueError(f"KVCache.truncate: slot: expected 0 to {self.sequences - 1}, got {slot}")
        if not 0 <= length <= self.lengths[slot]:
            raise ValueError(f"KVCache.truncate: length: expected 0 to {self.lengths[slot]}, got {length}")
        self.lengths[slot] = length
