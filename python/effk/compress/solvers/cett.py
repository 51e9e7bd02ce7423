"""Cumulative errors of tail truncation (Luo et al., "Sparsing Law", 2411.02335): how much is lost without the weak
neurons."""

from __future__ import annotations

import torch
from torch import Tensor


def cett(h: Tensor, down: Tensor, eps: float) -> Tensor:
    """``|sum_{i: |n_i| < eps} n_i| / |sum_i n_i|`` for every token, with contributions ``n_i = h_i down[:, i]``.

    h ``[tokens, f]``, down ``[d, f]``.
    """
    weak = h.abs() * down.norm(dim=0) < eps
    lost = (h * weak) @ down.t()
    return lost.norm(dim=-1) / (h @ down.t()).norm(dim=-1).clamp_min(torch.finfo(h.dtype).tiny)


def cett_threshold(h: Tensor, down: Tensor, target: float, steps: int = 24) -> float:
    """The largest eps, by bisection, at which the mean of :func:`cett` over tokens stays below ``target``."""
    low, high = 0.0, float((h.abs() * down.norm(dim=0)).max()) * 1.001
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (middle, high) if float(cett(h, down, middle).mean()) < target else (low, middle)
    return low
