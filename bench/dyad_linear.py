"""Our DYAD layers: packed forward, training step through autograd, and the fused feed-forward."""

from __future__ import annotations

import torch
from torch import Tensor

import effk
from effk.ops import dense_linear as dl
from effk.ops import dyad_linear as dy

from .dyad_problem import ACT, FF, FORWARD, TRAINING, VARIANT, Made, Problem, as_training, rotating

NAME, VERSION = "effk dyad_linear", effk.__version__
GATHERED = "effk products of gathered blocks"


def function(problem: Problem, kind: str, n: int, threads: int) -> Made | None:
    """The call of a kind with n blocks."""
    if not n:
        return None
    ops, f_out, what = torch.ops.effk, problem.layer.f_out, kind.partition(" ")[0]
    wl, wu = problem.weights(n)
    if what == TRAINING:
        return as_training(
            problem, lambda x, wl, wu: ops.dyad_linear(x, wl, wu, None, VARIANT, "tokens", "none"), (wl, wu)
        )
    packed = dy.pack(wl, wu, VARIANT)
    if what == FORWARD:
        copies = [packed.clone() for _ in range(problem.rotation(packed.numel()))]
        return rotating(
            problem, copies, lambda x, w: ops.dyad_linear_packed(x, w, f_out, None, VARIANT, "tokens", "none")
        )
    back = dy.pack(*problem.weights(n, second=True), VARIANT)
    pairs = [(packed.clone(), back.clone()) for _ in range(problem.rotation(2 * packed.numel()))]
    sides = f_out, problem.layer.f_in
    return rotating(problem, pairs, lambda x, w: ops.dyad_ff(x, w[0], None, w[1], None, *sides, ACT, VARIANT))


def two_calls(problem: Problem, kind: str, n: int, threads: int) -> Made | None:
    """A feed-forward as two layers: what fusing them saves."""
    if not kind.startswith(FF) or not n:
        return None
    first, second = dy.pack(*problem.weights(n), VARIANT), dy.pack(*problem.weights(n, second=True), VARIANT)
    pairs = [(first.clone(), second.clone()) for _ in range(problem.rotation(2 * first.numel()))]
    ops, f_out, f_in = torch.ops.effk, problem.layer.f_out, problem.layer.f_in

    def both(x: Tensor, w: tuple[Tensor, Tensor]) -> Tensor:
        h = ops.dyad_linear_packed(x, w[0], f_out, None, VARIANT, "tokens", ACT)
        return ops.dyad_linear_packed(h, w[1], f_in, None, VARIANT, "tokens", "none")

    return rotating(problem, pairs, both)


def gathered(problem: Problem, kind: str, n: int, threads: int) -> Made | None:
    """The products of the blocks alone, [x_d | residue d] gathered beforehand: what taking x apart costs beside them.

    Each product writes a result of its own.
    """
    if not kind.startswith(FORWARD) or not n or problem.tokens == 1:
        return None
    d_in, d_out = problem.layer.f_in // n, problem.layer.f_out // n
    wl, wu = problem.weights(n)
    packed = [dl.pack(torch.cat((wl[d], wu[d]), 1)) for d in range(n)]
    xs = [
        [torch.cat((x[:, d * d_in : (d + 1) * d_in], x[:, d::n]), 1).contiguous() for d in range(n)]
        for x in problem.inputs
    ]

    def products(i: int) -> tuple[Tensor, ...]:
        parts = zip(xs[i % len(xs)], packed, strict=True)
        return tuple(torch.ops.effk.dense_linear(x, w, d_out, None, "none") for x, w in parts)

    return Made(products, read=lambda results: (torch.cat(results, 1),))
