"""Sparse weights: prune one-shot, keep what is left in fp32, bf16 or int8 behind a bitmask.

Each layer gets the same share of zeros; embedding and head stay as they are. "sparsegpt" prunes by second order and, for int8
values, rounds in the same sweep (Frantar, Alistarh, 2023, arXiv:2301.00774); "wanda" weighs magnitudes by the inputs (Sun et
al., 2023, arXiv:2306.11695); "magnitude" needs no calibration; "keep" takes the zeros that are there, such as those of a
sparse fine-tune (:mod:`effk.compress.sparse_training`). One-shot pruning holds to about 50 %; beyond, fine-tune with the mask
(Kurtic et al., 2023, arXiv:2310.06927).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...formats.bitmask import DTYPES, BitmaskTensor
from ...nn.bitmask_linear import BitmaskLinear
from ...ops.bitmask_linear import VALUES, break_even
from ..calibrate import LayerStats
from ..layers import Layer
from ..plan import LayerPlan, Plan
from ..recipe import Recipe
from ..registry import Context, Handler, register
from ..solvers.prune import magnitude, parse_pattern, sparsegpt, wanda
from ..solvers.rtn import Grid

METHODS = ("sparsegpt", "wanda", "magnitude", "keep")
_BITS = {"fp32": 32, "bf16": 16, "int8": 8}
_OUTSIDE = "is outside the transformer blocks, where no inputs are collected"


@dataclass(frozen=True, kw_only=True)
class Sparse(Recipe):
    """Unstructured or n:m zeros.

    Attributes:
        sparsity: share of zeros in every layer, above what the format pays for (12.5 % for int8).
        method: one of :data:`METHODS`.
        pattern: None, or "n:m" in place of the share ("2:4" for "sparsegpt").
        values: "int8", "bf16" or "fp32".
        group_size: columns that share a scale of int8 values, a multiple of 64; 0: the row.
        damping: ridge added to Hessians, as a fraction of their mean diagonal.
    """

    name: ClassVar[str] = "sparse"
    version: ClassVar[int] = 1

    sparsity: float = 0.5
    method: str = "sparsegpt"
    pattern: str | None = None
    values: str = "int8"
    group_size: int = 0
    damping: float = 0.01

    def check(self) -> None:
        super().check()
        self._expect("method", self.method in METHODS, f"one of {METHODS}")
        self._expect("values", self.values in VALUES, f"one of {VALUES}")
        least = break_even(self.values)
        self._expect("sparsity", least < self.sparsity < 1, f"a share above {least}, below which dense is smaller")
        if self.pattern is not None:
            parse_pattern(self.pattern)
            self._expect("pattern", self.method != "keep", "None for 'keep'")
            self._expect(
                "pattern", self.method != "sparsegpt" or self.pattern == "2:4", "None or '2:4' for 'sparsegpt'"
            )
        legal = self.group_size == 0 or (self.values == "int8" and self.group_size in (64, 128, 256))
        self._expect("group_size", legal, "0, or 64, 128 or 256 for int8")
        self._expect("compute", self.compute == "float" or self.values == "int8", "'float' unless values are int8")
        self._expect("damping", 0 < self.damping <= 1, "a fraction in (0, 1]")


@register(Sparse)
class SparseHandler(Handler):
    def statistics(self, recipe: Sparse) -> frozenset[str]:
        methods = {recipe.method, *(fields.get("method", recipe.method) for fields in recipe.per_layer.values())}
        return frozenset(
            ({"hessian"} if "sparsegpt" in methods else set()) | ({"mean_sq"} if "wanda" in methods else set())
        )

    def plan(self, context: Context) -> Plan:
        layers = {}
        for layer in context.layers:
            recipe = context.recipe.for_layer(layer.name)
            if layer.block is None and recipe.method in ("sparsegpt", "wanda"):
                context.skipped[layer.name] = _OUTSIDE
                continue
            share = recipe.sparsity
            if recipe.pattern is not None:
                kept, width = parse_pattern(recipe.pattern)
                if layer.k % width:
                    context.skipped[layer.name] = f"has {layer.k} columns, no multiple of {width}"
                    continue
                share = 1 - kept / width
            elif recipe.method == "keep":
                share = float((layer.weight() == 0).float().mean())
                if share <= break_even(recipe.values):
                    context.skipped[layer.name] = f"has {share:.1%} zeros, too few for the format"
                    continue
            layers[layer.name] = LayerPlan(
                bits=_BITS[recipe.values],
                group_size=recipe.group_size if recipe.group_size < layer.k else 0,
                format="bitmask",
                compute=recipe.compute,
                scale_bytes=4,
                options={"sparsity": share, "method": recipe.method, "pattern": recipe.pattern},
            )
        return Plan(context.recipe.to_json(), layers, dict(context.skipped))

    def quantize(
        self, context: Context, layer: Layer, weight: Tensor, entry: LayerPlan, stats: LayerStats | None
    ) -> BitmaskTensor:
        share, method, pattern = (entry.options[name] for name in ("sparsity", "method", "pattern"))
        grid = Grid(_scales(weight, entry.group_size), None) if entry.bits == 8 else None
        codes = None
        if method == "sparsegpt":
            pruned, codes = sparsegpt(
                weight, stats.hessian, share, pattern, grid=grid, group_size=entry.group_size,
                damping=context.recipe.for_layer(layer.name).damping,
            )  # fmt: skip
        elif method == "wanda":
            pruned = wanda(weight, stats.mean_sq, share, pattern)
        else:
            pruned = weight if method == "keep" else magnitude(weight, share, pattern)
        if grid is None:
            return BitmaskTensor.from_dense(pruned.to(DTYPES[entry.bits]))
        scales = grid.scales
        if codes is None:
            scales = _scales(pruned, entry.group_size)
            codes = (pruned / _spread(scales, entry.group_size, layer.k)).round().clamp(-127, 127).to(torch.int8)
        return BitmaskTensor.from_dense(codes, scales, entry.group_size)

    def module(self, weight: BitmaskTensor, bias: Tensor | None, entry: LayerPlan) -> BitmaskLinear:
        # Weights are calibrated on activations that are not rounded.
        return BitmaskLinear.from_weight(weight, bias, "float")

    def finish(self, module: BitmaskLinear, entry: LayerPlan) -> None:
        module.compute = entry.compute


def _scales(weight: Tensor, group: int) -> Tensor:
    """fp32 ``[n, groups]``: the largest magnitude of each group to 127."""
    parts = weight.split(group or weight.shape[1], 1)
    scales = torch.stack([part.abs().amax(1) for part in parts], 1) / 127
    return torch.where(scales == 0, torch.ones_like(scales), scales)


def _spread(scales: Tensor, group: int, k: int) -> Tensor:
    return scales.repeat_interleave(group or k, 1)[:, :k]
