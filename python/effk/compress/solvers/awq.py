"""Activation-aware channel scaling: let the columns that meet large inputs use more of the grid.

``W x = (W diag(t)) (x / t)``; rounding ``W diag(t)`` instead of W makes the error of column k smaller by about ``t_k``.
``t = a^alpha``, normalised to ``sqrt(max t * min t) = 1``, with a the mean magnitude of the input channel (Lin et al., "AWQ",
2024, section 3.2). The exponent is the one of least output error, found by a grid over [0, 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .rtn import decode, round_to_nearest

_ALPHAS = tuple(i / 20 for i in range(20))
_ROWS = 192  # rows of each weight that the search looks at, evenly spaced: one exponent serves them all, so a sample is enough
_MIN_CHANNEL = 1e-4  # relative to the mean channel: a channel that never fires must not get an extreme scale


class Scaling(NamedTuple):
    """``alpha``, the channel scales ``t`` fp32 ``[K]``, and the output error relative to no scaling."""

    alpha: float
    scale: Tensor
    gain: float


def channel_scale(mean_abs: Tensor, alpha: float) -> Tensor:
    """``t`` fp32 ``[K]`` for the channel magnitudes ``mean_abs`` ``[K]``; ones for alpha = 0 or inputs of zero."""
    mean = mean_abs.mean()
    if alpha == 0 or not bool(mean > 0):
        return torch.ones_like(mean_abs)
    t = (mean_abs / mean).clamp_min(_MIN_CHANNEL).pow(alpha)
    return t / (t.max() * t.min()).sqrt()


def search_scaling(
    weights: Sequence[Tensor], mean_abs: Tensor, hessian: Tensor, bits: int, group_size: int, mode: str = "asym"
) -> Scaling:
    """The exponent of least ``sum_i trace(D_i H D_i^T)``, ``D_i = Q(W_i diag(t)) diag(t)^-1 - W_i``, over all weights
    fp32 ``[N_i, K]`` that read the input (a sample of their rows); ties go to the smaller exponent.

    Raises:
        ValueError: shapes that do not fit each other.
    """
    k = mean_abs.numel()
    for weight in weights:
        if weight.dim() != 2 or weight.shape[1] != k or tuple(hessian.shape) != (k, k):
            raise ValueError(
                f"search_scaling: expected weights [N, {k}] and a Hessian {[k, k]}, got {list(weight.shape)} and "
                f"{list(hessian.shape)}"
            )
    weights = [weight[:: max(1, len(weight) // _ROWS)] for weight in weights]
    best, unscaled = None, 0.0
    for alpha in _ALPHAS:
        t = channel_scale(mean_abs, alpha)
        error = 0.0
        for weight in weights:
            codes, grid = round_to_nearest(weight * t, bits, group_size, mode)
            change = decode(codes, grid, bits, group_size) / t - weight
            error += float(((change @ hessian) * change).sum())
        if alpha == 0:
            unscaled = error
        if best is None or error < best[0]:
            best = (error, alpha, t)
    error, alpha, t = best
    return Scaling(alpha, t, error / unscaled if unscaled > 0 else 1.0)
