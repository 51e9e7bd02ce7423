"""One linear layer to one :class:`WqWeight`: the steps that all calibrated methods share, in their order.

1. Follow the drift: earlier layers are compressed already, so the layer reads x instead of x_ref. The weight that best
   gives the old outputs from the new inputs is ``W + W C (H + ridge)^-1``, ``C = sum (x_ref - x)^T x``. Taking a part
   of that step avoids fitting the calibration text (in the spirit of Li et al., "GPTAQ", 2025, who fold it into the rounding).
2. Set outliers apart. 3. Search the grid, errors weighted by ``H_kk``. 4. Round: to nearest, or second order.
5. Refine scales and codes under the full Hessian.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...formats.csr import csr_from_mask
from ...formats.wq import WqWeight
from .gptq import Factor, factorize, gptq
from .outliers import select_outliers
from .refine import refine
from .rtn import encode, search_grid


@dataclass(frozen=True, kw_only=True)
class Steps:
    """How to compress a layer.

    Attributes:
        bits, group_size: of the codes.
        mode: range mode of :mod:`.rtn`.
        outliers: number of weights kept as fp16.
        second_order: round with :mod:`.gptq` instead of to the nearest code.
        sweeps: rounds of :mod:`.refine`; needs a Hessian.
    """

    bits: int
    group_size: int
    mode: str = "mse"
    outliers: int = 0
    second_order: bool = True
    sweeps: int = 0


class Inputs:
    """What is known of a layer's inputs, prepared once for all layers and bit-widths that share them.

    Args:
        hessian: ``sum x^T x``, fp32 ``[K, K]``.
        damping: ridge as a fraction of the mean diagonal.
        drift: ``sum (x_ref - x)^T x``, or None.
    """

    def __init__(self, hessian: Tensor, damping: float, drift: Tensor | None = None) -> None:
        self.factor: Factor = factorize(hessian, damping)
        self.diagonal = hessian.diagonal().clone()
        self.damped = hessian.clone()
        alive = self.diagonal > 0
        mean = self.diagonal[alive].mean() if bool(alive.any()) else torch.ones(())
        self.damped.diagonal().add_(self.factor.damping * mean)
        self._step = None if drift is None else torch.cholesky_solve(drift.t(), torch.linalg.cholesky(self.damped)).t()

    def follow_drift(self, weight: Tensor, part: float) -> Tensor:
        """``weight`` moved by ``part`` of the step that undoes the drift of the inputs in least squares."""
        return weight if self._step is None or part == 0 else weight + part * (weight @ self._step)


def compress_weight(weight: Tensor, steps: Steps, inputs: Inputs | None, saliency: Tensor | None = None) -> WqWeight:
    """Compress fp32 ``[N, K]``; ``saliency`` (``[K]`` or ``[N, K]``) chooses outliers, None by magnitude.

    Raises:
        ValueError: a step needs ``inputs``, or a step's arguments are not legal.
    """
    if inputs is None and (steps.second_order or steps.sweeps):
        raise ValueError(
            "compress_weight: inputs: expected a Hessian for second-order rounding and refinement, got None"
        )
    bits, group_size = steps.bits, steps.group_size
    mask = select_outliers(weight, steps.outliers, saliency) if steps.outliers else None
    importance = None if inputs is None else inputs.diagonal
    grid = search_grid(weight, bits, group_size, steps.mode, importance=importance, mask=mask, quick=inputs is not None)
    if steps.second_order:
        codes, visited = gptq(weight, inputs.factor, grid, bits, group_size, mask=mask)
    else:
        codes, visited = encode(weight, grid, bits, group_size, mode=steps.mode, mask=mask), weight
    kept = None if mask is None else visited.half().float()
    if steps.sweeps:
        codes, grid = refine(
            weight, inputs.damped, codes, grid, bits, group_size, sweeps=steps.sweeps, mask=mask, kept=kept
        )
    return WqWeight.from_codes(
        codes,
        grid.scales,
        bits=bits,
        group_size=group_size,
        zeros=grid.zeros,
        outliers=None if mask is None else csr_from_mask(visited, mask),
    )
