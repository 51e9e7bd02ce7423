"""torch-fftconv: fft_conv1d with one group per channel. It transforms the filter in every call."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

import torch.nn.functional as F
from torch import Tensor

from ..fftconv_problem import UNCACHED, Problem

NAME = "torch-fftconv"
try:
    VERSION = version("torch-fftconv")
except PackageNotFoundError:
    VERSION = ""
LONGEST, LARGEST = 1 << 16, 1 << 24  # taps, elements; beyond, it takes seconds a call and is never near the others


def function(problem: Problem, kind: str, threads: int) -> Callable[[int], Tensor] | None:
    """The call; the taps in the order of nn.Conv1d are made beforehand."""
    length = problem.shape.l
    if kind != UNCACHED or length > LONGEST or problem.shape.elements > LARGEST:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch_fftconv import fft_conv1d
    k = problem.k.flip(-1).unsqueeze(1).contiguous()
    return lambda i: fft_conv1d(F.pad(problem.inputs[i], (length - 1, 0)), k, groups=problem.shape.h)
