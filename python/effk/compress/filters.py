"""Compressing the filters of long convolutions: which there are, what a smaller one costs, how small it may be.

Methods differ in how they make a filter smaller (:class:`FilterHandler`); the search is the same. The size of a filter
is a number: taps, or frequencies. For each size the error of the block that owns the filter is measured, ``|y - y'|``
over ``|y|``, on the inputs that it had on calibration text in the uncompressed model. Without calibration the error is
``|k - k'| / |k|`` over the taps, which is that of the convolution for white input.

Three kinds of budget: a size for all; an error, for which each filter takes its smallest size; a rise of the model's
loss, for which one error is sought such that the model with all filters at that error stays within it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..nn import FFTConv, LongFilter
from .layers import replace_module
from .recipe import Recipe, matches

BUDGETS = ("error", "loss", "size")
LOSS_STEPS = 9  # of the search for an error that keeps a loss: errors of 2^(-1/8) at the finest
SMALLEST_ERROR = 1e-6  # fp32 convolutions differ by as much
_BATCHES = 4  # of calibration that errors are measured on; the loss uses all
_ROUNDS = 7  # of a timing


@dataclass(frozen=True, kw_only=True)
class FilterRecipe(Recipe):
    """Fields common to methods for long filters.

    Attributes:
        budget: what ``amount`` limits: "error", the relative error of each block's output; "loss", the rise of the
            model's loss in nats per token on the calibration text; "size", the taps or frequencies of each filter.
        amount: the limit.
        length: of the sequences that filters are made for; None: of the calibration text.

    ``compute``, ``embedding_bits`` and ``fuse`` are for weights, and stay at their defaults.
    """

    budget: str = "error"
    amount: float = 0.01
    length: int | None = None

    def check(self) -> None:
        super().check()
        self._expect("compute", self.compute == "float", "'float' for a method that changes no weights")
        self._expect("embedding_bits", self.embedding_bits is None, "None for a method that changes no weights")
        self._expect("budget", self.budget in BUDGETS, f"one of {BUDGETS}")
        number = isinstance(self.amount, (int, float)) and not isinstance(self.amount, bool) and self.amount > 0
        self._expect("amount", number, "a positive number")
        if self.budget == "size":
            self._expect("amount", float(self.amount).is_integer(), "a whole number for a size")
        if self.budget == "error":
            self._expect("amount", self.amount < 1, "an error below 1")
        self._expect("length", self.length is None or (type(self.length) is int and self.length >= 2), "at least 2")


class FilterHandler(ABC):
    """One method: what sizes there are, and the filter of a size."""

    unit: str  # what sizes count

    def needs_calibration(self, recipe: FilterRecipe) -> bool:
        """Whether ``calib`` must be given."""
        return "loss" in (recipe.budget, *(fields.get("budget") for fields in recipe.per_layer.values()))

    @abstractmethod
    def sizes(self, length: int) -> list[int]:
        """The sizes to choose from for filters of ``length`` taps, growing; the last one keeps everything."""

    @abstractmethod
    def build(self, taps: Tensor, size: int) -> LongFilter:
        """The smaller filter of ``taps`` fp32 ``(channels, length)``."""

    @abstractmethod
    def operations(self, length: int, size: int) -> float:
        """Estimated operations per output of a convolution over ``length`` with it."""


@dataclass(frozen=True)
class FilterPlan:
    """The sizes of all filters, as JSON that can be edited and applied.

    Attributes:
        recipe: the recipe's JSON record.
        length: of the sequences.
        sizes: module name -> taps or frequencies.
        skipped: module name -> reason.
    """

    recipe: Mapping[str, Any]
    length: int
    sizes: Mapping[str, int]
    skipped: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        """As text."""
        return json.dumps({"version": 1, **dataclasses.asdict(self)}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> FilterPlan:
        """Inverse of :meth:`to_json`; ValueError for anything else."""
        data = json.loads(text)
        if (
            not isinstance(data, dict)
            or data.pop("version", None) != 1
            or set(data) != {"recipe", "length", "sizes", "skipped"}
        ):
            raise ValueError(f"plan: expected a plan of long filters, version 1, got {str(data)[:80]}")
        return cls(**data)


@dataclass(frozen=True, kw_only=True)
class FilterReportEntry:
    """One filter.

    Attributes:
        channels, length: of the filter before.
        size, unit: what is left of it.
        error: of the block's output on calibration text, or of the taps without calibration.
        bytes_before: parameters of the filter module as it was; an implicit one has few.
        bytes_dense: the taps stored as they are.
        bytes_after: what is stored now.
        estimated_speed: operations of the convolution before over those after.
        measured_speed: its time before over after, one batch, at this length, on this machine; None where not measured.
    """

    channels: int
    length: int
    size: int
    unit: str
    error: float
    bytes_before: int
    bytes_dense: int
    bytes_after: int
    estimated_speed: float
    measured_speed: float | None


@dataclass(frozen=True, kw_only=True)
class FilterReport:
    """The outcome of :func:`effk.compress` with a recipe for long filters.

    Attributes:
        plan: what was applied.
        filters: module name -> :class:`FilterReportEntry`.
        loss_before, loss_after: nats per token on the calibration text; None without it.
        skipped: module name -> reason.
        seconds: in all.
    """

    plan: FilterPlan
    filters: Mapping[str, FilterReportEntry]
    loss_before: float | None
    loss_after: float | None
    skipped: Mapping[str, str]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """A JSON object of everything but the plan."""
        names = ("loss_before", "loss_after", "seconds")
        figures = {name: getattr(self, name) for name in names}
        entries = {name: dataclasses.asdict(entry) for name, entry in self.filters.items()}
        return {"filters": entries, **figures, "skipped": dict(self.skipped)}

    def __str__(self) -> str:
        """One line a filter."""
        lines = []
        for name, e in self.filters.items():
            speed = "" if e.measured_speed is None else f", {e.measured_speed:.2f} x measured"
            lines.append(
                f"{name}: {e.size} of {e.length} {e.unit}, error {e.error:.2g}, {e.bytes_dense / 1e3:.0f} -> "
                f"{e.bytes_after / 1e3:.0f} kB, speed {e.estimated_speed:.2f} x estimated{speed}"
            )
        if self.loss_before is not None:
            lines.append(f"loss {self.loss_before:.4f} -> {self.loss_after:.4f}")
        return "\n".join(lines)


def find_filters(model: nn.Module) -> dict[str, LongFilter]:
    """Name -> module of every long filter that has an owner, in model order."""
    return {name: module for name, module in model.named_modules() if name and isinstance(module, LongFilter)}


@torch.no_grad()
def compress_filters(
    model: nn.Module,
    recipe: FilterRecipe,
    handler: FilterHandler,
    calib: Sequence[Tensor],
    plan: FilterPlan | None,
    progress: Any,
) -> FilterReport:
    """What :func:`effk.compress` does for these recipes; see there."""
    start = time.perf_counter()
    made = make_filter_plan(model, recipe, handler, calib, progress) if plan is None else plan
    work = _Work(model, handler, calib, made.length)
    if unknown := sorted(set(made.sizes) - set(work.filters)):
        raise ValueError(f"compress: plan: expected filters of the model, got {unknown}; it has {sorted(work.filters)}")
    before = work.loss() if calib else None
    work.capture(list(made.sizes))
    entries = {}
    for done, (name, size) in enumerate(made.sizes.items()):
        module, taps = work.filters[name], work.taps[name]
        small = handler.build(taps, size)
        entries[name] = FilterReportEntry(
            channels=taps.shape[0],
            length=taps.shape[1],
            size=size,
            unit=handler.unit,
            error=work.error(name, size),
            bytes_before=sum(p.numel() * p.element_size() for p in module.parameters()),
            bytes_dense=taps.numel() * 4,
            bytes_after=sum(p.numel() * p.element_size() for p in small.parameters()),
            estimated_speed=handler.operations(made.length, taps.shape[1]) / handler.operations(made.length, size),
            measured_speed=measured_speed(taps, small(made.length), made.length),
        )
        progress("apply", done + 1, len(made.sizes))
    for name, size in made.sizes.items():
        replace_module(model, name, handler.build(work.taps[name], size))
    after = work.loss() if calib else None
    skipped = {name: "ignored by the recipe" for name in work.filters if name not in made.sizes} | dict(made.skipped)
    return FilterReport(
        plan=made,
        filters=entries,
        loss_before=before,
        loss_after=after,
        skipped=skipped,
        seconds=time.perf_counter() - start,
    )


@torch.no_grad()
def make_filter_plan(
    model: nn.Module, recipe: FilterRecipe, handler: FilterHandler, calib: Sequence[Tensor], progress: Any
) -> FilterPlan:
    """The sizes that the recipe's budget asks for."""
    if not calib and recipe.length is None:
        raise ValueError(f"compress: recipe {recipe.name}: length: expected one, or calibration text, got neither")
    if not calib and handler.needs_calibration(recipe):
        raise ValueError(
            f"compress: calib: expected token ids for a budget of the loss of recipe {recipe.name}, got none"
        )
    length = recipe.length or calib[0].shape[1]
    if calib and any(batch.shape[1] > length for batch in calib):
        raise ValueError(f"compress: calib: expected at most length = {length} tokens, got {calib[0].shape[1]}")
    model.eval()
    work = _Work(model, handler, calib, length)
    ignored = {name: "ignored by the recipe" for name in work.filters if matches(name, recipe.ignore)}
    names = [name for name in work.filters if name not in ignored]
    if not names:
        raise ValueError(
            f"compress: model: expected at least one effk.nn.LongFilter to compress, got {ignored or 'none'}"
        )
    if missing := recipe.unmatched(list(work.filters)):
        raise ValueError(
            f"compress: recipe {recipe.name}: per_layer: expected patterns that match filters, got {missing}"
        )
    work.capture(names)
    sizes = {}
    for done, name in enumerate(names):
        own = recipe.for_layer(name)
        if own.budget == "size":
            sizes[name] = min(int(own.amount), handler.sizes(work.taps[name].shape[1])[-1])
        elif own.budget == "error":
            sizes[name] = work.smallest(name, own.amount)
        progress("plan", done + 1, len(names))
    if rest := [name for name in names if name not in sizes]:
        sizes |= work.within_loss(rest, sizes, recipe.amount, progress)
    return FilterPlan(recipe.to_json(), length, {name: sizes[name] for name in names}, ignored)


