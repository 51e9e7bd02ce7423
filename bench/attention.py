"""Our side of the attention table: `torch.ops.effk.attention`, with rotary positions and appending, which competitors lack."""

from __future__ import annotations

import torch
from torch import Tensor

import effk
from effk.ops import attention as at

from .attention_problem import Made, Problem

NAME, VERSION = "effk", effk.__version__
QUERY_ERROR = {"fp16": 0.0, "int8": 1 / (2 * 127 * 128)}


def function(problem: Problem, dtype: str) -> tuple[Made, tuple[Tensor, Tensor]]:
    """The call over caches of ``dtype``, and keys and values as they are stored. Angles are 0: q stays what it is."""
    h, b, length, t = problem.heads, problem.sequences, problem.context, problem.tokens
    op = torch.ops.effk.attention.default
    one, zero = torch.ones(length, h.d // 2), torch.zeros(length, h.d // 2)
    first = at.cache(b, h.kv_heads, length, h.d, dtype)
    k, v = (x.flatten(0, 1) for x in problem.kv)
    every = torch.tensor([[slot, 0, length] for slot in range(b)], dtype=torch.int32)
    op(
        k.repeat_interleave(h.heads // h.kv_heads, 1), k, v, *first, every, one, zero, problem.scale, 1
    )  # a window of 1: only appends
    stored = [at.cached(first, slot, length) for slot in range(b)]
    nbytes = sum(x.nbytes for x in first if x is not None)
    caches = [first, *(tuple(x if x is None else x.clone() for x in first) for _ in range(problem.copies(nbytes) - 1))]
    q = problem.q.flatten(0, 1)
    k, v = (x[:, -t:].flatten(0, 1).contiguous() for x in problem.kv)
    runs = torch.tensor([[slot, length - t, t] for slot in range(b)], dtype=torch.int32)

    def call(i: int) -> Tensor:
        return op(q, k, v, *caches[i % len(caches)], runs, one, zero, problem.scale, 0)

    made = Made(call, lambda out: out.unflatten(0, (b, t)), nbytes, query_error=QUERY_ERROR[dtype])
    return made, tuple(torch.stack(x) for x in zip(*stored, strict=True))
