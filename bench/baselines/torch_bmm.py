"""A DYAD layer as the published code evaluates it: two torch.bmm calls over views, features first."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dyad_problem import FORWARD, TRAINING, Made, Problem

NAME, VERSION = "two torch.bmm", torch.__version__
TOKENS_FIRST = "two torch.bmm, tokens first"


def function(problem: Problem, kind: str, n: int, threads: int) -> Made | None:
    """Forward, or a training step through autograd. x is features first here, as that code keeps it."""
    if not n or not kind.startswith((FORWARD, TRAINING)):
        return None
    f_in, f_out, tokens = problem.layer.f_in, problem.layer.f_out, problem.tokens
    xs = [x.T.contiguous() for x in problem.inputs]
    nbytes = 2 * problem.weights(n)[0].numel() * problem.dtype.itemsize
    copies = [tuple(w.clone() for w in problem.weights(n)) for _ in range(problem.rotation(nbytes))]

    def layer(x: Tensor, wl: Tensor, wu: Tensor) -> Tensor:
        blocks, residues = x.view(n, f_in // n, tokens), x.view(f_in // n, n, tokens).transpose(0, 1)
        return (torch.bmm(wl, blocks) + torch.bmm(wu, residues)).view(f_out, tokens)

    if kind.startswith(FORWARD):
        return Made(lambda i: (layer(xs[i % len(xs)], *copies[i % len(copies)]).T,), rounds_parts=True)
    leaves, gy = [w.clone().requires_grad_() for w in problem.weights(n)], problem.gy.T.contiguous()
    xs = [x.requires_grad_() for x in xs]

    def step(i: int) -> tuple[Tensor, ...]:
        x = xs[i % len(xs)]
        gx, *gw = torch.autograd.grad(layer(x, *leaves), (x, *leaves), gy)
        return gx.T, *gw

    return Made(step, rounds_parts=True)


def tokens_first(problem: Problem, kind: str, n: int, threads: int) -> Made | None:
    """The same in a model that keeps tokens first: strided views of x, and y put together from the blocks."""
    if not n or not kind.startswith(FORWARD):
        return None
    f_in, f_out, tokens = problem.layer.f_in, problem.layer.f_out, problem.tokens
    nbytes = 2 * problem.weights(n)[0].numel() * problem.dtype.itemsize
    copies = [tuple(w.clone() for w in problem.weights(n)) for _ in range(problem.rotation(nbytes))]

    def layer(x: Tensor, wl: Tensor, wu: Tensor) -> Tensor:
        blocks, residues = x.view(tokens, n, f_in // n).transpose(0, 1), x.view(tokens, f_in // n, n).permute(2, 0, 1)
        y = torch.bmm(blocks, wl.mT) + torch.bmm(residues, wu.mT)
        return y.transpose(0, 1).reshape(tokens, f_out)

    xs = problem.inputs
    return Made(lambda i: (layer(xs[i % len(xs)], *copies[i % len(copies)]),), rounds_parts=True)