class _Work:
    """A model whose filters are looked at: their taps, their owners' inputs, errors by size, and the loss."""

    def __init__(self, model: nn.Module, handler: FilterHandler, calib: Sequence[Tensor], length: int) -> None:
        self.model, self.handler, self.calib, self.length = model, handler, list(calib), length
        self.filters = find_filters(model)
        self.taps = {name: module(length).detach().float().clone() for name, module in self.filters.items()}
        self._inputs: dict[str, list[tuple[tuple, dict]]] = {}
        self._errors: dict[tuple[str, int], float] = {}
        for name, taps in self.taps.items():
            if taps.dim() != 2 or not bool(taps.isfinite().all()):
                raise ValueError(f"compress: {name}: expected finite taps (channels, K), got {list(taps.shape)}")

    def capture(self, names: Sequence[str]) -> None:
        """Keeps what the owners of these filters are called with on the first batches."""
        if not self.calib:
            return
        hooks = []
        for name in names:
            kept = self._inputs[name] = []
            hook = lambda _, args, kwargs, kept=kept: kept.append((args, kwargs))  # noqa: E731
            hooks.append(self._owner(name).register_forward_pre_hook(hook, with_kwargs=True))
        try:
            for batch in self.calib[:_BATCHES]:
                self.model(batch)
        finally:
            for hook in hooks:
                hook.remove()

    def error(self, name: str, size: int) -> float:
        """Of the owner's outputs, or of the taps."""
        if (name, size) not in self._errors:
            self._errors[name, size] = self._measure(name, size)
        return self._errors[name, size]

    def _measure(self, name: str, size: int) -> float:
        small, taps = self.handler.build(self.taps[name], size), self.taps[name]
        if not self._inputs.get(name):
            got = small(self.length)
            got = nn.functional.pad(got, (0, taps.shape[1] - got.shape[1]))
            return _ratio((got - taps).double().square().sum(), taps.double().square().sum())
        owner, wrong, total = (
            self._owner(name),
            torch.zeros((), dtype=torch.float64),
            torch.zeros((), dtype=torch.float64),
        )
        for args, kwargs in self._inputs[name]:
            y = owner(*args, **kwargs)
            with replaced(self.model, {name: small}):
                other = owner(*args, **kwargs)
            wrong += (other - y).double().square().sum()
            total += y.double().square().sum()
        return _ratio(wrong, total)

    def smallest(self, name: str, error: float) -> int:
        """The smallest size with at most this error, by bisection: errors fall with size, up to noise."""
        sizes = self.handler.sizes(self.taps[name].shape[1])
        low, high = 0, len(sizes) - 1  # the largest is always good enough
        while low < high:
            middle = (low + high) // 2
            if self.error(name, sizes[middle]) <= error:
                high = middle
            else:
                low = middle + 1
        return sizes[low]

    def within_loss(self, names: Sequence[str], fixed: Mapping[str, int], rise: float, progress: Any) -> dict[str, int]:
        """Sizes at the largest common error at which the loss of the model rises by at most ``rise``."""
        base, low, high = self.loss(), math.log(SMALLEST_ERROR), math.log(1.0)
        best = {name: self.handler.sizes(self.taps[name].shape[1])[-1] for name in names}
        for step in range(LOSS_STEPS):
            middle = (low + high) / 2
            sizes = {name: self.smallest(name, math.exp(middle)) for name in names}
            small = {name: self.handler.build(self.taps[name], size) for name, size in ({**sizes, **fixed}).items()}
            with replaced(self.model, small):
                risen = self.loss() - base
            if risen <= rise:
                best, low = sizes, middle
            else:
                high = middle
            progress("plan", step + 1, LOSS_STEPS)
        return best

    def loss(self) -> float:
        """Mean cross entropy of the next token in nats over the calibration text, first tokens not scored."""
        total, count = torch.zeros((), dtype=torch.float64), 0
        for batch in self.calib:
            output = self.model(batch)
            logits = getattr(output, "logits", output)[:, :-1]
            losses = cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten(), reduction="none")
            total, count = total + losses.double().sum(), count + losses.numel()
        return float(total / count)

    def _owner(self, name: str) -> nn.Module:
        return self.model.get_submodule(name.rpartition(".")[0])


@contextmanager
def replaced(model: nn.Module, filters: Mapping[str, nn.Module]) -> Iterator[None]:
    """Within, the modules of these names are others."""
    before = {name: model.get_submodule(name) for name in filters}
    try:
        for name, module in filters.items():
            replace_module(model, name, module)
        yield
    finally:
        for name, module in before.items():
            replace_module(model, name, module)


def measured_speed(before: Tensor, after: Tensor, length: int) -> float:
    """Time of the convolution with filters ``before`` over that with ``after``, spectra kept, the two in turns."""
    u = torch.randn(1, before.shape[0], length, generator=torch.Generator().manual_seed(0))
    conv, seconds = FFTConv(), ([], [])
    for _ in range(_ROUNDS + 1):
        for taken, k in zip(seconds, (before, after), strict=True):
            conv(u, k)
            start = time.perf_counter()
            conv(u, k)
            taken.append(time.perf_counter() - start)
    return statistics.median(seconds[0][1:]) / statistics.median(seconds[1][1:])


def _ratio(error: Tensor, reference: Tensor) -> float:
    return float((error / reference).sqrt()) if float(reference) > 0 else float(error.sqrt())
