"""Dense layers of torch: F.linear as everybody calls it, and the packed oneDNN op that torch.compile uses when frozen.

F.linear in fp32 runs MKL, which on AMD processors does not take its AVX-512 code: `AVOIDS` is shown wherever a ratio to
it is.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import machine
from ..dyad_problem import FF, FORWARD, TRAINING, Made, Problem, as_training, rotating

NAME, VERSION = "torch F.linear", torch.__version__
PACKED = "torch mkldnn _linear_pointwise"
AVOIDS = "torch's fp32 products are MKL's, which avoids AVX-512 on processors of this vendor"


def avoids_avx512() -> bool:
    """Whether torch's MKL leaves AVX-512 unused here."""
    return "AMD" in machine.cpu_name() and torch.backends.mkl.is_available()


def function(problem: Problem, kind: str, n: int, threads: int) -> Made | None:
    """The call of a kind."""
    if n:
        return None
    (w,) = problem.weights(0)
    what = kind.partition(" ")[0]
    if what == TRAINING:
        return as_training(problem, F.linear, (w,))
    if what == FORWARD:
        copies = [w.clone() for _ in range(problem.rotation(w.numel() * w.element_size()))]
        return rotating(problem, copies, F.linear)
    (back,) = problem.weights(0, second=True)
    pairs = [(w.clone(), back.clone()) for _ in range(problem.rotation(2 * w.numel() * w.element_size()))]
    return rotating(problem, pairs, lambda x, p: F.linear(F.linear(x, p[0]).relu_(), p[1]))


def packed(problem: Problem, kind: str, n: int, threads: int) -> Made | None:
    """The weight laid out by oneDNN for this batch size, relu in the product."""
    if n or kind.startswith(TRAINING):
        return None
    reorder, linear = torch.ops.mkldnn._reorder_linear_weight, torch.ops.mkldnn._linear_pointwise
    with torch.inference_mode(False):  # the reordered form exists outside inference mode only
        ws = [reorder(problem.weights(0)[0].clone(), problem.tokens)]
        ws += [
            reorder(problem.weights(0)[0].clone(), problem.tokens) for _ in range(problem.rotation(_bytes(problem)) - 1)
        ]
        if not kind.startswith(FF):
            return rotating(problem, ws, lambda x, w: linear(x, w, None, "none", [], ""))
        backs = [reorder(problem.weights(0, second=True)[0].clone(), problem.tokens) for _ in ws]

    def both(x: Tensor, pair: tuple[Tensor, Tensor]) -> Tensor:
        return linear(linear(x, pair[0], None, "relu", [], ""), pair[1], None, "none", [], "")

    return rotating(problem, list(zip(ws, backs, strict=True)), both)


def _bytes(problem: Problem) -> int:
    (w,) = problem.weights(0)
    return w.numel() * w.element_size()
