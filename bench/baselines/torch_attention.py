"""PyTorch's scaled_dot_product_attention over keys and values that lie ready: no rotary positions, nothing appended."""

from __future__ import annotations

import torch
from torch import Tensor

from ..attention_problem import PREFILL, Made, Problem

NAME, VERSION = "torch sdpa", torch.__version__
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
UNIT = {"fp32": 0.0, "bf16": 2.0**-8}


def function(problem: Problem, dtype: str) -> tuple[Made, tuple[Tensor, Tensor]]:
    """The call in ``dtype``, and keys and values as they are."""
    kind = DTYPES[dtype]
    q, k, v = (x.transpose(1, 2).contiguous().to(kind) for x in (problem.q, *problem.kv))
    nbytes = k.nbytes + v.nbytes
    caches = [(k, v), *((k.clone(), v.clone()) for _ in range(problem.copies(nbytes) - 1))]
    causal = problem.kind == PREFILL

    def call(i: int) -> Tensor:
        keys, values = caches[i % len(caches)]
        return torch.nn.functional.scaled_dot_product_attention(
            q, keys, values, is_causal=causal, scale=problem.scale, enable_gqa=True
        )

    return Made(call, lambda out: out.transpose(1, 2), nbytes, UNIT[dtype], UNIT[dtype]), problem.kv
