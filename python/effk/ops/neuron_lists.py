"""Pieces of :mod:`effk.ops.relu_ffn` as operations of their own: lists of neurons, products with listed rows, masks.

A list is ``index`` int32, ascending, and ``count``; behind the list index is -1 and values are 0. A mask is uint8
``(rows, ceil(n / 8))``, bit i % 8 of byte i // 8, zeros beyond n: what relu_ffn takes as ``mask``. Operations (library
``effk``), x ``(tokens, d)`` fp32, bf16 or fp16, rows as of ``relu_ffn_pack``, sums in fp32::

    nz_compact(x, threshold) -> (index (tokens, d), value fp32 (tokens, d), count (tokens,))
        the j with not |x_j| <= threshold_j (fp32, one or one an input, at least 0; None: 0); NaN is kept
    rows_dot(x, w, scales, bias, index (n,), count (1,), rows) -> fp32 (tokens, n)
        w[index[i]] . x + bias[index[i]], 0 behind the list
    rows_axpy(value fp32 (tokens, n), index, count, w, scales, bias, rows, d, dtype) -> (tokens, d) of dtype
        sum_i value_i w[index[i]] + bias, i ascending; dtype "fp32", "bf16" or "fp16"
    mask_lowrank(x, p1, p2, s1, s2, act, threshold, rows, r) -> mask of f
        p2 act(p1 x) >= threshold (fp32, one or one a neuron); p1 rows of r, p2 rows of f; act "none" or "relu"
    mask_sign(x, signs, alpha) -> mask of f
        not neg > alpha (d - neg), neg the number of inputs whose sign is not the weight's; signs uint8 (f, ceil(d / 8)),
        ones where the weight is negative
    mask_dynk(r fp32 (tokens, experts), tau, rule) -> (mask, count (tokens,))
        r at least 0. "largest": r_i >= (1 - tau) max r. "share": the shortest prefix of r in falling order, ties to the lower
        index, whose shares of the sum reach tau in fp32; one at least
    mask_topk(score fp32 (tokens, n), k, group) -> mask of ceil(n / group)
        the k groups with the largest score in them, ties to the lower; NaN is largest
    mask_union(mask) -> (mask (1, bytes), number of bits (1,))

Errors: RuntimeError naming the operation, the argument, what was expected and what came, before any work; a list that is not
rising or names rows that are not there is one.

Source: Deja Vu (arXiv:2310.17157, low rank, top k), SparseInfer (2411.12692, signs), D2DMoE (2310.04361, dynamic k).
"""

from __future__ import annotations

import torch
from torch import Tensor


def mask_bytes(n: int) -> int:
    """Bytes of a row of a mask of n bits."""
    return -(-n // 8)


def pack_mask(bits: Tensor) -> Tensor:
    """bool ``(rows, n)`` as a mask."""
    padded = torch.nn.functional.pad(bits, (0, -bits.shape[1] % 8)).unflatten(1, (-1, 8))
    return (padded.int() << torch.arange(8)).sum(2).to(torch.uint8)


# ---- float64 references, on plain weights and with bool masks ----------------------------------------


def reference_compact(x: Tensor, threshold: Tensor | None = None) -> list[Tensor]:
    """The kept indices of each token."""
    kept = ~(x.double().abs() <= (0.0 if threshold is None else threshold.double()))
    return [row.nonzero()[:, 0] for row in kept]


def reference_dot(x: Tensor, w: Tensor, index: Tensor, bias: Tensor | None = None) -> Tensor:
    """Products of the listed rows of ``w (f, d)``."""
    y = x.double() @ w.double()[index].T
    return y if bias is None else y + bias.double()[index]


def reference_axpy(value: Tensor, w: Tensor, index: Tensor, bias: Tensor | None = None) -> Tensor:
    """Sums of the listed rows of ``w (f, d)``."""
    y = value.double()[:, : len(index)] @ w.double()[index]
    return y if bias is None else y + bias.double()


def reference_lowrank(x: Tensor, p1: Tensor, p2: Tensor, act: str, threshold: Tensor) -> Tensor:
    """bool ``(tokens, f)``."""
    hidden = x.double() @ p1.double().T
    return (hidden.relu() if act == "relu" else hidden) @ p2.double().T >= threshold.double()


def reference_sign(x: Tensor, w: Tensor, alpha: Tensor) -> Tensor:
    """bool ``(tokens, f)`` of weights ``w (f, d)``."""
    neg = ((x < 0)[:, None] != (w < 0)[None]).sum(2)
    return ~(neg > alpha.double() * (x.shape[1] - neg))


# ---- shapes, for torch.compile and export ------------------------------------------------------------

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@torch.library.register_fake("effk::nz_compact")
def _(x, threshold):
    index = x.new_empty(x.shape, dtype=torch.int32)
    return index, x.new_empty(x.shape, dtype=torch.float32), x.new_empty(x.shape[:1], dtype=torch.int32)


@torch.library.register_fake("effk::rows_dot")
def _(x, w, scales, bias, index, count, rows):
    return x.new_empty((x.shape[0], index.shape[0]), dtype=torch.float32)


@torch.library.register_fake("effk::rows_axpy")
def _(value, index, count, w, scales, bias, rows, d, dtype):
    return value.new_empty((value.shape[0], d), dtype=_DTYPES[dtype])


@torch.library.register_fake("effk::mask_lowrank")
def _(x, p1, p2, s1, s2, act, threshold, rows, r):
    return x.new_empty((x.shape[0], mask_bytes(p2.shape[0])), dtype=torch.uint8)


@torch.library.register_fake("effk::mask_sign")
def _(x, signs, alpha):
    return x.new_empty((x.shape[0], mask_bytes(signs.shape[0])), dtype=torch.uint8)


@torch.library.register_fake("effk::mask_dynk")
def _(r, tau, rule):
    mask = r.new_empty((r.shape[0], mask_bytes(r.shape[1])), dtype=torch.uint8)
    return mask, r.new_empty(r.shape[:1], dtype=torch.int32)


@torch.library.register_fake("effk::mask_topk")
def _(score, k, group):
    return score.new_empty((score.shape[0], mask_bytes(-(-score.shape[1] // group))), dtype=torch.uint8)


@torch.library.register_fake("effk::mask_union")
def _(mask):
    return mask.new_empty((1, mask.shape[1])), mask.new_empty((1,), dtype=torch.int32)


# ---- no gradients ------------------------------------------------------------------------------------

NAMES = ("nz_compact", "rows_dot", "rows_axpy", "mask_lowrank", "mask_sign", "mask_dynk", "mask_topk", "mask_union")


def _no_gradient(name: str) -> None:
    def backward(ctx: object, *grads: object) -> object:
        raise RuntimeError(f"{name}: expected inputs without gradients, the operation has none")

    torch.library.register_autograd(f"effk::{name}", backward)


for _name in ("nz_compact", "rows_dot", "rows_axpy"):
    _no_gradient(_name)
