"""The interface of the runtime's decoder on top of any decoder of transformers, for models that the runtime does not know.

Each sequence has a cache and a forward call of its own: a batch costs the sum of its sequences, and a row's result
cannot depend on the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .errors import UnsupportedModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class HuggingFaceCache:
    """Keys and values of several sequences as transformers keeps them: they are copied whenever they grow.

    Attributes:
        lengths: tokens that each slot holds.
        sequences: slots.
        capacity: tokens that a slot can hold at most.
    """

    def __init__(self, sequences: int, capacity: int) -> None:
        from transformers import DynamicCache

        if sequences < 1 or capacity < 1:
            raise ValueError(f"cache: expected positive sequences and capacity, got {sequences} and {capacity}")
        self.sequences, self.capacity = sequences, capacity
        self.lengths = [0] * sequences
        # Without a config no layer forgets what left its sliding window, so that any length can be restored; the
        # model's masks hide it.
        self.slots = [DynamicCache() for _ in range(sequences)]

    def truncate(self, slot: int, length: int) -> None:
        """Forget the positions from ``length`` on; 0 frees the slot."""
        held = self.lengths[slot]
        if not 0 <= length <= held:
            raise ValueError(f"truncate: length: expected 0 to {held}, which slot {slot} holds, got {length}")
        if length == 0:
            self.slots[slot].reset()
        elif length < held:
            for layer in self.slots[slot].layers:
                layer.crop(length - held)
        self.lengths[slot] = length

    @property
    def bytes(self) -> int:
        """Of all keys and values held now."""
        layers = [layer for slot in self.slots for layer in slot.layers if layer.is_initialized]
        return sum(part.nbytes for layer in layers for part in (layer.keys, layer.values))


class HuggingFaceDecoder:
    """A decoder over ``model.forward``; see the module.

    Raises:
        UnsupportedModel: the model keeps something else than keys and values, or is no decoder.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        from transformers import DynamicCache
        from transformers.cache_utils import DynamicLayer

        name = type(model).__name__
        config = model.config.get_text_config(decoder=True)
        if model.config.is_encoder_decoder or not getattr(model, "can_generate", lambda: False)():
            raise UnsupportedModel(f"{name}: expected a decoder of text")
        layers = DynamicCache(config=model.config).layers
        other = next((layer for layer in layers if not isinstance(layer, DynamicLayer)), None)
        if other is not None or not model._supports_default_dynamic_cache():
            raise UnsupportedModel(f"{name}: expected layers that keep keys and values only")
        self.model = model
        self.vocab_size = int(config.vocab_size)
        positions = getattr(config, "max_position_embeddings", None)  # none: of any length
        self.max_positions = positions if isinstance(positions, int) else 1 << 20

    def cache(self, sequences: int, capacity: int, dtype: str = "fp16") -> HuggingFaceCache:
        """An empty cache; ``dtype`` is the model's own, whatever is asked for."""
        return HuggingFaceCache(sequences, capacity)

    @torch.inference_mode()
    def step(self, runs: Sequence[tuple[int, Sequence[int]]], cache: HuggingFaceCache, logits: str = "last") -> Tensor:
        """Append tokens to slots.

        Args:
            runs: pairs of slot and token ids to append there; a slot at most once.
            cache: made by :meth:`cache`; its lengths grow.
            logits: "last": fp32 ``[len(runs), vocab]``, after each run; "all": ``[tokens, vocab]``, after each token;
                "none": ``[0, vocab]``.

        Raises:
            ValueError: before any work: no tokens, a slot or an id that is not there, no room.
        """
        self._check(runs, cache, logits)
        rows = []
        for slot, ids in runs:
            keep = len(ids) if logits == "all" else 1
            batch = torch.tensor([list(ids)], dtype=torch.int64, device=self.model.device)
            past = cache.slots[slot]
            output = self.model(input_ids=batch, past_key_values=past, use_cache=True, logits_to_keep=keep).logits
            cache.lengths[slot] += len(ids)
            rows.append(output[0, -keep:].float().cpu())
        return torch.cat(rows) if logits != "none" and rows else torch.empty(0, self.vocab_size)

    def _check(self, runs: Sequence[tuple[int, Sequence[int]]], cache: HuggingFaceCache, logits: str) -> None:
        if logits not in ("last", "all", "none"):
            raise ValueError(f"step: logits: expected last, all or none, got {logits!r}")
        slots = [slot for slot, _ in runs]
        if len(set(slots)) != len(slots) or not all(0 <= slot < cache.sequences for slot in slots):
            raise ValueError(f"step: runs: expected different slots of 0 to {cache.sequences - 1}, got {slots}")
        for slot, ids in runs:
            if not ids or min(ids) < 0 or max(ids) >= self.vocab_size:
                raise ValueError(
                    f"step: runs: slot {slot}: expected token ids below {self.vocab_size}, got {ids!r:.60}"
                )
            if cache.lengths[slot] + len(ids) > cache.capacity:
                raise ValueError(
                    f"step: runs: slot {slot}: expected at most {cache.capacity} tokens, "
                    f"got {cache.lengths[slot]} + {len(ids)}"
                )
