"""Our relu_ffn and the rows of down alone, skipping, reading all and by a given list; the layer made of our dense products."""

from __future__ import annotations

import torch
from torch import Tensor

import effk

from .relu_problem import PROMPT, Made, Packed, Problem

NAME, DENSE, LISTED, LINEAR = "effk relu_ffn", "effk relu_ffn dense", "effk rows_axpy", "effk dense_linear"
VERSION = effk.__version__
ops = torch.ops.effk


def layer(problem: Problem, dense: bool = False) -> Made:
    """The op; dense: reading every neuron."""
    w, mode = problem.weights, "dense" if dense else "auto"

    def call(i: int) -> Tensor:
        packed: list[Packed] = w.copies[i % len(w.copies)]
        (wg, sg), (wu, su), (wd, sd) = packed if len(packed) == 3 else (Packed(None, None), *packed)
        bias = problem.biases[problem.list_of(i)]
        bg, bu = (bias, None) if wg is not None else (None, bias)
        return ops.relu_ffn(problem.x, wg, wu, wd, sg, su, sd, bg, bu, None, w.rows, "relu", None, None, 1, mode)[0]

    return Made(call, problem.match("fp32"))


def down(problem: Problem, dense: bool = False) -> Made:
    """The rows of down; dense: times inputs that are all read."""
    w = problem.weights
    # An input that is not zero and adds nothing that the match would notice stands for one that has to be read.
    inputs = [torch.where(h == 0, 1e-20, h) if dense else h for h in problem.hidden]

    def call(i: int) -> Tensor:
        rows, scales = w.copies[i % len(w.copies)][0]
        return ops.input_sparse_linear(inputs[problem.list_of(i)], rows, scales, None, None, w.rows, w.layer.d)[0]

    return Made(call, problem.match("fp32"))


def listed(problem: Problem, kind: str) -> Made | None:
    """The rows of down with the list of neurons there already, as embedding_bag has it."""
    w = problem.weights
    if not w.alone:
        return None
    index = [part.int() for part in problem.lists]
    values = [h[:, part].contiguous() for h, part in zip(problem.hidden, problem.lists, strict=True)]
    counts = [torch.tensor([len(part)], dtype=torch.int32) for part in problem.lists]

    def call(i: int) -> Tensor:
        rows, scales = w.copies[i % len(w.copies)][0]
        n = problem.list_of(i)
        return ops.rows_axpy(values[n], index[n], counts[n], rows, scales, None, w.rows, w.layer.d, "fp32")

    return Made(call, problem.match("fp32"))


def ours(problem: Problem, kind: str) -> Made:
    """What skips."""
    return down(problem) if problem.weights.alone else layer(problem)


def dense(problem: Problem, kind: str) -> Made:
    """The same kernel, reading all."""
    return down(problem, True) if problem.weights.alone else layer(problem, True)


def linear(problem: Problem, kind: str) -> Made | None:
    """dense_linear thrice with the product between; for prompts, in bf16."""
    if kind != f"{PROMPT} bf16":
        return None
    dtype, f, d = torch.bfloat16, problem.layer.f, problem.layer.d
    sides = [w.T if name == "down" else w for name, w in problem.weights.plain.items()]
    *sides, wd = [effk.ops.dense_linear.pack(w.to(dtype).contiguous()) for w in sides]
    x, bias = problem.x.to(dtype), problem.biases[0]

    def call(i: int) -> Tensor:
        h = ops.dense_linear(x, sides[0], f, bias, "relu")
        if len(sides) > 1:
            h *= ops.dense_linear(x, sides[1], f, None, "none")
        return ops.dense_linear(h, wd, d, None, "none")

    return Made(call, problem.match("bf16", dtype))
