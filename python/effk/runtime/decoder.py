"""The engine: a decoder-only transformer, plain or compressed, run by ``torch.ops.effk.decoder_step``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..nn import QuikLinear, WqLinear
from ..nn.wq_embedding import WqEmbedding
from .cache import KVCache
from .errors import UnsupportedModel
from .structure import Structure, structure_of
from .weights import move_together, weight_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_OPS = torch.ops.effk
STEP_ROWS = 512  # of one call: more gain nothing (weights are read once per 512 rows) and need memory


class Decoder:
    """Runs the layers of a transformer in one call a step, over a preallocated cache.

    ``dtype`` is that of x in products: "bf16" for models in bf16 unless their layers round x to integers, else "fp32". Everything
    between the products is fp32. Sharing: weights of compressed layers are used where they are; dense ones are packed once.
    """

    def __init__(self, structure: Structure, dtype: str = "fp32") -> None:
        """Raises UnsupportedModel where a layer is of a kind that the runtime does not have."""
        self.vocab_size, self.max_positions = structure.vocab, structure.max_positions
        self.layers, self.kv_heads, self.head_dim = len(structure.blocks), structure.kv_heads, structure.head_dim
        self.dtype = dtype
        places = [
            (index, place, weight_of(module))
            for index, block in enumerate(structure.blocks)
            for place, modules in (("qkv", block.qkv), ("out", (block.out,)), ("up", block.up), ("down", (block.down,)))
            for module in modules
            if module is not None
        ]
        places.append((0, "head", weight_of(structure.head)))
        self.weight_bytes = move_together([weight for _, _, weight in places])  # that a step of one row reads
        self._handle = self._create(structure)
        for index, block in enumerate(structure.blocks):
            self._add_norm(index, "attention", block.attention_norm)
            self._add_norm(index, "ffn", block.ffn_norm)
        self._add_norm(0, "final", structure.final_norm)
        for index, place, weight in places:
            weight.add(self._handle, index, place)
        _OPS.decoder_finish(self._handle)

    @classmethod
    def from_model(cls, model: PreTrainedModel, dtype: str | None = None) -> Decoder:
        """The decoder of ``model``, a Llama, Mistral, Qwen2, OPT or GPT-2 of transformers, plain or compressed.

        Raises:
            UnsupportedModel: another architecture, or a layer or feature that the runtime does not have.
            ValueError: a model that is not on the CPU.
        """
        where = {str(t.device) for t in (*model.parameters(), *model.buffers())}
        if where - {"cpu"}:
            raise ValueError(f"Decoder: model: expected all weights on cpu, got {sorted(where)}")
        structure = structure_of(model)
        if dtype is None:
            first = structure.blocks[0].qkv[0] if structure.blocks else None
            rounds = isinstance(first, QuikLinear) or (isinstance(first, WqLinear) and first.compute == "int8")
            dtype = "bf16" if model.dtype == torch.bfloat16 and not rounds else "fp32"
        return cls(structure, dtype)

    def cache(self, sequences: int, capacity: int, dtype: str = "fp16") -> KVCache:
        """An empty cache for this decoder; ``capacity`` positions a sequence.

        Raises:
            ValueError: sizes below 1, more positions than the model has, an unknown dtype.
        """
        if capacity > self.max_positions:
            raise ValueError(
                f"Decoder.cache: capacity: expected at most {self.max_positions} positions, got {capacity}"
            )
        return KVCache(self.layers, sequences, capacity, self.kv_heads, self.head_dim, dtype)

    def step(self, runs: Sequence[tuple[int, Sequence[int]]], cache: KVCache, logits: str = "last") -> Tensor:
        """Append tokens to sequences: ``runs`` are pairs (slot, token ids).

        Returns fp32 logits: "last" ``[len(runs), vocab]``, "all" ``[tokens, vocab]`` in the order of the runs, "none"
        ``[0, vocab]``.

        Raises:
            ValueError: an empty run, a slot twice or not there, more tokens than the cache has room for. Nothing has happened.
            RuntimeError: a token outside the vocabulary. The cache's lengths are as before.
        """
        self._check(runs, cache, logits)
        if runs and sum(len(ids) for _, ids in runs) <= STEP_ROWS:
            return self._call(runs, cache, logits)
        pieces = [torch.empty(0, self.vocab_size)] if logits == "none" or not runs else []
        for chunk, last in self._chunks(runs):
            which = logits if logits != "last" or all(last) else "none" if not any(last) else "last"
            out = self._call(chunk, cache, which)
            if which == "last" and not all(last):
                out = out[[i for i, done in enumerate(last) if done]]
            if which != "none":
                pieces.append(out)
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def _check(self, runs: Sequence[tuple[int, Sequence[int]]], cache: KVCache, logits: str) -> None:
        if logits not in ("last", "all", "none"):
            raise ValueError(f"Decoder.step: logits: expected 'last', 'all' or 'none', got {logits!r}")
        seen = set()
        for slot, ids in runs:
            if not 0 <= slot < cache.sequences or slot in seen:
                raise ValueError(
                    f"Decoder.step: runs: expected slots 0 to {cache.sequences - 1}, each once, got {slot}"
                )
            seen.add(slot)
            length = cache.lengths[slot] + len(ids)
            if not ids or length > cache.capacity:
                raise ValueError(
                    f"Decoder.step: runs: expected 1 to {cache.capacity - cache.lengths[slot]} tokens for slot {slot}, "
                    f"got {len(ids)}"
                )

    def _chunks(self, runs: Sequence[tuple[int, Sequence[int]]]):  # noqa: ANN202
        """Calls of at most STEP_ROWS rows: pairs of their runs and, for each, whether its last token is there."""
        chunk: list[tuple[int, Sequence[int]]] = []
        last: list[bool] = []
        rows = 0
        for slot, ids in runs:
            at = 0
            while at < len(ids):
                take = min(len(ids) - at, STEP_ROWS - rows)
                chunk.append((slot, ids[at : at + take] if at or take < len(ids) else ids))
                at += take
                rows += take
                last.append(at == len(ids))
                if rows == STEP_ROWS:
                    yield chunk, last
                    chunk, last, rows = [], [], 0
        if chunk:
            yield chunk, last

    def _call(self, runs: Sequence[tuple[int, Sequence[int]]], cache: KVCache, which: str) -> Tensor:
        table, tokens, row = [], [], 0
        lengths = cache.lengths
        for slot, ids in runs:
            table.append((slot, lengths[slot], len(ids)))
            tokens.extend(ids)
            row += len(ids)
        rows = len(runs) if which == "last" else row if which == "all" else 0
        out = torch.empty(rows, self.vocab_size)
        _OPS.decoder_step.default(
            self._handle, torch.tensor(tokens), torch.tensor(table, dtype=torch.int32), *cache.tensors, which, out
        )  # fmt: skip
        for slot, _, count in table:
            lengths[slot] += count
        return out

    def _create(self, s: Structure) -> Tensor:
        table, scales, group = s.embedding, None, 0
        if isinstance(table, WqEmbedding):
            weight, scales, group = table.packed, table.scales, table.group_size
        elif type(table) is nn.Embedding or type(table).__name__.endswith("Embedding"):
            if getattr(table, "scale_embeddings", False) or getattr(table, "embed_scale", 1.0) != 1.0:
                raise UnsupportedModel("runtime: embedding: expected rows as they are, got scaled ones")
            weight = table.weight.detach().contiguous()
        else:
            raise UnsupportedModel(f"runtime: embedding: expected Embedding or WqEmbedding, got {type(table).__name__}")
        return _OPS.decoder_create(
            weight, scales, s.positions, s.vocab, s.width, len(s.blocks), s.heads, s.kv_heads, s.head_dim, s.inner,
            s.act, s.gated, s.scale, s.window, s.cosine, s.sine, self.dtype, group,
        )  # fmt: skip

    def _add_norm(self, index: int, place: str, norm: nn.Module) -> None:
        weight, bias = norm.weight.detach().float().contiguous(), getattr(norm, "bias", None)
        eps = getattr(norm, "variance_epsilon", None)
        centred = eps is None
        if centred and not isinstance(norm, nn.LayerNorm):
            raise UnsupportedModel(f"runtime: norm: expected LayerNorm or an RMS norm, got {type(norm).__name__}")
        bias = None if bias is None else bias.detach().float().contiguous()
        _OPS.decoder_norm(self._handle, index, place, weight, bias, norm.eps if centred else eps, centred)
