"""Which weights are stored exactly, beside the low-bit rest.

Saliency of weight (n, k), largest first: ``|w|`` ("magnitude", Li et al., "LLM-MQ", 2023, section 3), ``|w| sqrt(H_kk)``
("hessian": the output error that losing the weight would cause), or ``|w| sqrt(F_nk)`` with F the mean squared gradient
("fisher", as Kim et al., "SqueezeLLM", 2024, section 4.2).
"""

from __future__ import annotations

import torch
from torch import Tensor

CRITERIA = ("magnitude", "fisher", "hessian")


def select_outliers(weight: Tensor, count: int, importance: Tensor | None = None) -> Tensor:
    """Mask bool ``[N, K]`` with exactly ``count`` entries: the largest ``w^2 * importance``, ties to the lower flat index.

    Args:
        weight: ``[N, K]``.
        count: entries, 0 to ``N * K``.
        importance: non-negative ``[K]`` or ``[N, K]``; None selects by magnitude.

    Raises:
        ValueError: ``count`` is out of range.
    """
    if not 0 <= count <= weight.numel():
        raise ValueError(f"select_outliers: count: expected 0 to {weight.numel()}, got {count}")
    saliency = weight.float().square() if importance is None else weight.float().square() * importance
    mask = torch.zeros(weight.numel(), dtype=torch.bool)
    if count:
        flat = saliency.flatten()
        least = flat.topk(count).values[-1]
        mask = flat > least
        ties = (flat == least).nonzero().flatten()
        mask[ties[: count - int(mask.sum())]] = True
    return mask.reshape(weight.shape)
