"""MoQE: the experts of a mixture in few bits, everything else as it is.

Kim, Fahim and Awadalla, "Mixture of Quantized Experts (MoQE)", 2023 (arXiv:2310.02410): expert weights bear 2 to 4 bits far
better than dense ones, and hold most of a mixture's parameters. Symmetric codes, one scale for each output channel of each
expert, no calibration. The paper recovers 2 bits by quantisation-aware training, which is not here; scales are searched for
the least squared error instead (``mode`` "mse"; the paper takes each row's largest weight, nearly "sym_mid").
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from ...formats.wq import WqWeight, normalize_group_size
from ...nn import WqGroupedLinear, WqLinear
from ..affine import check_affine, format_of, mode_of
from ..calibrate import LayerStats
from ..experts import ExpertStack, find_experts, group_experts
from ..layers import Layer
from ..plan import LayerPlan, Plan
from ..recipe import Recipe, expect_bits, expect_group_size
from ..registry import Context, Handler, register
from ..solvers.rtn import MODES, round_to_nearest


@dataclass(frozen=True, kw_only=True)
class MoQE(Recipe):
    """Uniform bits for the experts' weights.

    Attributes:
        bits: 2, 3, 4 or 8.
        group_size: columns that share a scale; 0: the whole row, as in the paper.
        mode: range mode (see :mod:`effk.compress.solvers.rtn`).
    """

    name: ClassVar[str] = "moqe"
    version: ClassVar[int] = 1

    bits: int = 4
    group_size: int = 0
    mode: str = "mse"

    def check(self) -> None:
        super().check()
        expect_bits(self)
        expect_group_size(self)
        self._expect("mode", self.mode in MODES, f"one of {MODES}")


@register(MoQE)
class MoQEHandler(Handler):
    def find(self, model: nn.Module) -> tuple[list[Layer], dict[str, str]]:
        return find_experts(model)

    def prepare(self, context: Context, plan: Plan | None) -> None:
        check_affine(plan, context.recipe.name)
        if plan is not None and any(entry.outliers for entry in plan.layers.values()):
            raise ValueError(f"plan: outliers: expected none for {context.recipe.name}, got some")
        for layer in context.layers if plan is None else [x for x in context.layers if x.name in plan.layers]:
            expected = layer.experts if isinstance(layer, ExpertStack) else 1
            if plan is not None and (got := plan.layers[layer.name].options.get("experts", 1)) != expected:
                raise ValueError(f"plan: {layer.name}: options: expected {expected} experts, got {got!r}")
        for layer in context.layers:
            if isinstance(layer, ExpertStack):
                group_experts(context.model, layer.name.rpartition(".")[0])

    def plan(self, context: Context) -> Plan:
        layers = {}
        for layer in context.layers:
            recipe = context.recipe.for_layer(layer.name)
            stack = {"experts": layer.experts} if isinstance(layer, ExpertStack) else {}
            layers[layer.name] = LayerPlan(
                bits=recipe.bits,
                group_size=normalize_group_size(recipe.group_size),
                format=format_of(recipe.mode),
                compute=recipe.compute,
                options={"mode": recipe.mode, **stack},
            )
        everything = sum(parameter.numel() for parameter in context.model.parameters())
        share = sum(layer.n * layer.k for layer in context.layers) / everything
        return Plan(context.recipe.to_json(), layers, notes={"expert_share": round(share, 6)})

    def quantize(
        self, context: Context, layer: Layer, weight: Tensor, entry: LayerPlan, stats: LayerStats | None
    ) -> WqWeight:
        codes, grid = round_to_nearest(weight, entry.bits, entry.group_size, mode_of(entry))
        return WqWeight.from_codes(codes, grid.scales, bits=entry.bits, group_size=entry.group_size, zeros=grid.zeros)

    def module(self, weight: WqWeight, bias: Tensor | None, entry: LayerPlan) -> WqLinear | WqGroupedLinear:
        if "experts" not in entry.options:
            return WqLinear.from_weight(weight, bias, entry.compute)
        return WqGroupedLinear.from_weight(weight, entry.options["experts"], entry.compute)
