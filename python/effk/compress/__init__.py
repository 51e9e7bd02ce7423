"""Compress a model: ``effk.compress(model, recipe, calib)``.

The package is the function: ``effk.compress(...)`` and ``from effk.compress import compress`` are the same call, and
``effk.compress.plan`` and the other modules stay reachable. (A package cannot be callable by itself, so its module
object's class is one that is.)

Steps of a call, each in its own module: find the layers (``layers``), let the method prepare the model and make a
plan (``registry``, ``passes``, ``plan``), apply it block by block on calibration data (``apply``, ``calibrate``),
compress the embedding (``embedding``), let layers over one input share their kernel call (``fuse``), and report
(``report``). Recipes for long filters, for feed-forward networks and for sparse activations go other ways
(``filters``, ``convert``, ``activation``).
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from ..hub.record import PROVENANCE
from .activation import ActivationHandler, ActivationRecipe, SparsityReport
from .activation_convert import compress_activations, make_activation_plan
from .apply import apply_plan, model_bytes
from .calibrate import check_calib
from .convert import compress_networks, make_network_plan
from .embedding import compress_embedding, find_embedding
from .filters import FilterHandler, FilterPlan, FilterRecipe, FilterReport, compress_filters, make_filter_plan
from .fuse import fuse_shared_inputs
from .layers import Layer, find_layers
from .networks import NetworkHandler, NetworkPlan, NetworkRecipe, NetworkReport
from .plan import LayerPlan, Plan
from .recipe import Recipe, matches
from .registry import Context, Handler, Progress, handler_for, recipe_from_json, recipe_types, register
from .report import LayerReport, Report

__all__ = [
    "Context", "FilterHandler", "FilterPlan", "FilterRecipe", "FilterReport", "Handler", "Layer", "LayerPlan",
    "LayerReport", "NetworkHandler", "NetworkPlan", "NetworkRecipe", "NetworkReport", "Plan", "Progress", "Recipe",
    "Report", "ActivationHandler", "ActivationRecipe", "SparsityReport", "compress", "find_layers", "make_plan",
    "plan_from_json", "recipe_from_json", "recipe_types", "register",
]  # fmt: skip

AnyPlan = Plan | FilterPlan | NetworkPlan


def compress(
    model: nn.Module,
    recipe: Recipe,
    calib: Sequence[Tensor] | None = None,
    plan: AnyPlan | None = None,
    progress: Progress | None = None,
) -> Report | FilterReport | NetworkReport | SparsityReport:
    """Compress ``model`` in place.

    Args:
        model: any module with ``nn.Linear`` (or GPT-2's ``Conv1D``) layers; methods that calibrate need a decoder of
            transformers. For a recipe of long filters, a module with :class:`effk.nn.LongFilter` children that takes
            token ids and gives logits. For a recipe of feed-forward networks, a transformers model of a known shape,
            decoder or encoder. It is left in evaluation mode.
        recipe: what to do; one of :func:`recipe_types`.
        calib: token ids, each int64 ``[batch, length]``, for methods that calibrate.
        plan: apply this plan, for example an edited one, instead of making one.
        progress: called as ``progress(stage, done, total)``.

    Returns:
        What was done. The plan that was applied is ``report.plan``.

    Raises:
        TypeError: ``recipe`` is not a known recipe.
        ValueError: a recipe for layers that the model lacks, missing calibration, a plan that does not fit the model,
            an infeasible budget, weights with NaN or Inf: all before the model is changed. An interruption after that
            leaves a model of which some layers are compressed; it still runs.
    """
    if isinstance(handler := handler_for(recipe), FilterHandler):
        _check_plan(recipe, plan)
        model.eval()
        return compress_filters(model, recipe, handler, calib or (), plan, progress or silent)
    if isinstance(handler, (NetworkHandler, ActivationHandler)):
        _check_plan(recipe, plan)
        model.eval()
        run = compress_activations if isinstance(handler, ActivationHandler) else compress_networks
        report = run(model, recipe, handler, calib or (), plan, progress or silent)
        _mark(model, recipe)
        return report
    context, handler, kept = _open(model, recipe, calib, progress)
    before, seconds = model_bytes(model), {}
    _check_plan(recipe, plan)
    bound = None if plan is None else plan.bind(context.layers)
    pair, why = find_embedding(model) if recipe.embedding_bits else (None, "")
    if recipe.embedding_bits and pair is None:
        raise ValueError(f"compress: recipe {recipe.name}: embedding_bits: expected None for this model, got 8: {why}")

    start = time.perf_counter()
    handler.prepare(context, bound)
    seconds["prepare"] = time.perf_counter() - start

    start = time.perf_counter()
    if bound is None:
        bound = handler.plan(context).bind(context.layers)
    seconds["plan"] = time.perf_counter() - start

    start = time.perf_counter()
    layers = apply_plan(context, handler, bound)
    embedding = {} if pair is None else compress_embedding(model, pair, recipe.compute)
    for name in () if pair is None else (pair.tied_head, pair.own_head):
        kept.pop(name, None)
    fused = fuse_shared_inputs(model) if recipe.fuse else {}
    _mark(model, recipe)
    seconds["apply"] = time.perf_counter() - start
    return Report(
        plan=bound,
        layers=layers,
        embedding=embedding,
        skipped={**kept, **bound.skipped, **context.skipped},
        model_bytes_before=before,
        model_bytes_after=model_bytes(model),
        fused=fused,
        seconds=seconds,
    )


def make_plan(
    model: nn.Module, recipe: Recipe, calib: Sequence[Tensor] | None = None, progress: Progress | None = None
) -> AnyPlan:
    """The plan that :func:`compress` would apply. Methods that prepare the model do so here too (same function, other
    weights), so plan and compress the same model object, or load a fresh one for the second step.

    Arguments and errors as :func:`compress`.
    """
    if isinstance(handler := handler_for(recipe), FilterHandler):
        return make_filter_plan(model, recipe, handler, calib or (), progress or silent)
    if isinstance(handler, NetworkHandler):
        return make_network_plan(model, recipe, handler)
    if isinstance(handler, ActivationHandler):
        return make_activation_plan(model, recipe, handler)
    context, handler, kept = _open(model, recipe, calib, progress)
    handler.prepare(context, None)
    plan = handler.plan(context).bind(context.layers)
    return Plan(plan.recipe, plan.layers, {**kept, **plan.skipped, **context.skipped}, plan.notes)


def plan_from_json(text: str) -> AnyPlan:
    """A plan of any kind from its text, which says by its recipe what kind it is.

    Raises:
        ValueError: not a plan, or one of an unknown recipe.
    """
    try:
        name = json.loads(text)["recipe"]["name"]
    except (ValueError, LookupError, TypeError):
        return Plan.from_json(text)  # which says what is wrong
    kinds = {FilterRecipe: FilterPlan, NetworkRecipe: NetworkPlan}
    recipe_type = recipe_types().get(name, Recipe) if isinstance(name, str) else Recipe
    kind = next((plan for base, plan in kinds.items() if issubclass(recipe_type, base)), Plan)
    return kind.from_json(text)


def silent(stage: str, done: int, total: int) -> None:
    """No progress."""


def _check_plan(recipe: Recipe, plan: AnyPlan | None) -> None:
    if plan is not None and plan.recipe.get("name") != recipe.name:
        raise ValueError(f"compress: plan: expected one of recipe {recipe.name!r}, got {plan.recipe.get('name')!r}")


def _open(
    model: nn.Module, recipe: Recipe, calib: Sequence[Tensor] | None, progress: Progress | None
) -> tuple[Context, Handler, dict[str, str]]:
    """Everything that can be refused before any work."""
    handler = handler_for(recipe)
    found, refused = handler.find(model)
    layers = [layer for layer in found if not matches(layer.name, recipe.ignore)]
    kept = {**refused, **{layer.name: "ignored by the recipe" for layer in found if matches(layer.name, recipe.ignore)}}
    if not layers:
        raise ValueError(f"compress: model: expected at least one linear layer to compress, got none; kept: {kept}")
    if missing := recipe.unmatched([layer.name for layer in found]):
        raise ValueError(
            f"compress: recipe {recipe.name}: per_layer: expected patterns that match layers of the model, "
            f"got {missing}; it has e.g. {[layer.name for layer in found[:3]]}"
        )
    if handler.needs_calibration(recipe) or calib is not None:
        check_calib(model, calib if calib is not None else ())
    for layer in layers:
        layer.weight()  # refuses NaN and Inf
    model.eval()
    context = Context(model, recipe, layers, calib or ())
    if progress is not None:
        context.progress = progress
    return context, handler, kept


def _mark(model: nn.Module, recipe: Recipe) -> None:
    """Note the recipe on the model, and tell transformers' own saving about it."""
    setattr(model, PROVENANCE, recipe.to_json())
    if "transformers" in sys.modules:
        from transformers import PreTrainedModel

        if isinstance(model, PreTrainedModel):
            from ..hub.quantizer import adopt

            adopt(model)


class _CallablePackage(ModuleType):
    """The class of this package's module object: calling the package calls :func:`compress`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Report:
        return compress(*args, **kwargs)


sys.modules[__name__].__class__ = _CallablePackage
