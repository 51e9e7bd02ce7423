"""How much memory decoding takes, told before a model is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig

from .cache import KVCache
from .decoder import STEP_ROWS

_LAYER = (
    180 << 10
)  # bytes of a layer's Python objects and of what allocators round up, measured on SmolLM2 in 3 and 4 bits


@dataclass(frozen=True)
class Memory:
    """Bytes beside those of Python and its libraries.

    Attributes:
        weights: of the saved model, which packing leaves as large as they are, tables of rotary positions, and objects.
        cache: keys and values, allocated once, touched as sequences grow.
        work: intermediate results of a step at its longest, and logits.
    """

    weights: int
    cache: int
    work: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.cache + self.work


def predict(directory: str | Path, sequences: int, capacity: int, cache: str = "fp16") -> Memory:
    """What a saved, compressed model needs that runs on :class:`effk.runtime.decoder.Decoder`, read from its files' sizes.

    A plain model needs its dense weights twice, as the model keeps them and packed.

    Args:
        directory: written by :func:`effk.save`.
        sequences: at once.
        capacity: tokens of each.
        cache: dtype of keys and values: "fp16", "int8" or "fp32".

    Raises:
        FileNotFoundError: no weights there.
        ValueError: sizes below 1, an unknown dtype.
    """
    files = list(Path(directory).glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"memory: {directory}: expected a saved model with weights, got none")
    config = AutoConfig.from_pretrained(directory, local_files_only=True).get_text_config(decoder=True)
    width, heads = config.hidden_size, config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or width // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    with torch.device("meta"):
        keys = KVCache(config.num_hidden_layers, sequences, capacity, kv_heads, head_dim, cache).bytes
    inner = next(
        (n for name in ("intermediate_size", "ffn_dim", "n_inner") if (n := getattr(config, name, None))), 4 * width
    )
    rotary = hasattr(config, "rope_theta") or getattr(config, "rope_parameters", None) is not None
    tables = 4 * config.max_position_embeddings * head_dim if rotary else 0  # half cosines, half sines
    # fp32: twice the residual stream, q, k, v and what attention gives, gate and up; then x of the widest product as kernels want
    # it, with outliers twice (once transposed), and partial results of attention
    row = 4 * (2 * width + 2 * (heads + kv_heads) * head_dim + 2 * inner) + 8 * inner
    return Memory(
        weights=sum(file.stat().st_size for file in files) + tables + _LAYER * config.num_hidden_layers,
        cache=keys,
        work=row * min(STEP_ROWS, sequences * capacity) + 4 * sequences * config.vocab_size,
    )
