"""LLM-MQ: 2, 3 or 4 bits per layer under a memory budget, with sparse FP16 outliers.

Li et al., "LLM-MQ: Mixed-precision Quantization for Efficient LLM Deployment", NeurIPS 2023 ENLSP workshop. The steps of
the paper: AWQ scaling, outliers set apart, group-wise rounding, a sensitivity score per layer and bit-width, and an exact
budgeted choice. :meth:`LlmMq.paper` gives the paper's settings. The defaults differ: second-order rounding that follows
the drift of the inputs, with refinement, instead of round to nearest; outliers by their effect on the output instead of
their magnitude; a Fisher score instead of the signed first-order one, which cancels; and no channel scaling, which gained
nothing beside second-order rounding (SmolLM2 at 3.0 bits: perplexity 56.70 with, 56.68 without) and costs 45 s there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from ...formats.wq import WqWeight, normalize_group_size
from ..affine import check_affine, format_of, mode_of
from ..calibrate import LayerStats, stream_blocks
from ..folding import find_folds, fold_block
from ..layers import Layer
from ..plan import LayerPlan, Plan, outlier_count
from ..recipe import Recipe, expect_group_size
from ..registry import Context, Handler, register
from ..sensitivity import SCORES, Probe, make_monotone, score, stream_gradients
from ..solvers.awq import channel_scale, search_scaling
from ..solvers.knapsack import allocate
from ..solvers.lowbit import Inputs, Steps, compress_weight
from ..solvers.outliers import CRITERIA, select_outliers
from ..solvers.rtn import MODES

BUDGETS = ("nominal", "true")
_SCALED = "effk_channel_scaling"  # attribute of a scaled model: fold name -> exponent


@dataclass(frozen=True, kw_only=True)
class LlmMq(Recipe):
    """Mixed 2, 3 and 4 bits within a budget.

    Attributes:
        bits: the budget in average bits per weight.
        budget: "nominal" counts codes only, as the paper; "true" also scales, zero points and outliers.
        choices: the bit-widths on offer.
        group_size: columns that share a scale; 0 or -1: the whole row.
        mode: range mode (see :mod:`effk.compress.solvers.rtn`); "mse" and "mse_asym" weigh errors by ``H_kk``.
        outliers: fraction of a layer's weights kept as sparse fp16.
        outlier_bits: the bit-widths whose layers keep outliers.
        outlier_by: "hessian", "magnitude" or "fisher" (see :mod:`effk.compress.solvers.outliers`).
        outlier_variants: offer every bit-width without outliers as well; of use with ``budget="true"``.
        score: sensitivity score (see :mod:`effk.compress.sensitivity`).
        monotone: never let a layer's score rise with its bits.
        tie: give layers over one input (q, k, v; gate, up) the same choice.
        score_sequences: calibration sequences that the scores are computed on.
        scaling: move channel scales into the preceding layers first (AWQ).
        second_order: round with GPTQ rather than to the nearest code.
        sweeps: rounds of scale fits and coordinate descent after rounding.
        drift: part of the earlier layers' error that a layer's weight is moved to undo, 0 to 1.
        damping: ridge added to Hessians, as a fraction of their mean diagonal.
    """

    name: ClassVar[str] = "llm-mq"
    version: ClassVar[int] = 1

    bits: float = 4.0
    budget: str = "nominal"
    choices: tuple[int, ...] = (2, 3, 4)
    group_size: int = 64
    mode: str = "mse"
    outliers: float = 0.005
    outlier_bits: tuple[int, ...] = (2, 3)
    outlier_by: str = "hessian"
    outlier_variants: bool = False
    score: str = "output_fisher"
    monotone: bool = True
    tie: bool = False
    score_sequences: int = 8
    scaling: bool = False
    second_order: bool = True
    sweeps: int = 1
    drift: float = 0.5
    damping: float = 0.05

    def __post_init__(self) -> None:
        sequences = {"choices", "outlier_bits"}  # JSON brings them back as lists
        for name in sequences:
            object.__setattr__(self, name, tuple(getattr(self, name)))
        overrides = {p: {k: tuple(v) if k in sequences else v for k, v in o.items()} for p, o in self.per_layer.items()}
        object.__setattr__(self, "per_layer", overrides)
        super().__post_init__()

    def check(self) -> None:
        super().check()
        expect_group_size(self)
        low_bits = tuple(sorted(set(self.choices)))
        self._expect("choices", low_bits and set(low_bits) <= {2, 3, 4, 8}, "some of 2, 3, 4, 8")
        self._expect("bits", isinstance(self.bits, (int, float)) and 0 < self.bits <= 16, "average bits up to 16")
        self._expect("budget", self.budget in BUDGETS, f"one of {BUDGETS}")
        self._expect("mode", self.mode in MODES, f"one of {MODES}")
        self._expect("outliers", 0 <= self.outliers <= 0.1, "a fraction in [0, 0.1]")
        self._expect("outlier_bits", set(self.outlier_bits) <= {2, 3, 4, 8}, "some of 2, 3, 4, 8")
        self._expect("outlier_by", self.outlier_by in CRITERIA, f"one of {CRITERIA}")
        self._expect("score", self.score in SCORES, f"one of {SCORES}")
        self._expect("score_sequences", self.score_sequences >= 1, "at least 1")
        self._expect("sweeps", self.sweeps >= 0, "at least 0")
        self._expect("drift", 0 <= self.drift <= 1, "a part in [0, 1]")
        self._expect("damping", 0 < self.damping <= 1, "a fraction in (0, 1]")

    @classmethod
    def paper(cls, bits: float, **changes: Any) -> Self:
        """The paper's own settings: groups of 128, min/max ranges, round to nearest, outliers by magnitude in 2-bit
        layers, the signed first-order score as it is."""
        settings = {
            "group_size": 128,
            "mode": "asym",
            "outlier_bits": (2,),
            "outlier_by": "magnitude",
            "score": "first_order",
            "monotone": False,
            "second_order": False,
            "sweeps": 0,
            "drift": 0.0,
            "scaling": True,
        }
        return cls(bits=bits, **{**settings, **changes})


class Choice(NamedTuple):
    """One way to store a layer: bits and the fraction of outliers."""

    bits: int
    outliers: float


def choices_of(recipe: LlmMq) -> list[Choice]:
    """What the allocator may pick for a layer, by rising size."""
    found = []
    for bits in sorted(set(recipe.choices)):
        protected = bits in recipe.outlier_bits and recipe.outliers > 0
        if not protected or recipe.outlier_variants:
            found.append(Choice(bits, 0.0))
        if protected:
            found.append(Choice(bits, recipe.outliers))
    return found


def plan_from_scores(context: Context, scores: Mapping[str, Sequence[float]]) -> Plan:
    """The optimal plan for ``context.recipe`` given every layer's scores of its :func:`choices_of`, in that order.

    The scores are kept in the plan's notes; :func:`reallocate` makes plans for other budgets from them.

    Raises:
        InfeasibleBudget: the budget is below the cheapest plan.
    """
    recipe: LlmMq = context.recipe
    layers = [layer for layer in context.layers if layer.name in scores]
    entries = {layer.name: _entries(layer, recipe.for_layer(layer.name), scores[layer.name]) for layer in layers}
    used, costs = [], []
    for layer in layers:
        options = entries[layer.name]
        raw = [entry.score for entry in options]
        used.append(make_monotone(raw) if recipe.monotone else raw)
        costs.append([layer.n * layer.k * e.bits if recipe.budget == "nominal" else 8 * e.bytes_after for e in options])
    weights = sum(layer.n * layer.k for layer in layers)
    groups = [layer.input_group for layer in layers] if recipe.tie else None
    allocation = allocate(used, costs, int(recipe.bits * weights + 1e-6), groups=groups)
    picked = {layer.name: entries[layer.name][c] for layer, c in zip(layers, allocation.choices, strict=True)}
    notes = {
        "budget_bits": recipe.bits,
        "nominal_bits": sum(picked[layer.name].bits * layer.n * layer.k for layer in layers) / weights,
        "true_bits": 8 * sum(entry.bytes_after for entry in picked.values()) / weights,
        "predicted_rise": allocation.score,
        "scaling": dict(context.shared.get("scaling", {})),
        "scores": {name: list(values) for name, values in scores.items()},
    }
    return Plan(recipe.to_json(), picked, dict(context.skipped), notes)


def reallocate(plan: Plan, recipe: LlmMq, layers: Sequence[Layer]) -> Plan:
    """The plan for another budget (or grouping, or monotone setting) from the scores that ``plan`` carries: no calibration.

    Args:
        plan: made by an :class:`LlmMq` recipe with the same choices.
        recipe: the new recipe.
        layers: the model's layers.

    Raises:
        ValueError: the plan carries no scores, or its layers have another number of choices.
    """
    scores = plan.notes.get("scores")
    if not isinstance(scores, Mapping):
        raise ValueError("reallocate: plan: expected one with scores in its notes, got one without")
    known = [layer for layer in layers if layer.name in scores]
    for layer in known:
        expected = len(choices_of(recipe.for_layer(layer.name)))
        if len(scores[layer.name]) != expected:
            raise ValueError(f"reallocate: {layer.name}: expected {expected} scores, got {len(scores[layer.name])}")
    context = Context(torch.nn.Module(), recipe, known, skipped=dict(plan.skipped))
    context.shared["scaling"] = plan.notes.get("scaling", {})
    return plan_from_scores(context, scores)


def _entries(layer: Layer, recipe: LlmMq, scores: Sequence[float]) -> list[LayerPlan]:
    return [
        LayerPlan(
            bits=choice.bits,
            group_size=normalize_group_size(recipe.group_size),
            format=format_of(recipe.mode),
            outliers=choice.outliers,
            compute=recipe.compute,
            score=value,
            options={"mode": recipe.mode},
        ).sized(layer)
        for choice, value in zip(choices_of(recipe), scores, strict=True)
    ]


@register(LlmMq)
class LlmMqHandler(Handler):
    def needs_calibration(self, recipe: LlmMq) -> bool:
        return True

    def statistics(self, recipe: LlmMq) -> frozenset[str]:
        return frozenset({"hessian", "drift"} if recipe.drift else {"hessian"})

    def prepare(self, context: Context, plan: Plan | None) -> None:
        inside = [layer for layer in context.layers if layer.block is not None]
        check_affine(plan, context.recipe.name)
        if outside := [
            layer.name for layer in context.layers if layer.block is None and plan and layer.name in plan.layers
        ]:
            raise ValueError(
                f"plan: expected layers inside transformer blocks, where inputs are collected, got {outside}"
            )
        if plan is None:  # refuses a budget that nothing can meet before the model is touched
            plan_from_scores(
                context, {a.name: [0.0] * len(choices_of(context.recipe.for_layer(a.name))) for a in inside}
            )
        if context.recipe.scaling:
            _scale_channels(context, inside, None if plan is None else plan.notes.get("scaling") or None)
        if context.recipe.outlier_by == "fisher":
            context.shared["fisher"] = fisher = {}
            for probes in stream_gradients(context.model, inside, _score_sequences(context)):
                for layer in (layer for layer in inside if layer.name in probes):
                    count = outlier_count(layer.n, layer.k, context.recipe.for_layer(layer.name).outliers)
                    fisher[layer.name] = _fisher_candidates(layer, probes[layer.name], count)

    def plan(self, context: Context) -> Plan:
        scores: dict[str, list[float]] = {}
        inside = [layer for layer in context.layers if layer.block is not None]
        for layer in context.layers:
            if layer.block is None:
                context.skipped[layer.name] = "is outside the transformer blocks, where no inputs are collected"
        context.progress("score", 0, len(inside))
        for probes in stream_gradients(context.model, inside, _score_sequences(context)):
            prepared: dict[str, Inputs] = {}
            for layer in (layer for layer in inside if layer.name in probes):
                probe, recipe = probes[layer.name], context.recipe.for_layer(layer.name)
                if layer.input_group not in prepared:
                    x = probe.x.flatten(0, 1)
                    prepared[layer.input_group] = Inputs(x.t() @ x, recipe.damping)
                scores[layer.name] = _score_choices(context, layer, recipe, probe, prepared[layer.input_group])
                context.progress("score", len(scores), len(inside))
        return plan_from_scores(context, {layer.name: scores[layer.name] for layer in inside})

    def quantize(
        self, context: Context, layer: Layer, weight: Tensor, entry: LayerPlan, stats: LayerStats | None
    ) -> WqWeight:
        recipe: LlmMq = context.recipe.for_layer(layer.name)
        if context.shared.get("stats") is not stats:  # one factorisation for all layers over an input
            context.shared |= {"stats": stats, "inputs": Inputs(stats.hessian, recipe.damping, stats.drift)}
        inputs: Inputs = context.shared["inputs"]
        weight = inputs.follow_drift(weight, recipe.drift)
        steps = _steps(layer, recipe, entry.bits, entry.group_size, entry.outliers, mode_of(entry), recipe.sweeps)
        return compress_weight(weight, steps, inputs, _saliency(context, layer, recipe, inputs))


def _scale_channels(context: Context, inside: Sequence[Layer], alphas: Mapping[str, float] | None) -> None:
    """Fold AWQ scales into the model, searched for or with the exponents of an earlier plan; notes them in ``shared``.

    The mark on the model keeps a second call (plan first, compress later) from scaling the scaled.
    """
    if hasattr(context.model, _SCALED):
        context.shared["scaling"] = getattr(context.model, _SCALED)
        return
    recipe: LlmMq = context.recipe
    folds, done = find_folds(context.model, inside), {}
    bits = min(recipe.choices, key=lambda b: abs(b - recipe.bits))
    for block in stream_blocks(context.model, inside, context.calib):
        here = [fold for fold in folds if fold.consumers[0].block == block.name]
        members = [fold.consumers[0] for fold in here]
        if not here:
            continue
        stats = block.statistics(members, frozenset({"mean_abs", "hessian"}))
        found = {}
        for fold in here:
            seen = stats[fold.consumers[0].name]
            mean_abs = fold.shared(seen.mean_abs)
            if alphas is None:
                weights = [layer.weight() for layer in fold.consumers]
                found[fold.name] = search_scaling(
                    weights, mean_abs, seen.hessian, bits, normalize_group_size(recipe.group_size)
                )[:2]
            else:
                alpha = float(alphas.get(fold.name, 0.0))
                found[fold.name] = (alpha, channel_scale(mean_abs, alpha))
        if fold_block(block, here, [found[fold.name][1] for fold in here]):
            done |= {name: alpha for name, (alpha, _) in found.items()}
        context.progress("scale", len(done), len(folds))
    context.shared["scaling"] = done
    setattr(context.model, _SCALED, done)


def _score_sequences(context: Context) -> list[Tensor]:
    """Calibration sequences for gradients, one a batch: a batch's logits and activations are what memory must hold."""
    return [row for batch in context.calib for row in batch.split(1)][: context.recipe.score_sequences]


