"""FineQuant: round to nearest with a group size chosen per matrix from the weights alone.

Kim, Henry, Fahim and Awadalla, "FineQuant", 2023: halve the groups while that shrinks their ranges enough. The paper's
threshold constants were not available; the defaults here are this project's own.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...formats.wq import GROUP_SIZES, WqWeight
from ..affine import check_affine, format_of, mode_of
from ..calibrate import LayerStats
from ..layers import Layer
from ..plan import LayerPlan, Plan
from ..recipe import Recipe, expect_bits
from ..registry import Context, Handler, register
from ..solvers.rtn import MODES, decode, round_to_nearest

RULES = ("threshold", "excess")
_QUADRATURE = 512  # points per dimension of the Gaussian ratio; doubling them changes it by less than 1e-3


@dataclass(frozen=True, kw_only=True)
class FineQuant(Recipe):
    """Uniform bits, adaptive group size.

    Attributes:
        bits: 2, 3, 4 or 8.
        mode: range mode (see :mod:`effk.compress.solvers.rtn`).
        rule: "threshold" halves the groups while the mean range ratio is at most ``alpha``; "excess" while it is more
            than ``margin`` below the ratio of a Gaussian matrix with groups of that size.
        alpha, margin: the two rules' constants.
        min_group: no group smaller than this, 32 to 256.
        max_error: also halve while the relative (Frobenius) error exceeds this; None: no such gate.
    """

    name: ClassVar[str] = "finequant"
    version: ClassVar[int] = 1

    bits: int = 4
    mode: str = "mse"
    rule: str = "threshold"
    alpha: float = 0.88
    margin: float = 0.05
    min_group: int = 32
    max_error: float | None = None

    def check(self) -> None:
        super().check()
        expect_bits(self)
        self._expect("mode", self.mode in MODES, f"one of {MODES}")
        self._expect("rule", self.rule in RULES, f"one of {RULES}")
        self._expect("alpha", 0 < self.alpha < 1, "a ratio between 0 and 1")
        self._expect("margin", 0 < self.margin < 1, "a difference between 0 and 1")
        self._expect("min_group", self.min_group in GROUP_SIZES[1:], f"one of {GROUP_SIZES[1:]}")
        self._expect("max_error", self.max_error is None or self.max_error > 0, "None or a positive error")


def range_ratio(weight: Tensor, size: int) -> float:
    """Mean over groups of ``size`` columns and their two halves of ``max|half| / max|group|``; groups of zeros skipped.

    ``weight`` is ``[N, K]``; a short last group counts as if filled with zeros. 1.0 when every group is zero.
    """
    n, k = weight.shape
    groups, half = -(-k // size), -(-size // 2)
    blocks = torch.nn.functional.pad(weight.abs(), (0, groups * size - k)).reshape(n, groups, size)
    halves = torch.nn.functional.pad(blocks, (0, 2 * half - size)).reshape(n, groups, 2, half).amax(-1)
    whole = halves.amax(-1, keepdim=True).expand_as(halves)
    alive = whole > 0
    return float((halves[alive] / whole[alive]).mean()) if bool(alive.any()) else 1.0


@functools.cache
def gaussian_ratio(size: int) -> float:
    """:func:`range_ratio` of an infinite matrix of independent normal numbers, by quadrature.

    The largest of n half-normal numbers has the quantile function ``sqrt(2) erfinv(u^(1/n))``; the two halves are
    independent, and the larger is the group's range.
    """
    u = (torch.arange(_QUADRATURE, dtype=torch.float64) + 0.5) / _QUADRATURE
    largest = torch.erfinv(u ** (1 / max(1, size // 2)))
    a, b = largest[:, None], largest[None, :]
    return float(((a + b) / (2 * torch.maximum(a, b))).mean())


def choose_group_size(weight: Tensor, recipe: FineQuant) -> tuple[int, dict[int, float]]:
    """The group size for ``weight`` fp32 ``[N, K]`` (0: the whole row) and the range ratio at every size tried.

    From one group per row, the size is halved while the recipe's rule or its error gate asks for it, and the result is
    rounded up to a supported size.
    """
    size, ratios = weight.shape[1], {}
    while size > recipe.min_group:
        ratio = ratios[size] = range_ratio(weight, size)
        limit = recipe.alpha if recipe.rule == "threshold" else gaussian_ratio(size) - recipe.margin
        if ratio > limit and not _error_too_large(weight, recipe, size):
            break
        size = math.ceil(size / 2)
    return _supported(size), ratios


def _error_too_large(weight: Tensor, recipe: FineQuant, size: int) -> bool:
    if recipe.max_error is None:
        return False
    group_size = _supported(size)
    codes, grid = round_to_nearest(weight, recipe.bits, group_size, recipe.mode)
    error = (decode(codes, grid, recipe.bits, group_size) - weight).norm() / weight.norm()
    return float(error) > recipe.max_error


def _supported(size: int) -> int:
    return next((g for g in GROUP_SIZES[1:] if g >= size), 0)


@register(FineQuant)
class FineQuantHandler(Handler):
    def prepare(self, context: Context, plan: Plan | None) -> None:
        check_affine(plan, context.recipe.name)
        if plan is not None and any(entry.outliers for entry in plan.layers.values()):
            raise ValueError(f"plan: outliers: expected none for {context.recipe.name}, got some")

    def plan(self, context: Context) -> Plan:
        layers = {}
        for index, layer in enumerate(context.layers):
            recipe = context.recipe.for_layer(layer.name)
            group_size, ratios = choose_group_size(layer.weight(), recipe)
            layers[layer.name] = LayerPlan(
                bits=recipe.bits,
                group_size=group_size,
                format=format_of(recipe.mode),
                compute=recipe.compute,
                options={"mode": recipe.mode, "range_ratios": {str(g): round(r, 4) for g, r in ratios.items()}},
            )
            context.progress("plan", index + 1, len(context.layers))
        return Plan(context.recipe.to_json(), layers)

    def quantize(
        self, context: Context, layer: Layer, weight: Tensor, entry: LayerPlan, stats: LayerStats | None
    ) -> WqWeight:
        codes, grid = round_to_nearest(weight, entry.bits, entry.group_size, mode_of(entry))
        return WqWeight.from_codes(codes, grid.scales, bits=entry.bits, group_size=entry.group_size, zeros=grid.zeros)
