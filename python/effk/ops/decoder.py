"""``torch.ops.effk.decoder_*``: one step of a transformer decoder, all layers in one call.

Formula, for the tokens of a step (fp32 between products)::

    h = embedding[token] (+ positions[p])
    every layer:  q, k, v = W norm(h);  h += W_o attention(q, k, v, cache);  h += feed-forward(norm(h))
    feed-forward: W_d (act(W_g x) * W_u x), or W_d act(W_u x), or relu_ffn
    logits = W_head norm(h)      of the last token of every run, of all, or of none

A decoder is built once: ``decoder_create`` with its sizes and embedding, one ``decoder_norm``, ``decoder_dense``,
``decoder_wq``, ``decoder_quik`` or ``decoder_relu_ffn`` for every weight, ``decoder_finish``. Weights are checked there and never
copied: the decoder shares the tensors it was given, which must not change. It is an int32 tensor ``[1]`` that holds its number
and takes it along when it dies.

Operations (library ``effk``):

    decoder_create(embedding, scales, positions, vocab, width, layers, heads, kv_heads, head_dim, inner, act, gated, scale,
                   window, cosine, sine, dtype, group_size) -> decoder
        embedding (vocab, width) fp32, bf16 or fp16, or, with ``scales``, packed 8-bit codes of wq_linear in groups of
        group_size; positions fp32 (max, width) or None; cosine, sine fp32 (max, rotary / 2) or None; window 0: all positions;
        dtype "fp32" or "bf16": of x in products
    decoder_norm(decoder, layer, place, weight, bias, eps, centred)      place "attention", "ffn" or "final"; fp32 (width,)
    decoder_dense, decoder_wq, decoder_quik(decoder, layer, place, ...)  the weight as in dense_linear, wq_linear, quik_linear;
        place "qkv" (three calls, or one for all), "out", "up" (gate, then up), "down", "head"
    decoder_relu_ffn(decoder, layer, ...)                                in place of "up" and "down", as in relu_ffn
    decoder_finish(decoder)
    decoder_step(decoder, tokens, runs, k_cache, v_cache, k_scale, v_scale, which, logits)
        tokens int64 (rows,); runs int32 (n, 3): slot, first position, count, as in attention;
        caches (layers, ...) as in ``effk.ops.attention``, written in place; which "last", "all", "none"; logits fp32
        (n or rows or 0, vocab), written

A row's logits depend neither on the number of threads nor on the other runs of the step. Errors: RuntimeError naming operation,
argument, expected and got, before any work.

Source: Shen et al., "Efficient LLM Inference on CPUs", 2023 (arXiv:2311.00502), section 2.2 (a runtime of few fused operators
over a preallocated cache).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_NOTHING = (
    "decoder_norm", "decoder_dense", "decoder_wq", "decoder_quik", "decoder_relu_ffn", "decoder_finish", "decoder_step",
)  # fmt: skip


@torch.library.register_fake("effk::decoder_create")
def _create_fake(embedding: Tensor, *_: Any) -> Tensor:
    return embedding.new_empty((1,), dtype=torch.int32)


def _nothing(*_: Any) -> None:
    """They write into what they are given and return nothing."""


for _name in _NOTHING:
    torch.library.register_fake(f"effk::{_name}", _nothing)
