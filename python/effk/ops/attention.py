"""``torch.ops.effk.attention``: rotary positions, appending to a preallocated key-value cache and causal attention with
grouped queries, in one call.

Formula, for a token at position p of sequence ``slot`` and head h, with G = heads / kv_heads::

    q', k' = q, k with channels (i, i + R), i < R, turned: (x cos[p, i] - y sin[p, i], y cos[p, i] + x sin[p, i])
    cache[slot, p] = k', v                          rounded to the type of the cache
    out[h] = sum_j softmax_j(scale q'[h] . key[j, h // G]) value[j, h // G]     over j <= p, with a window j > p - window

Keys and values are read as the cache stores them, those of the same call too: feeding a sequence at once or token by token
gives the same bits, and so does any number of threads and any company in the batch. Only values that are not finite can
reach other tokens of the same run. The softmax is fp32; an int8 cache rounds q' to 15 bits of its head's largest value.

Operation (library ``effk``)::

    attention(q, k, v, k_cache, v_cache, k_scale, v_scale, runs, cosine, sine, scale, window) -> out
        q (tokens, heads, D), k, v (tokens, kv_heads, D): fp32, bf16 or fp16; D a multiple of 16 up to 256
        k_cache, v_cache, k_scale, v_scale: from cache(...), written in place
        runs int32 (n, 3): slot, start, count. The next `count` tokens go to positions start.. of `slot`, below which the
        cache holds the sequence already. Slots are different; counts add up to `tokens`.
        cosine, sine fp32 (positions, R), 2 R <= D, or None: no rotary positions
        scale of the scores, 1 / sqrt(D) as a rule; window: 0 or the number of positions that a token sees, itself included
        out like q

Errors: RuntimeError naming the operation, the argument, what was expected and what came, before any work. No
gradient: torch warns when one is asked for.

Source: grouped queries Ainslie et al. 2023 (arXiv:2305.13245); running maximum Milakov and Gimelshein 2018 (1805.02867),
in blocks as in Dao et al. 2022 (2205.14135); rotary positions Su et al. 2021 (2104.09864), halves paired as transformers does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _C

TYPES = ("fp16", "int8", "fp32")
DTYPES = {"fp16": torch.float16, "int8": torch.int8, "fp32": torch.float32}
Cache = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


def cache(
    slots: int, kv_heads: int, capacity: int, head_dim: int, dtype: str = "fp16", layers: int | None = None
) -> Cache:
    """(k_cache, v_cache, k_scale, v_scale) for ``slots`` sequences of up to ``capacity`` tokens; layout: csrc/formats/kv.h.

    k (slots, kv_heads, P / 16, D, 16), of int8 uint8 (slots, kv_heads, P / 16, D / 4, 16, 4); v (slots, kv_heads, P, D);
    scales of int8 fp32 (slots, kv_heads, P), else None. P is the capacity in whole tiles of 16. With ``layers``, a dimension of
    that many stands before the others, for a decoder. ValueError for an impossible size or dtype.
    """
    if dtype not in TYPES:
        raise ValueError(f"attention.cache: dtype: expected one of {', '.join(TYPES)}, got {dtype!r}")
    for name, value in (("slots", slots), ("kv_heads", kv_heads), ("capacity", capacity)):
        if value < 1:
            raise ValueError(f"attention.cache: {name}: expected at least 1, got {value}")
    if head_dim % 16 or not 16 <= head_dim <= _C.kv_max_head_dim:
        raise ValueError(
            f"attention.cache: head_dim: expected a multiple of 16 up to {_C.kv_max_head_dim}, got {head_dim}"
        )
    tile, lead = _C.kv_tile, () if layers is None else (layers,)
    tiles = -(-capacity // tile)
    if dtype == "int8":
        k = torch.empty(*lead, slots, kv_heads, tiles, head_dim // 4, tile, 4, dtype=torch.uint8)
        scales = [torch.empty(*lead, slots, kv_heads, tiles * tile) for _ in range(2)]
    else:
        k = torch.empty(*lead, slots, kv_heads, tiles, head_dim, tile, dtype=DTYPES[dtype])
        scales = [None, None]
    return k, torch.empty(*lead, slots, kv_heads, tiles * tile, head_dim, dtype=DTYPES[dtype]), scales[0], scales[1]


def cached(parts: Cache, slot: int, length: int) -> tuple[Tensor, Tensor]:
    """The first ``length`` keys and values of a sequence, (length, kv_heads, D) in float64, as the kernels read them."""
    k, v, k_scale, v_scale = (None if t is None else t[slot].double() for t in parts)
    if k_scale is not None:
        k = (k - 128).movedim(-1, 3).flatten(2, 3)
    keys = k.movedim(-1, 2).flatten(1, 2)
    if k_scale is not None:
        keys, v = keys * k_scale[..., None], v * v_scale[..., None]
    return keys[:, :length].transpose(0, 1), v[:, :length].transpose(0, 1)


# ---- float64 reference ---------------------------------------------------------------------------


def turn(x: Tensor, cosine: Tensor | None, sine: Tensor | None, start: int) -> Tensor:
    """Rotary positions start.. of x ``(tokens, heads, D)``, in float64."""
    x = x.double()
    if cosine is None:
        return x
    half = cosine.shape[1]
    c, s = (t[start : start + len(x), None].double() for t in (cosine, sine))
    a, b = x[..., :half], x[..., half : 2 * half]
    return torch.cat([a * c - b * s, b * c + a * s, x[..., 2 * half :]], -1)


def reference(
    q: Tensor,
    parts: Cache,
    runs: Sequence[Sequence[int]],
    cosine: Tensor | None = None,
    sine: Tensor | None = None,
    scale: float = 1.0,
    window: int = 0,
) -> Tensor:
    """out in float64 over a cache that the tokens of ``runs`` were already written to."""
    out, row = [], 0
    for slot, start, count in runs:
        keys, values = cached(parts, slot, start + count)
        group = q.shape[1] // keys.shape[1]
        x = turn(q[row : row + count], cosine, sine, start)
        scores = scale * torch.einsum("thd,jhd->htj", x, keys.repeat_interleave(group, 1))
        p, j = torch.arange(start, start + count)[:, None], torch.arange(start + count)[None]
        hidden = (j > p) | (j <= p - window if window else torch.zeros((), dtype=torch.bool))
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        out.append(torch.einsum("htj,jhd->thd", weights, values.repeat_interleave(group, 1)))
        row += count
    return torch.cat(out) if out else q.double()


# ---- shapes, for torch.compile and export --------------------------------------------------------


@torch.library.register_fake("effk::attention")
def _(q, k, v, k_cache, v_cache, k_scale, v_scale, runs, cosine, sine, scale, window):
    return torch.empty_like(q)


def kernels() -> list[dict[str, Any]]:
    """The kernels there are, best first."""
    return [row for row in _C.kernel_table() if row["op"] == "attention"]
