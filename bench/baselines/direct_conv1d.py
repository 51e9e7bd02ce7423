"""The direct sum: PyTorch's conv1d with one group per channel, where it is not hopeless."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..fftconv_problem import FORWARD, UNCACHED, Problem

NAME, VERSION = "torch conv1d", torch.__version__
LONGEST, MOST_ROWS = 1024, 64


def function(problem: Problem, kind: str, threads: int) -> Callable[[int], Tensor] | None:
    """The call; it has no spectrum, so it competes with and without cached ones."""
    shape = problem.shape
    if kind not in (FORWARD, UNCACHED) or shape.l > LONGEST or shape.b * shape.h > MOST_ROWS:
        return None
    k = problem.k.flip(-1).unsqueeze(1).contiguous()
    return lambda i: F.conv1d(F.pad(problem.inputs[i], (shape.l - 1, 0)), k, groups=shape.h)
