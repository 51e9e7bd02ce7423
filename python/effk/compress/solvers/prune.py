"""Which weights of a layer become zero, and what the others become.

* :func:`magnitude`: the smallest of each row go. The baseline.
* :func:`wanda`: the smallest ``|w_ij| * ||x_j||_2`` of each row go (Sun et al., "A Simple and Effective Pruning Approach
  for Large Language Models", 2023, arXiv:2306.11695). Nothing is updated.
* :func:`sparsegpt`: the least ``w^2 / U_jj^2`` of each block of 128 columns go, and the others take up what is lost
  (Frantar, Alistarh, "SparseGPT", 2023, arXiv:2301.00774): the shared second-order solver (:mod:`.gptq`), from left to right
  as released, with codes on a grid in the same sweep if one is given.

Patterns are "n:m", n kept of every m neighbouring columns, for the first two; the third knows :data:`.gptq.PATTERNS`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .gptq import factorize, gptq
from .rtn import Grid


def parse_pattern(pattern: str) -> tuple[int, int]:
    """n and m of "n:m"; raises ValueError for anything else."""
    kept, _, width = pattern.partition(":")
    if kept.isdecimal() and width.isdecimal() and 0 < int(kept) < int(width):
        return int(kept), int(width)
    raise ValueError(f"prune: pattern: expected 'n:m' with 0 < n < m, got {pattern!r}")


def keep_largest(score: Tensor, sparsity: float, pattern: str | None = None) -> Tensor:
    """bool like ``score`` ``[N, K]``: all but the ``int(K * sparsity)`` smallest of each row, or n of every m columns.

    Of equals the later ones stay.

    Raises:
        ValueError: K is no multiple of m, or ``sparsity`` is not in [0, 1).
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"prune: sparsity: expected a share in [0, 1), got {sparsity}")
    n, k = score.shape
    kept, width = (k - int(k * sparsity), k) if pattern is None else parse_pattern(pattern)
    if k % width:
        raise ValueError(f"prune: pattern: expected a multiple of {width} columns, got {k}")
    groups = score.reshape(n, -1, width)
    least = groups.argsort(dim=2, stable=True)[:, :, : width - kept]
    return torch.ones_like(groups, dtype=torch.bool).scatter_(2, least, False).view(n, k)


def magnitude(weight: Tensor, sparsity: float, pattern: str | None = None) -> Tensor:
    """``weight`` fp32 ``[N, K]`` with zeros."""
    return weight.where(keep_largest(weight.abs(), sparsity, pattern), weight.new_zeros(()))


def wanda(weight: Tensor, mean_sq: Tensor, sparsity: float, pattern: str | None = None) -> Tensor:
    """The same, weighed by the inputs: ``mean_sq`` ``[K]``, of which the root is the norm up to a factor."""
    score = weight.abs() * mean_sq.sqrt()
    return weight.where(keep_largest(score, sparsity, pattern), weight.new_zeros(()))


def sparsegpt(
    weight: Tensor,
    hessian: Tensor,
    sparsity: float,
    pattern: str | None = None,
    *,
    grid: Grid | None = None,
    group_size: int = 0,
    damping: float = 0.01,
) -> tuple[Tensor, Tensor | None]:
    """The pruned weight fp32 ``[N, K]``, and signed int8 codes ``[N, K]`` if a symmetric 8-bit ``grid`` is given.

    With a grid the weight is that of the codes. ``hessian`` ``[K, K]`` is any positive multiple of ``X^T X``. A column that no
    input reached becomes zero, as released.

    Raises:
        ValueError: as :func:`.gptq.factorize` and :func:`.gptq.gptq`.
    """
    weight = weight.masked_fill(hessian.diagonal() == 0, 0.0)
    factor = factorize(hessian, damping, act_order=False, pattern=pattern)
    codes, values = gptq(weight, factor, grid, 8, group_size, pattern=pattern, sparsity=0.0 if pattern else sparsity)
    if grid is None:
        return values, None
    signed = (codes.to(torch.int16) - 128).to(torch.int8)
    scales = grid.scales.float().repeat_interleave(group_size or weight.shape[1], 1)[:, : weight.shape[1]]
    return signed.float() * scales, signed
