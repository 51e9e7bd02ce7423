"""scipy.fft (pocketfft): rfft, multiply, irfft, crop, with as many workers as threads."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import scipy.fft
import torch
from torch import Tensor

from ..fftconv_problem import FORWARD, GATED, UNCACHED, Problem

NAME, VERSION = "scipy.fft", scipy.__version__


def function(problem: Problem, kind: str, threads: int) -> Callable[[int], Tensor] | None:
    """The call of a kind; no gradients."""
    n, length = problem.shape.n_fft, problem.shape.l
    inputs, k = [u.numpy() for u in problem.inputs], problem.k.numpy()

    def rfft(x: np.ndarray) -> np.ndarray:
        return scipy.fft.rfft(x, n, workers=threads)

    def back(x: np.ndarray) -> np.ndarray:
        return scipy.fft.irfft(x, n, workers=threads)[..., :length]

    kf = rfft(k)
    if kind == FORWARD:
        return lambda i: torch.from_numpy(back(rfft(inputs[i]) * kf))
    if kind == UNCACHED:
        return lambda i: torch.from_numpy(back(rfft(inputs[i]) * rfft(k)))
    if kind == GATED:
        pre, post = (gate.numpy() for gate in problem.gates)
        return lambda i: torch.from_numpy(back(rfft(inputs[i] * pre) * kf) * post)
    return None
