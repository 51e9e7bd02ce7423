"""Our dense GEMM: `torch.ops.effk.dense_linear` with the weight packed beforehand."""

from __future__ import annotations

import torch

import effk

from .dyad_problem import FORWARD, Made, Problem, rotating

NAME, VERSION = "effk dense_linear", effk.__version__


def function(problem: Problem, kind: str, n: int, threads: int) -> Made | None:
    """The forward of a dense layer."""
    if not kind.startswith(FORWARD) or n:
        return None
    f_out = problem.layer.f_out
    packed = effk.ops.dense_linear.pack(problem.weights(0)[0])
    copies = [packed.clone() for _ in range(problem.rotation(packed.numel()))]
    return rotating(problem, copies, lambda x, w: torch.ops.effk.dense_linear(x, w, f_out, None, "none"))
