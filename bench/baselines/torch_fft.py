"""torch.fft: rfft, multiply, irfft, crop; what a user of PyTorch writes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..fftconv_problem import BACKWARD, FORWARD, GATED, Call, Problem

NAME, VERSION = "torch.fft", torch.__version__


def function(problem: Problem, kind: str, threads: int) -> Call:
    """The call of a kind; padding is left to rfft, which does it in one copy."""
    n, length = problem.shape.n_fft, problem.shape.l
    rfft, irfft = torch.fft.rfft, torch.fft.irfft
    inputs, k = problem.inputs, problem.k
    if kind == BACKWARD:
        return backward(problem)
    kf = rfft(k, n)
    if kind == FORWARD:
        return lambda i: irfft(rfft(inputs[i], n) * kf, n)[..., :length]
    if kind == GATED:
        pre, post = problem.gates
        return lambda i: irfft(rfft(inputs[i] * pre, n) * kf, n)[..., :length] * post
    return lambda i: irfft(rfft(inputs[i], n) * rfft(k, n), n)[..., :length]


def backward(problem: Problem) -> Callable[[int], tuple[Tensor, ...]]:
    """The gradients of u and k by autograd, over graphs made once, which hold the spectra of both."""
    n, length = problem.shape.n_fft, problem.shape.l
    graphs = []
    for tensor in problem.inputs:
        u, k = tensor.detach().requires_grad_(), problem.k.detach().requires_grad_()
        y = torch.fft.irfft(torch.fft.rfft(u, n) * torch.fft.rfft(k, n), n)[..., :length]
        graphs.append((y, (u, k)))
    return lambda i: torch.autograd.grad(*graphs[i], problem.gy, retain_graph=True)
