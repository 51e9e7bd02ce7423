"""Methods, found by the type of their recipe.

A method is one module in ``passes/``: a recipe dataclass and a :class:`Handler` decorated with :func:`register`. The
modules of that folder are imported on first use, so adding a method adds a file and edits none.
"""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn

from ..formats.bitmask import BitmaskTensor
from ..formats.quik import QuikWeight
from ..formats.wq import WqWeight
from ..nn import BitmaskLinear, QuikLinear, WqGroupedLinear, WqLinear
from .activation import ActivationHandler
from .calibrate import LayerStats
from .filters import FilterHandler
from .layers import Layer, find_layers
from .networks import NetworkHandler
from .plan import LayerPlan, Plan
from .recipe import Recipe


class Progress(Protocol):
    """Where long work reports to; the command line draws it, and ``None`` is silent."""

    def __call__(self, stage: str, done: int, total: int) -> None:
        """``done`` of ``total`` steps of ``stage`` are finished."""


@dataclass
class Context:
    """What a handler works on during one ``compress`` call.

    Attributes:
        model: in evaluation mode; ``prepare`` may change its weights, everything else only reads it.
        recipe: the recipe, unresolved; ``recipe.for_layer(name)`` gives one layer's.
        layers: the layers that may be compressed and are not ignored, in model order.
        calib: token ids, each int64 ``[batch, length]``; empty without calibration.
        skipped: layer -> reason, for layers that a handler decides to leave alone.
        progress: report of long work.
        shared: a handler's own data between its steps.
    """

    model: nn.Module
    recipe: Recipe
    layers: Sequence[Layer]
    calib: Sequence[Tensor] = ()
    skipped: dict[str, str] = field(default_factory=dict)
    progress: Progress = lambda stage, done, total: None
    shared: dict[str, Any] = field(default_factory=dict)


class Handler(ABC):
    """One method: ``prepare``, ``plan`` unless the user gave one, then ``quantize`` for every layer."""

    def find(self, model: nn.Module) -> tuple[list[Layer], dict[str, str]]:
        """The layers that may be compressed, in model order, and others with the reason why not."""
        return find_layers(model)

    def needs_calibration(self, recipe: Recipe) -> bool:
        """Whether ``calib`` must be given."""
        return bool(self.statistics(recipe))

    def statistics(self, recipe: Recipe) -> frozenset[str]:
        """Per-layer input statistics that ``quantize`` reads: names of :class:`LayerStats` fields.

        Collected block by block while earlier blocks are already compressed (see :mod:`effk.compress.calibrate`).
        """
        return frozenset()

    def prepare(self, context: Context, plan: Plan | None) -> None:  # noqa: B027  (optional: most methods need none)
        """Change the model without changing its function (such as moving scales into a norm) before planning.

        ``plan`` is the user's plan, whose notes say what to repeat, or None.
        """

    @abstractmethod
    def plan(self, context: Context) -> Plan:
        """Decide every layer's fate without touching the model."""

    @abstractmethod
    def quantize(
        self, context: Context, layer: Layer, weight: Tensor, entry: LayerPlan, stats: LayerStats | None
    ) -> WqWeight | QuikWeight | BitmaskTensor:
        """Compress ``weight`` (fp32 ``[N, K]``) as ``entry`` says; ``stats`` is there if ``statistics`` asked."""

    def module(
        self, weight: WqWeight | QuikWeight | BitmaskTensor, bias: Tensor | None, entry: LayerPlan
    ) -> WqLinear | WqGroupedLinear | QuikLinear | BitmaskLinear:
        """What takes the layer's place while later layers are calibrated."""
        return WqLinear.from_weight(weight, bias, entry.compute)

    def finish(  # noqa: B027  (optional)
        self, module: WqLinear | WqGroupedLinear | QuikLinear | BitmaskLinear, entry: LayerPlan
    ) -> None:
        """Turn on, once all layers are compressed, what calibration was not to see, such as rounded activations."""


AnyHandler = Handler | FilterHandler | NetworkHandler | ActivationHandler
_HANDLERS: dict[type[Recipe], AnyHandler] = {}


def register(recipe_type: type[Recipe]) -> Callable[[type[AnyHandler]], type[AnyHandler]]:
    """Class decorator: the handler of recipes of ``recipe_type``: layers, filters, networks or sparse activations."""

    def decorate(handler_type: type[AnyHandler]) -> type[AnyHandler]:
        if recipe_type in _HANDLERS or any(recipe_type.name == other.name for other in _HANDLERS):
            raise ValueError(f"register: expected a new recipe, got a second handler for {recipe_type.name!r}")
        _HANDLERS[recipe_type] = handler_type()
        return handler_type

    return decorate


def handler_for(recipe: Recipe) -> AnyHandler:
    """The handler of a recipe.

    Raises:
        TypeError: not a recipe, or one without a handler.
    """
    known = _methods()
    if type(recipe) not in known:
        expected = ", ".join(t.__name__ for t in known)
        raise TypeError(f"compress: recipe: expected one of {expected}, got {type(recipe).__name__}")
    return known[type(recipe)]


def recipe_types() -> dict[str, type[Recipe]]:
    """Method name -> recipe type."""
    return {recipe_type.name: recipe_type for recipe_type in _methods()}


def recipe_from_json(record: Mapping[str, Any]) -> Recipe:
    """The recipe of a :meth:`Recipe.to_json` record.

    Raises:
        ValueError: unknown method, version or field.
    """
    types = recipe_types()
    if record.get("name") not in types:
        raise ValueError(f"recipe: name: expected one of {sorted(types)}, got {record.get('name')!r}")
    return types[record["name"]].from_json(record)


def _methods() -> dict[type[Recipe], AnyHandler]:
    from . import passes

    for module in pkgutil.iter_modules(passes.__path__):
        importlib.import_module(f"{passes.__name__}.{module.name}")
    return _HANDLERS
