"""Round to nearest: scales, zero points and codes of low-bit groups, from the weight and an optional error weighting.

A group is ``group_size`` consecutive columns of one row; ``F = 2**(bits-1)``; ``w ~ scale * (code - zero)``. Range modes
(the table of BesTLA, ggml, FasterTransformer and GPTQ conventions), with ``amax = max|w|`` and ``m`` the signed extreme:

=============== ==================================== =========================================================
mode            scale                                zero
=============== ==================================== =========================================================
``sym_narrow``  ``amax / (F-1)``                     ``F``; codes 1 .. 2F-1
``sym_mid``     ``amax / (F-1/2)``                   ``F``
``sym_clip``    ``amax / F``                         ``F``; a positive extreme loses one step
``signed_full`` ``m / -F`` (may be negative)         ``F``; the extreme is exact
``signed_auto`` ``signed_full`` for skewed groups,   ``F``
                else ``sym_mid`` with their sign
``asym``        ``(hi - lo) / (2F-1)``               ``round(-lo / scale)``; lo <= 0 <= hi
``mse``         best of 61 clips and both signs      ``F``
``mse_asym``    best shrunken [lo, hi]               ``round(-lo / scale)``
``clip``        best ``p amax / (F-1)``, p 1 .. 0.21 ``F``; codes 0 .. 2F-1
=============== ==================================== =========================================================

The two searches minimise ``sum_k importance[k] * (w - w_hat)**2`` over the group, then refine the scale by alternating
least squares (scale for fixed codes, codes for the fixed scale). With the mean squared activations as ``importance`` that
is the layer's output error under a diagonal Hessian (the clip search of Lin et al., "AWQ", 2024, section 3).

``clip`` is the search of Ashkboos et al., "QUIK", 2023: p in steps of 0.01, least ``sum_k |w - w_hat|^2.4``, where 2.4
is what the released code has (the paper says squares); of equals the largest p. It knows no importance.

Scales are rounded to their stored type before codes are computed. Excluded weights (``mask``: sparse outliers, padding)
neither widen a range nor count as error, and get the code of zero.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

MODES = ("sym_narrow", "sym_mid", "sym_clip", "signed_full", "signed_auto", "asym", "mse", "mse_asym", "clip")
ASYMMETRIC = ("asym", "mse_asym")

_CLIP_RATIOS = tuple(1 - i / 100 for i in range(80))  # of "clip"
_CLIP_EXPONENT = 2.4
_CLIPS = torch.linspace(0.50, 1.10, 61)
_SHRINKS = torch.linspace(0.40, 1.00, 31)
_REFITS = 3  # alternations after a search; a fourth changes the error by less than 0.1 %
_MIN_FP16, _MAX_FP16 = 6.1e-5, 6e4  # outside, fp16 scales are subnormal or near overflow
_COARSE = 6  # a search tries every sixth candidate, then the neighbours of each group's best
_QUICK = 10  # a quick one every tenth, then none
_BLOCK_ELEMENTS = 1 << 18  # weights searched at once: the temporaries of a candidate (1 MB each) then stay in cache


class Grid(NamedTuple):
    """The code grid of a weight: ``scales`` fp16 or fp32 ``[N, groups]`` and ``zeros`` uint8 ``[N, groups]`` (None: F)."""

    scales: Tensor
    zeros: Tensor | None


def round_to_nearest(
    weight: Tensor,
    bits: int,
    group_size: int,
    mode: str = "mse",
    *,
    importance: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Grid]:
    """Codes uint8 ``[N, K]`` and grid of ``weight`` fp32 ``[N, K]``; arguments and errors as :func:`search_grid`."""
    grid = search_grid(weight, bits, group_size, mode, importance=importance, mask=mask)
    return encode(weight, grid, bits, group_size, mode=mode, mask=mask), grid


def search_grid(
    weight: Tensor,
    bits: int,
    group_size: int,
    mode: str = "mse",
    *,
    importance: Tensor | None = None,
    mask: Tensor | None = None,
    quick: bool = False,
) -> Grid:
    """Scales and zero points of every group.

    Args:
        weight: floating ``[N, K]``.
        bits: 2, 3, 4 or 8.
        group_size: columns in a group; 0 for one group per row. The last group of a row may be short.
        mode: one of :data:`MODES`.
        importance: non-negative ``[K]`` or ``[N, K]`` error weights of the two searches; None means ones.
        mask: bool ``[N, K]``, True where a weight is stored elsewhere.
        quick: search a third of the candidates, as a start for :mod:`.refine`; the error is up to 3 % higher.

    Raises:
        ValueError: a shape, mode or bit-width is not legal, or the weight holds NaN or Inf.
    """
    _check(weight, bits, group_size, mode, importance, mask)
    groups, kept, cost = _grouped(weight.float(), group_size, mask, importance)
    rows_at_once = max(1, _BLOCK_ELEMENTS // max(1, groups[0].numel())) if len(groups) else 1
    parts = [
        _search(*(t[i : i + rows_at_once] for t in (groups, kept, cost)), bits, mode, quick)
        for i in range(0, len(groups), rows_at_once)
    ]
    if not parts:
        parts = [(groups.new_zeros(groups.shape[:2]), groups.new_zeros(groups.shape[:2]))]
    scales, zeros = (torch.cat(part) for part in zip(*parts, strict=True))
    return Grid(stored_scales(scales), zeros.to(torch.uint8) if mode in ASYMMETRIC else None)


def row_scales(weight: Tensor, bits: int, *, clip: bool = True) -> Tensor:
    """fp32 ``[N]``: one scale a row in mode "clip", not rounded; without ``clip`` that of p = 1. Zero rows get 1.

    Args:
        weight: fp32 ``[N, K]``.
    """
    rows = max(1, _BLOCK_ELEMENTS // max(1, weight.shape[1]))
    parts = [_clipped(part, bits, _CLIP_RATIOS if clip else (1.0,)) for part in weight.float().split(rows)]
    scales = torch.cat(parts) if parts else weight.new_zeros(0)
    return torch.where(scales == 0, 1.0, scales)


def encode(
    weight: Tensor, grid: Grid, bits: int, group_size: int, *, mode: str = "mse", mask: Tensor | None = None
) -> Tensor:
    """Nearest codes uint8 ``[N, K]`` on ``grid``, ties to even; masked weights get the code of zero."""
    step, zero = (spread(t, weight.shape[1], group_size) for t in _as_float(grid, bits))
    low = 1 if mode == "sym_narrow" else 0
    codes = (torch.round(weight.float() / step) + zero).clamp_(low, 2**bits - 1)
    return (codes if mask is None else torch.where(mask, zero, codes)).to(torch.uint8)


def decode(codes: Tensor, grid: Grid, bits: int, group_size: int) -> Tensor:
    """``scale * (code - zero)`` as fp32 ``[N, K]``."""
    step, zero = (spread(t, codes.shape[1], group_size) for t in _as_float(grid, bits))
    return step * (codes.float() - zero)


def spread(per_group: Tensor, k: int, group_size: int) -> Tensor:
    """``[N, groups]`` repeated to ``[N, k]`` columns."""
    return per_group.repeat_interleave(group_size or k, dim=1)[:, :k]


def stored_scales(scales: Tensor) -> Tensor:
    """``scales`` in their stored type: fp16, or fp32 when one is outside fp16's normal range; zero becomes one."""
    scales = torch.where(scales == 0, 1.0, scales)
    size = scales.abs()
    normal = not scales.numel() or (size.min() >= _MIN_FP16 and size.max() <= _MAX_FP16)
    return scales.to(torch.float16 if normal else torch.float32)