def _score_choices(context: Context, layer: Layer, recipe: LlmMq, probe: Probe, inputs: Inputs) -> list[float]:
    weight, scores = layer.weight(), []
    saliency = _saliency(context, layer, recipe, inputs)
    group_size = normalize_group_size(recipe.group_size)
    for choice in choices_of(recipe):
        steps = _steps(layer, recipe, choice.bits, group_size, choice.outliers, recipe.mode, sweeps=0)
        change = weight - compress_weight(weight, steps, inputs, saliency).dequantize()
        scores.append(score(recipe.score, probe, change))
    return scores


def _steps(layer: Layer, recipe: LlmMq, bits: int, group_size: int, outliers: float, mode: str, sweeps: int) -> Steps:
    return Steps(
        bits=bits,
        group_size=group_size,
        mode=mode,
        outliers=outlier_count(layer.n, layer.k, outliers),
        second_order=recipe.second_order,
        sweeps=sweeps,
    )


def _saliency(context: Context, layer: Layer, recipe: LlmMq, inputs: Inputs) -> Tensor | None:
    """Importance of the weights as outlier candidates, for :func:`select_outliers`; None is by magnitude."""
    if recipe.outlier_by == "hessian":
        return inputs.diagonal
    if recipe.outlier_by == "fisher":
        index, value = context.shared["fisher"][layer.name]
        return torch.zeros(layer.n * layer.k).index_put_((index,), value).reshape(layer.n, layer.k)
    return None


def _fisher_candidates(layer: Layer, probe: Probe, count: int) -> tuple[Tensor, Tensor]:
    """Flat indices and mean squared gradients of the ``count`` weights with the largest ``w^2 F``; the rest is dropped."""
    fisher = probe.gradients().square().mean(0)
    index = select_outliers(layer.weight(), count, fisher).flatten().nonzero().flatten()
    return index, fisher.flatten()[index]
