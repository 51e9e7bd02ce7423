"""Round to nearest: the baseline that looks at one group of weights at a time; or, on the same grids, second order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ...formats.wq import WqWeight, normalize_group_size
from ..affine import check_affine, format_of, mode_of
from ..calibrate import LayerStats
from ..layers import Layer
from ..plan import LayerPlan, Plan
from ..recipe import Recipe, expect_bits, expect_group_size
from ..registry import Context, Handler, register
from ..solvers.gptq import factorize, gptq
from ..solvers.rtn import MODES, round_to_nearest, search_grid


@dataclass(frozen=True, kw_only=True)
class Rtn(Recipe):
    """Uniform bits, one group size, scales from each group's own range.

    Attributes:
        bits: 2, 3, 4 or 8.
        group_size: columns that share a scale; 0 or -1: the whole row.
        mode: range mode (see :mod:`effk.compress.solvers.rtn`).
        weighted: let the searches ("mse", "mse_asym") weigh errors by the mean squared input of each column, which needs
            calibration.
        second_order: round with GPTQ on these grids, which needs calibration; layers outside the transformer blocks,
            where no inputs are collected, stay round to nearest.
        damping: ridge added to Hessians, as a fraction of their mean diagonal.
    """

    name: ClassVar[str] = "rtn"
    version: ClassVar[int] = 1

    bits: int = 4
    group_size: int = 64
    mode: str = "mse"
    weighted: bool = False
    second_order: bool = False
    damping: float = 0.01

    def check(self) -> None:
        super().check()
        expect_bits(self)
        expect_group_size(self)
        self._expect("mode", self.mode in MODES, f"one of {MODES}")
        self._expect("weighted", not self.weighted or self.mode.startswith("mse"), "False for modes that do not search")
        self._expect("second_order", type(self.second_order) is bool, "a boolean")
        self._expect("damping", 0 < self.damping <= 1, "a fraction in (0, 1]")


@register(Rtn)
class RtnHandler(Handler):
    def statistics(self, recipe: Rtn) -> frozenset[str]:
        wanted = {"mean_sq"} if recipe.weighted else set()
        return frozenset(wanted | {"hessian"} if recipe.second_order else wanted)

    def prepare(self, context: Context, plan: Plan | None) -> None:
        check_affine(plan, context.recipe.name)
        if plan is not None and any(entry.outliers for entry in plan.layers.values()):
            raise ValueError(f"plan: outliers: expected none for {context.recipe.name}, got some")

    def plan(self, context: Context) -> Plan:
        layers = {}
        for layer in context.layers:
            recipe = context.recipe.for_layer(layer.name)
            layers[layer.name] = LayerPlan(
                bits=recipe.bits,
                group_size=normalize_group_size(recipe.group_size),
                format=format_of(recipe.mode),
                compute=recipe.compute,
                options={"mode": recipe.mode},
            )
        return Plan(context.recipe.to_json(), layers)

    def quantize(
        self, context: Context, layer: Layer, weight: Tensor, entry: LayerPlan, stats: LayerStats | None
    ) -> WqWeight:
        mode = mode_of(entry)
        importance = None if stats is None else stats.mean_sq
        if context.recipe.second_order and stats is not None:
            if context.shared.get("stats") is not stats:  # one factorisation for all layers over an input
                context.shared |= {"stats": stats, "factor": factorize(stats.hessian, context.recipe.damping)}
            grid = search_grid(weight, entry.bits, entry.group_size, mode, importance=importance)
            codes, _ = gptq(weight, context.shared["factor"], grid, entry.bits, entry.group_size)
        else:
            codes, grid = round_to_nearest(weight, entry.bits, entry.group_size, mode, importance=importance)
        return WqWeight.from_codes(codes, grid.scales, bits=entry.bits, group_size=entry.group_size, zeros=grid.zeros)
