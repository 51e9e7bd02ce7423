"""Our quik_linear: the integer product, the fused layer, the same steps as operations of their own, and wq_linear."""

from __future__ import annotations

import torch
from torch import Tensor

import effk
from effk.ops import quik_linear as ql

from .quik_problem import BITS_A, FEW, LAYER, PRODUCT, Base, Made, Problem, rotating

NAME, VERSION = "effk quik_linear", effk.__version__
PARTS = "effk separate operations"
WQ = "effk wq_linear"
ops = torch.ops.effk


def copies(problem: Problem, base: Base, outliers: bool = True) -> list[tuple[Tensor, Tensor | None]]:
    """Cold copies of what a call reads."""
    p = base.packed
    nbytes = p.packed.numel() + (p.w_out.numel() if p.w_out is not None else 0)
    count = problem.rotation(nbytes)
    return [(p.packed.clone(), None if p.w_out is None else p.w_out.clone()) for _ in range(count)]


def product(problem: Problem, kind: str, bits: int, outliers: bool) -> Made | None:
    """int8 codes times a weight of 8 or 4 bits."""
    if kind != PRODUCT or outliers:
        return None
    n, k = problem.layer.n, problem.layer.k
    half = 1 << (bits - 1)
    weight = problem.int_weight(bits)
    from effk.formats.wq import WqWeight

    codes = (weight.short() + half).to(torch.uint8)
    packed = ql.pack(WqWeight.from_codes(codes, torch.ones(n, 1), bits=bits, group_size=0)).packed
    weights = [packed.clone() for _ in range(problem.rotation(packed.numel()))]
    call = rotating(weights, lambda w: ops.quik_int_matmul(problem.codes, w, n, k, bits, BITS_A))
    return Made(call, problem.match_product(bits))


def fused(problem: Problem, kind: str, bits: int, outliers: bool) -> Made | None:
    """The layer, x in bf16."""
    if kind != LAYER:
        return None
    base, x = problem.base(bits, outliers), problem.x.bfloat16()
    p = base.packed

    def call(w: tuple[Tensor, Tensor | None]) -> Tensor:
        return ops.quik_linear(
            x,
            w[0],
            p.w_scale,
            p.w_reduced,
            w[1],
            None,
            base.int_idx,
            base.fp_idx,
            p.f_out,
            p.n_base,
            bits,
            BITS_A,
            "kernel",
        )

    match = problem.match_quik(base, torch.bfloat16, problem.m <= FEW)
    return Made(rotating(copies(problem, base), call), match)


def separate(problem: Problem, kind: str, bits: int, outliers: bool) -> Made | None:
    """The same steps, each an operation of ours with a result in memory."""
    if kind != LAYER or not outliers or problem.m <= FEW:
        return None
    base, x = problem.base(bits, outliers), problem.x.bfloat16()
    p = base.packed

    def call(w: tuple[Tensor, Tensor | None]) -> Tensor:
        qx, s, z, x_out = ops.quik_quantize(x, base.int_idx, base.fp_idx, p.n_base, BITS_A, "kernel")
        y = ops.dense_linear(x_out, w[1], p.f_out, None, "none")
        acc = ops.quik_int_matmul(qx, w[0], p.f_out, p.n_base, bits, BITS_A)
        return ops.quik_dequantize(acc, s, z, p.w_scale, p.w_reduced, y, BITS_A, "bf16")

    return Made(rotating(copies(problem, base), call), problem.match_quik(base, torch.bfloat16, False))


def weight_only(problem: Problem, kind: str, bits: int, outliers: bool) -> Made | None:
    """wq_linear on the same bytes for few rows; outliers by dense_linear, and the sum of both."""
    if kind != LAYER or problem.m > FEW:
        return None
    base, x = problem.base(bits, outliers), problem.x.bfloat16()
    p = base.packed
    x_base = x if base.int_idx is None else x[:, base.int_idx.long()].contiguous()

    def call(w: tuple[Tensor, Tensor | None]) -> Tensor:
        y = ops.wq_linear(x_base, w[0], p.w_scale, *[None] * 6, p.f_out, p.n_base, bits, 0, "float")
        return y if w[1] is None else y + ops.dense_linear(x[:, base.fp_idx], w[1], p.f_out, None, "none")

    weights = copies(problem, base)
    return Made(rotating(weights, call), problem.match_quik(base, torch.bfloat16, True))
