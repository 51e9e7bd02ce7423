"""Our side of the fftconv table: `torch.ops.effk.fftconv` and its backward as an autograd function calls them."""

from __future__ import annotations

import torch
from torch import Tensor

import effk

from .fftconv_problem import BACKWARD, GATED, UNCACHED, Call, Problem

NAME, VERSION = "effk", effk.__version__
MODE, SCHEME = "causal", "auto"
U_AND_K = [True, True, False, False, False]  # the gradients that a backward is asked for


def function(problem: Problem, kind: str, threads: int) -> Call:
    """The call of a kind; the spectrum is prepared beforehand except in `UNCACHED`."""
    ops, shape = torch.ops.effk, problem.shape
    inputs, k, how = problem.inputs, problem.k, (shape.n_fft, MODE, SCHEME)
    spec = ops.fftconv_prepare(k, *how)
    if kind == UNCACHED:
        return lambda i: ops.fftconv(inputs[i], ops.fftconv_prepare(k, *how), None, None, None, *how)
    if kind == BACKWARD:
        gy, n_fft = problem.gy, shape.n_fft

        def backward(i: int) -> tuple[Tensor, ...]:
            grads = ops.fftconv_backward(gy, inputs[i], spec, None, None, None, n_fft, shape.l, MODE, SCHEME, U_AND_K)
            return grads[:2]

        return backward
    pre, post = problem.gates if kind == GATED else (None, None)
    return lambda i: ops.fftconv(inputs[i], spec, pre, post, None, *how)