def _search(w: Tensor, kept: Tensor, cost: Tensor, bits: int, mode: str, quick: bool) -> tuple[Tensor, Tensor]:
    """fp32 scales and zeros ``[n, groups]`` of ``w`` ``[n, groups, G]``; scale 0 marks a group without extent."""
    half, top = 2.0 ** (bits - 1), 2.0**bits - 1
    bare = torch.where(kept, w, 0.0)
    low, high = bare.amin(-1).clamp_max(0), bare.amax(-1).clamp_min(0)
    amax = torch.maximum(high, -low)
    symmetric_zero = torch.full_like(amax, half)
    if mode == "sym_narrow":
        return amax / (half - 1), symmetric_zero
    if mode == "sym_mid":
        return amax / (half - 0.5), symmetric_zero
    if mode == "sym_clip":
        return amax / half, symmetric_zero
    if mode in ("signed_full", "signed_auto"):
        full = torch.where(high >= -low, -amax, amax) / half
        if mode == "signed_full":
            return full, symmetric_zero
        skewed = (high + low).abs() >= amax / half
        return torch.where(skewed, full, torch.where(high + low > 0, -1.0, 1.0) * amax / (half - 0.5)), symmetric_zero
    if mode == "asym":
        scale = (high - low) / top
        return scale, _zero_point(low, scale, top)
    if mode == "clip":
        return _clipped(bare, bits, _CLIP_RATIOS), symmetric_zero
    if mode == "mse":
        steps, unit = torch.cat((_CLIPS, -_CLIPS)), amax / half

        def candidate(step: Tensor) -> tuple[Tensor, Tensor]:
            return step * unit, symmetric_zero
    else:
        steps, unit = _SHRINKS, (high - low) / top

        def candidate(step: Tensor) -> tuple[Tensor, Tensor]:
            return step * unit, _zero_point(step * low, step * unit, top)

    start = _best(bare, cost, candidate, steps, top, quick)
    return _refine(bare, cost, *start, top, 1 if quick else _REFITS)


