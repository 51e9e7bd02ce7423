"""QUIK: low-bit weights and activations, with a few input columns in 16 bits on both sides.

Ashkboos et al., "QUIK: Towards End-to-end 4-Bit Inference on Generative Large Language Models", 2023 (arXiv:2310.09259).
The columns with the largest inputs on calibration text (the running maximum of ``|x|`` in the uncompressed model) stay in
16 bits; the others are rounded with one scale a row, clipped by a search and by second order, the kept columns taking up
what is lost; their inputs are rounded token by token when the layer runs. Where a gate multiplies, the input of the down
projection varies far more than others: it has 8 bits on both sides, and more kept columns.

The paper and its code name four different numbers of kept columns for the down projection: 3.5 times the other layers'
(paper, section on LLaMA-2-70B), "about 600" (its speed section), ``floor(K / hidden)`` times (accuracy scripts) and
``max(floor(K f), n)`` (kernel script). Here it is ``K / hidden`` times, or ``down_outliers``. Plan and report name the number
of every layer. Base columns are visited by falling ``H_kk``, not by rising activation as in the released code.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...formats.hadamard import rotate
from ...formats.quik import BITS, QuikWeight, base_columns
from ...nn import QuikLinear
from ...nn.quik_linear import ACTIVATION_BITS, QUANTIZERS
from ..calibrate import LayerStats, stream_blocks
from ..feedforward import FeedForward, find_feedforwards
from ..layers import Layer
from ..plan import LayerPlan, Plan
from ..recipe import Recipe, expect_bits
from ..registry import Context, Handler, register
from ..solvers.gptq import PATTERNS, factorize, gptq
from ..solvers.hadamard import rotate_model
from ..solvers.rtn import Grid, encode, row_scales

_ROTATED = "effk_rotated"  # attribute of a rotated model
_SHARE, _STEP, _MOST = 16, 16, 256  # default outliers: a sixteenth of the inputs, by sixteens, at most the paper's 256
_OUTSIDE = "is outside the transformer blocks, where no inputs are collected"


@dataclass(frozen=True, kw_only=True)
class Quik(Recipe):
    """Weights and activations of few bits with outlier columns.

    Attributes:
        bits: of weights, 4 or 8.
        bits_a: of activations, 4, 8 or 16 (16: left as they are); at least ``bits``.
        outliers: columns of each layer in 16 bits; None: a sixteenth of its inputs, a multiple of 16, at most 256. Rounded
            up where the others would not come in pairs (or units of ``pattern``).
        down_bits, down_bits_a: of the second matrix of feed-forward networks; None: 8 where a gate multiplies its input,
            else ``bits``; activations as many as the larger of ``down_bits`` and ``bits_a``.
        down_outliers: its columns; None: ``outliers`` times ``K / hidden`` where a gate multiplies, else ``outliers``.
        threshold: a layer whose inputs never exceed it keeps no column (twice that for an 8-bit down projection); 0: off.
        quantizer: how activations are rounded, "kernel" or "sim" (see :class:`effk.nn.QuikLinear`).
        second_order: round weights with GPTQ rather than to the nearest code.
        clip: search each row's scale.
        damping: ridge added to Hessians, as a fraction of their mean diagonal.
        act_order: visit base columns by falling ``H_kk``; costs nothing at run time.
        pattern: None, or leave out half of the base weights as they are rounded: "2:4" or "pair4:8".
        rotate: rotate the channels of a Llama-shaped model first, and the input of its down projection at run time
            (:mod:`effk.compress.solvers.hadamard`); it takes the place of outlier columns.

    ``compute`` stays "float"; it is that of ``embedding_bits``.
    """

    name: ClassVar[str] = "quik"
    version: ClassVar[int] = 1
    shared_fields: ClassVar[frozenset[str]] = Recipe.shared_fields | {"rotate"}

    bits: int = 4
    bits_a: int = 4
    outliers: int | None = None
    down_bits: int | None = None
    down_bits_a: int | None = None
    down_outliers: int | None = None
    threshold: float = 0.0
    quantizer: str = "kernel"
    second_order: bool = True
    clip: bool = True
    damping: float = 0.01
    act_order: bool = True
    pattern: str | None = None
    rotate: bool = False

    def check(self) -> None:
        super().check()
        expect_bits(self, BITS)
        self._expect("compute", self.compute == "float", "'float': bits_a says how activations are rounded")
        self._expect("bits_a", self.bits_a in ACTIVATION_BITS, f"one of {ACTIVATION_BITS}")
        self._expect("bits_a", self.bits_a >= self.bits, f"at least bits = {self.bits}")
        self._expect("down_bits", self.down_bits in (None, *BITS), f"None or one of {BITS}")
        self._expect("down_bits_a", self.down_bits_a in (None, *ACTIVATION_BITS), f"None or one of {ACTIVATION_BITS}")
        if self.down_bits_a is not None:
            least = self.bits if self.down_bits is None else self.down_bits
            self._expect("down_bits_a", self.down_bits_a >= least, f"at least the weights' {least}")
        for name in ("outliers", "down_outliers"):
            count = getattr(self, name)
            self._expect(name, count is None or (type(count) is int and count >= 0), "None, 0 or more")
            self._expect(name, not (self.rotate and count), "none with rotate")
        self._expect("threshold", isinstance(self.threshold, (int, float)) and self.threshold >= 0, "0 or more")
        self._expect("quantizer", self.quantizer in QUANTIZERS, f"one of {QUANTIZERS}")
        for name in ("second_order", "clip", "act_order", "rotate"):
            self._expect(name, type(getattr(self, name)) is bool, "a boolean")
        self._expect("damping", 0 < self.damping <= 1, "a fraction in (0, 1]")
        self._expect("pattern", self.pattern in (None, *PATTERNS), f"None or one of {tuple(PATTERNS)}")
        self._expect("pattern", self.pattern is None or self.second_order, "None without second_order")

    @property
    def needs_inputs(self) -> bool:
        """Whether anything is decided from calibration text."""
        return self.second_order or not self.rotate and (self.outliers != 0 or self.down_outliers not in (None, 0))


@register(Quik)
class QuikHandler(Handler):
    def needs_calibration(self, recipe: Quik) -> bool:
        return any(own.needs_inputs for own in _variants(recipe))

    def statistics(self, recipe: Quik) -> frozenset[str]:
        return frozenset({"hessian"} if any(own.second_order for own in _variants(recipe)) else ())

    def prepare(self, context: Context, plan: Plan | None) -> None:
        recipe: Quik = context.recipe
        inside = [layer for layer in context.layers if layer.block is not None]
        for name, entry in plan.layers.items() if plan is not None else ():
            _check_entry(name, entry, recipe)
            if not any(layer.name == name for layer in inside):
                raise ValueError(f"plan: {name}: expected a layer inside transformer blocks, got one that {_OUTSIDE}")
        if recipe.rotate and not hasattr(context.model, _ROTATED):  # plan first, compress later: once is enough
            rotate_model(context.model)
            setattr(context.model, _ROTATED, True)
        context.shared["max_abs"] = seen = {}
        kept = plan is not None and any(entry.options["outlier_columns"] for entry in plan.layers.values())
        if self.needs_calibration(recipe) or kept:
            for block in stream_blocks(context.model, inside, context.calib):
                members = [layer for layer in inside if layer.block == block.name]
                stats = block.statistics(members, frozenset({"max_abs"}))
                seen |= {layer.name: stats[layer.name].max_abs for layer in members}
                context.progress("watch", len(seen), len(inside))

    def plan(self, context: Context) -> Plan:
        downs = {network.down.name: network for network in find_feedforwards(context.model)[0]}
        layers = {}
        for layer in context.layers:
            if layer.block is None:
                context.skipped[layer.name] = _OUTSIDE
                continue
            recipe, max_abs = context.recipe.for_layer(layer.name), context.shared["max_abs"].get(layer.name)
            layers[layer.name] = _entry(layer, recipe, max_abs, downs.get(layer.name))
        notes = {
            "max_abs": {name: float(values.max()) for name, values in context.shared["max_abs"].items()},
            "layers_by_outlier_columns": {
                str(columns): count
                for columns, count in Counter(e.options["outlier_columns"] for e in layers.values()).items()
            },
        }
        return Plan(context.recipe.to_json(), layers, dict(context.skipped), notes)

    def quantize(
        self, context: Context, layer: Layer, weight: Tensor, entry: LayerPlan, stats: LayerStats | None
    ) -> QuikWeight:
        recipe: Quik = context.recipe.for_layer(layer.name)
        options, hessian = entry.options, None if stats is None else stats.hessian
        if options["rotated"]:
            weight = rotate(weight)
        columns = outlier_columns(context.shared["max_abs"].get(layer.name), layer.k, options["outlier_columns"])
        base = base_columns(layer.k, columns)
        scales = row_scales(weight[:, base].contiguous(), entry.bits, clip=recipe.clip)
        grid = Grid(scales.unsqueeze(1), None)
        if recipe.second_order:
            # One factorisation for all layers over an input, if they keep the same columns.
            key = (id(stats), tuple(columns.tolist()), options["rotated"], options["pattern"])
            if context.shared.get("factor", (None,))[0] != key:
                if options["rotated"]:
                    hessian = rotate(rotate(hessian).t())
                factor = factorize(
                    hessian, recipe.damping, act_order=recipe.act_order, last=columns, pattern=options["pattern"]
                )
                context.shared["factor"] = (key, factor, stats)  # stats: so that no other object gets its id
            factor = context.shared["factor"][1]
            codes, values = gptq(weight, factor, grid, entry.bits, 0, pattern=options["pattern"])
        else:
            codes, values = encode(weight, grid, entry.bits, 0), weight
        largest = float(values[:, columns].abs().max()) if len(columns) else 0.0
        dtype = torch.float16 if largest <= torch.finfo(torch.float16).max else torch.bfloat16
        return QuikWeight.from_codes(
            codes,
            scales,
            values,
            columns,
            bits=entry.bits,
            dtype=dtype,
            rotated=options["rotated"],
            pattern=options["pattern"],
        )

    def module(self, weight: QuikWeight, bias: Tensor | None, entry: LayerPlan) -> QuikLinear:
        # Weights are calibrated on activations that are not rounded: every layer starts that way.
        return QuikLinear.from_weight(weight, bias, 16, entry.options["quantizer"])

    def finish(self, module: QuikLinear, entry: LayerPlan) -> None:
        module.bits_a = entry.options["bits_a"]


def _variants(recipe: Quik) -> list[Quik]:
    """The recipe, and what it is for layers with overrides."""
    return [recipe, *(dataclasses.replace(recipe, per_layer={}, **fields) for fields in recipe.per_layer.values())]


def outlier_columns(max_abs: Tensor | None, k: int, count: int) -> Tensor:
    """int64 ``[count]``, ascending: the columns of the largest ``max_abs`` ``[k]``; of equals the later ones."""
    if not count:
        return torch.empty(0, dtype=torch.int64)
    if max_abs is None or len(max_abs) != k:
        raise ValueError(f"quik: expected the largest inputs of {k} columns to choose {count} of them, got none")
    return max_abs.argsort(stable=True)[k - count :].sort().values


def _entry(layer: Layer, recipe: Quik, max_abs: Tensor | None, network: FeedForward | None) -> LayerPlan:
    """``network`` is the one whose second matrix the layer is, if any."""
    gated = network is not None and len(network.up) == 2
    hidden = layer.k if network is None else network.up[0].k
    bits, bits_a, count = recipe.bits, recipe.bits_a, recipe.outliers
    if count is None:
        count = 0 if recipe.rotate else min(_MOST, _STEP * math.ceil(hidden / _SHARE / _STEP))
    if network is not None:
        bits = recipe.down_bits if recipe.down_bits is not None else 8 if gated else bits
        bits_a = recipe.down_bits_a if recipe.down_bits_a is not None else max(bits, bits_a)
        if recipe.down_outliers is not None:
            count = recipe.down_outliers
        elif gated:
            count = round(count * layer.k / hidden)
    if max_abs is not None and recipe.threshold:
        limit = 2 * recipe.threshold if network is not None and bits == 8 else recipe.threshold
        count = 0 if float(max_abs.max()) <= limit else count
    unit = 2 if recipe.pattern is None else PATTERNS[recipe.pattern][0]
    count = min(count, layer.k - unit)
    count += (layer.k - count) % unit
    return LayerPlan(
        bits=bits,
        group_size=0,
        format="quik",
        scale_bytes=4,
        options={
            "outlier_columns": count,
            "bits_a": bits_a,
            "quantizer": recipe.quantizer,
            "rotated": recipe.rotate and gated,
            "pattern": recipe.pattern,
        },
    )


def _check_entry(name: str, entry: LayerPlan, recipe: Quik) -> None:
    """Refuse an edited entry before any work."""

    def expect(field: str, got: Any, ok: bool, expected: str) -> None:
        if not ok:
            raise ValueError(f"plan: {name}: {field}: expected {expected}, got {got!r}")

    options: Mapping[str, Any] = entry.options
    expect("format", entry.format, entry.format == "quik", "'quik'")
    fields = {"outlier_columns", "bits_a", "quantizer", "rotated", "pattern"}
    expect("options", dict(options), set(options) == fields, f"{sorted(fields)}")
    bits_a, pattern = options["bits_a"], options["pattern"]
    expect(
        "bits_a",
        bits_a,
        bits_a in ACTIVATION_BITS and bits_a >= entry.bits,
        f"at least {entry.bits}, of {ACTIVATION_BITS}",
    )
    expect("quantizer", options["quantizer"], options["quantizer"] in QUANTIZERS, f"one of {QUANTIZERS}")
    expect("rotated", options["rotated"], type(options["rotated"]) is bool, "a boolean")
    expect("pattern", pattern, pattern in (None, *PATTERNS), f"None or one of {tuple(PATTERNS)}")
    expect("pattern", pattern, pattern is None or recipe.second_order, "None without second_order")
    count = options["outlier_columns"]
    expect("outlier_columns", count, type(count) is int and count >= 0, "0 or more")
    expect("outlier_columns", count, not (count and options["rotated"]), "0 for rotated inputs")