def _best(
    w: Tensor,
    cost: Tensor,
    candidate: Callable[[Tensor], tuple[Tensor, Tensor]],
    steps: Tensor,
    top: float,
    quick: bool,
) -> tuple[Tensor, Tensor]:
    """The candidate (scale, zero) of least error for every group; the first of equals.

    The error is smooth on the scale of a few steps, so all groups try every sixth one, and then their own neighbours.
    """
    best = torch.full(w.shape[:2], torch.inf)
    index = torch.zeros(w.shape[:2], dtype=torch.int64)

    def attempt(tried: Tensor) -> None:
        error = _error(w, cost, *candidate(steps[tried]), top)
        better = error < best
        torch.where(better, error, best, out=best)
        torch.where(better, tried, index, out=index)

    for i in range(0, len(steps), _QUICK if quick else _COARSE):
        attempt(torch.tensor(i))
    centre = index.clone()
    for offset in () if quick else range(1 - _COARSE, _COARSE):
        if offset:
            attempt((centre + offset).clamp(0, len(steps) - 1))
    return candidate(steps[index])


def _clipped(w: Tensor, bits: int, ratios: tuple[float, ...]) -> Tensor:
    """Scales ``[...]`` of ``w`` ``[..., K]``: the first of ``ratios`` with the least error; 0 where all is zero."""
    most = 2.0 ** (bits - 1) - 1
    amax = w.abs().amax(-1) if w.shape[-1] else w.new_zeros(w.shape[:-1])
    best, scales = torch.full_like(amax, torch.inf), amax / most
    for ratio in ratios if len(ratios) > 1 else ():
        scale = amax * ratio / most
        step = torch.where(scale == 0, 1.0, scale).unsqueeze(-1)
        error = (w / step).round_().clamp_(-most - 1, most).mul_(step).sub_(w).abs_().pow_(_CLIP_EXPONENT).sum(-1)
        better = error < best
        best, scales = torch.where(better, error, best), torch.where(better, scale, scales)
    return scales


def _refine(w: Tensor, cost: Tensor, scale: Tensor, zero: Tensor, top: float, rounds: int) -> tuple[Tensor, Tensor]:
    """Alternating least squares from (scale, zero); a step that does not lower a group's error is not taken."""
    error = _error(w, cost, scale, zero, top)
    for _ in range(rounds):
        level = _levels(w, scale, zero, top)
        norm = (cost * level * level).sum(-1)
        fitted = torch.where(norm > 0, (cost * w * level).sum(-1) / norm.clamp_min(1e-30), scale)
        fitted = torch.where(fitted == 0, scale, fitted)
        refitted = _error(w, cost, fitted, zero, top)
        better = refitted < error
        scale, error = torch.where(better, fitted, scale), torch.where(better, refitted, error)
    return scale, zero


def _levels(w: Tensor, scale: Tensor, zero: Tensor, top: float) -> Tensor:
    inverse = torch.where(scale == 0, 0.0, 1.0 / scale).unsqueeze(-1)
    z = zero.unsqueeze(-1)
    return (w * inverse).round_().clamp_(-z, top - z)


def _error(w: Tensor, cost: Tensor, scale: Tensor, zero: Tensor, top: float) -> Tensor:
    level = _levels(w, scale, zero, top)
    return level.mul_(scale.unsqueeze(-1)).sub_(w).square_().mul_(cost).sum(-1)


def _zero_point(low: Tensor, scale: Tensor, top: float) -> Tensor:
    return torch.where(scale == 0, 0.0, torch.round(-low / torch.where(scale == 0, 1.0, scale)).clamp(0, top))


def _as_float(grid: Grid, bits: int) -> tuple[Tensor, Tensor]:
    scales = grid.scales.float()
    zeros = torch.full_like(scales, 2.0 ** (bits - 1)) if grid.zeros is None else grid.zeros.float()
    return scales, zeros


def _grouped(
    w: Tensor, group_size: int, mask: Tensor | None, importance: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Weight, kept flags and error weights as ``[N, groups, G]``; a short last group is filled with excluded zeros."""
    n, k = w.shape
    width = group_size or k
    groups = -(-k // width)
    fill = (0, groups * width - k)
    kept = torch.ones_like(w, dtype=torch.bool) if mask is None else ~mask
    cost = kept.float() if importance is None else kept * importance.float().expand(n, k)
    return tuple(pad(t, fill).reshape(n, groups, width) for t in (w, kept, cost))


def _check(w: Tensor, bits: int, group_size: int, mode: str, importance: Tensor | None, mask: Tensor | None) -> None:
    if mode not in MODES:
        raise ValueError(f"search_grid: mode: expected one of {MODES}, got {mode!r}")
    if bits not in (2, 3, 4, 8):
        raise ValueError(f"search_grid: bits: expected 2, 3, 4 or 8, got {bits!r}")
    if w.dim() != 2 or not w.is_floating_point() or w.shape[1] == 0:
        raise ValueError(f"search_grid: weight: expected floating [N, K] with K > 0, got {w.dtype} {list(w.shape)}")
    if group_size < 0:
        raise ValueError(f"search_grid: group_size: expected 0 or a positive size, got {group_size}")
    if not bool(w.isfinite().all()):
        raise ValueError("search_grid: weight: expected finite values, got NaN or Inf")
    if importance is not None:
        if tuple(importance.shape) not in ((w.shape[1],), tuple(w.shape)):
            raise ValueError(
                f"search_grid: importance: expected [{w.shape[1]}] or {list(w.shape)}, got {list(importance.shape)}"
            )
        if not bool((importance.isfinite() & (importance >= 0)).all()):
            raise ValueError("search_grid: importance: expected finite non-negative values, got others")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != w.shape):
        raise ValueError(f"search_grid: mask: expected bool {list(w.shape)}, got {mask.dtype} {list(mask.shape)}")
