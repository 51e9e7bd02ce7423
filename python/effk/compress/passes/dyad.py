"""DYAD: feed-forward matrices as the sum of two block-diagonal ones (Chandy et al., 2023, arXiv:2312.06881).

As published the layers are put into a fresh model, which is then trained (``start="random"``, :func:`init_dyad`).
Converting a trained model is not: it is done here by least squares on the outputs, with hidden units put in the order
that loses least, an optional remainder of low rank and recovery by distillation (:mod:`effk.compress.solvers.dyad`).
At n = 4 a matrix keeps 44 % of its entries, at n = 8 23 %: without recovery, conversion hurts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...formats.wq import BITS, WqWeight, normalize_group_size
from ...nn import DyadLinear, DyadLowRank, DyadWqLinear
from ...ops.dyad_linear import VARIANTS, from_dense, stacked
from .. import compress
from ..feedforward import FeedForward
from ..layers import Layer
from ..networks import NetworkHandler, NetworkRecipe, NetworkReport, NetworkReportEntry, is_positive
from ..recipe import expect_group_size
from ..recover import recover_network
from ..registry import register
from ..solvers.dyad import Moments, Solution, check_geometry, damped, relative_error, solve
from ..solvers.dyad_permutation import assign, explained, kept
from ..solvers.rtn import round_to_nearest

STARTS = ("convert", "random")
INITS = ("paper", "dense_var")
_CHUNK = 1024  # tokens whose hidden units are held at once


@dataclass(frozen=True, kw_only=True)
class Dyad(NetworkRecipe):
    """Both (of gated networks all three) matrices of every feed-forward network become DYAD layers.

    Attributes:
        n: blocks per component; weights and operations become 2 / n of the dense ones.
        variant: "it" (fastest), "ot" or "dt".
        start: "convert" from the dense weights, which needs calibration text, or "random" for training from scratch.
        init: of random weights: "paper", or "dense_var", whose outputs have the variance of dense layers.
        ridge: of the least squares, relative to the mean variance of the inputs.
        permute: put hidden units in the order that loses least; free at run time.
        rank: of a remainder ``A B`` beside each DYAD matrix.
        tokens: of the calibration text that least squares see, drawn at random; recovery sees all.
        steps: of recovery of each network on its own outputs.
        rate: of Adam in these steps.
        bits: of the DYAD weights after everything else: 2, 3, 4 or 8, rounded to the nearest, or 0 for floating point.
            Outputs per block must be a multiple of 16. ``compute`` is that of the quantised kernels.
        group_size: weights that share a scale.
    """

    name: ClassVar[str] = "dyad"
    version: ClassVar[int] = 1

    n: int = 4
    variant: str = "it"
    start: str = "convert"
    init: str = "paper"
    ridge: float = 1e-2
    permute: bool = True
    rank: int = 0
    tokens: int = 16384
    steps: int = 0
    rate: float = 1e-3
    bits: int = 0
    group_size: int = 64

    def check(self) -> None:
        super().check()
        self._expect("n", type(self.n) is int and self.n >= 1, "at least 1")
        self._expect("variant", self.variant in VARIANTS, f"one of {VARIANTS}")
        self._expect("start", self.start in STARTS, f"one of {STARTS}")
        self._expect("init", self.init in INITS, f"one of {INITS}")
        self._expect("ridge", is_positive(self.ridge), "a positive number")
        self._expect("permute", type(self.permute) is bool, "a boolean")
        self._expect("rank", type(self.rank) is int and self.rank >= 0, "0 or more")
        self._expect("tokens", type(self.tokens) is int and self.tokens >= 1, "at least 1")
        self._expect("steps", type(self.steps) is int and self.steps >= 0, "0 or more")
        self._expect("rate", is_positive(self.rate), "a positive number")
        self._expect("bits", type(self.bits) is int and self.bits in (0, *BITS), f"0 or one of {BITS}")
        self._expect("compute", self.compute == "float" or self.bits > 0, "'float' for weights in floating point")
        expect_group_size(self)
        if self.start == "random":
            self._expect("bits", self.bits == 0, "0 for random weights, which are to be trained")
            self._expect("steps", self.steps == 0, "0 for random weights, which are trained with the model")
            self._expect("model_steps", self.model_steps == 0, "0 for random weights, which are trained with the model")


@register(Dyad)
class DyadHandler(NetworkHandler):
    def needs_calibration(self, recipe: Dyad) -> bool:
        return recipe.start == "convert"

    def options(self, network: FeedForward, recipe: Dyad) -> dict[str, Any]:
        options = {"n": recipe.n, "variant": recipe.variant, "rank": recipe.rank, "bits": recipe.bits}
        self.check(network, options)
        return options

    def check(self, network: FeedForward, options: Mapping[str, Any]) -> None:
        whole = all(type(options.get(key)) is int for key in ("n", "rank", "bits"))
        if set(options) != {"n", "variant", "rank", "bits"} or not whole or options["bits"] not in (0, *BITS):
            raise ValueError(f"plan: {network.name}: expected n, variant, rank and bits, got {dict(options)}")
        for layer in network.layers:
            if not 0 <= options["rank"] <= min(layer.n, layer.k):
                raise ValueError(
                    f"plan: {layer.name}: rank: expected 0..{min(layer.n, layer.k)}, got {options['rank']}"
                )
            try:
                check_geometry(layer.n, layer.k, options["n"], options["variant"])
            except ValueError as error:
                raise ValueError(f"plan: {layer.name}: {error}") from None
            if options["bits"] and layer.n // options["n"] % 16:
                raise ValueError(
                    f"plan: {layer.name}: bits: expected 0 unless blocks have a multiple of 16 outputs, "
                    f"got {options['bits']} with {layer.n // options['n']}"
                )

    def build(
        self, network: FeedForward, options: Mapping[str, Any], recipe: Dyad, xs: list[Tensor], held: list[Tensor]
    ) -> tuple[list[nn.Module], NetworkReportEntry]:
        if recipe.start == "random":
            n, variant, rank = options["n"], options["variant"], options["rank"]
            return [fresh(layer, n, variant, rank, recipe.init) for layer in network.layers], NetworkReportEntry()
        recipe = dataclasses.replace(recipe, per_layer={}, **options)
        return _Conversion(network, recipe, xs, held).run()

    def finish(self, module: nn.Module, options: Mapping[str, Any], recipe: Dyad) -> nn.Module:
        if not options["bits"]:
            return module
        if isinstance(module, DyadLowRank):
            module.dyad = self.finish(module.dyad, options, recipe)
            return module
        w = stacked(module.wl.detach(), module.wu.detach(), module.variant).float()
        group_size = normalize_group_size(recipe.group_size)
        codes, grid = round_to_nearest(w, options["bits"], group_size, "mse")
        weight = WqWeight.from_codes(codes, grid.scales, bits=options["bits"], group_size=group_size, zeros=grid.zeros)
        return DyadWqLinear.from_weight(weight, module.n_dyad, module.variant, module.bias, recipe.compute)


class _Conversion:
    """One network on its way."""

    def __init__(self, network: FeedForward, recipe: Dyad, xs: list[Tensor], held: list[Tensor]) -> None:
        self.network, self.recipe = network, recipe
        self.xs, self.held, self.sample = xs, held or xs, self._sample(xs)
        self.dense = [layer.weight() for layer in network.layers]
        self.biases = [_bias(layer) for layer in network.layers]
        self.moments = Moments()
        for x in self.sample:
            self.moments.update(x)

    def run(self) -> tuple[list[nn.Module], NetworkReportEntry]:
        if self.recipe.permute:
            self._permute(self._order())
        *ups, down = self.dense
        settings = {"ridge": self.recipe.ridge, "rank": self.recipe.rank}
        n, variant, moments = self.recipe.n, self.recipe.variant, self.moments
        solved = [solve(w, b, n, variant, moments, **settings) for w, b in zip(ups, self.biases, strict=False)]
        layers, modules = (
            self.network.layers,
            [self._module(s, layer) for s, layer in zip(solved, self.network.up, strict=True)],
        )
        errors = [_error(w, s, moments) for w, s in zip(ups, solved, strict=True)]
        hidden = Moments()
        with torch.no_grad():
            for x in self._chunks(self.sample):
                hidden.update(self.network.hidden([m(x) for m in modules]), self._hidden(x))
        last = solve(down, self.biases[-1], n, variant, hidden, **settings)
        modules.append(self._module(last, layers[-1]))
        errors.append(_error(down, last, hidden))
        entry = NetworkReportEntry(
            layers={layer.name: error for layer, error in zip(layers, errors, strict=True)},
            error=self._measure(modules),
        )
        if self.recipe.steps:
            entry = dataclasses.replace(entry, recovered_error=self._recover(modules, entry.error))
        return modules, entry

    def _sample(self, xs: list[Tensor]) -> list[Tensor]:
        """Random rows, batch by batch, as many as the recipe's ``tokens`` in all."""
        total, generator = sum(map(len, xs)), torch.Generator().manual_seed(self.recipe.seed)
        if total <= self.recipe.tokens:
            return xs
        chosen = torch.randperm(total, generator=generator)[: self.recipe.tokens].sort().values
        parts, start = [], 0
        for x in xs:
            inside = chosen[(chosen >= start) & (chosen < start + len(x))] - start
            parts.append(x[inside.to(x.device)])
            start += len(x)
        return [part for part in parts if len(part)]

    def _order(self) -> Tensor:
        """The hidden unit for every position.

        A unit counts by the variance that it would lose in the network's output: what its rows do not explain of their
        own outputs, times the mean squared slope of the activation there and the norm of its column; plus its own
        variance, times the entries of its column that fall away.
        """
        *ups, down = self.dense
        n, variant, rows = self.recipe.n, self.recipe.variant, 0
        slopes, sums = [
            [torch.zeros(self.network.width, dtype=torch.float64) for _ in many] for many in (ups, range(2))
        ]
        for x in self._chunks(self.sample):
            outputs = [nn.functional.linear(x, w, b).requires_grad_() for w, b in zip(ups, self.biases, strict=False)]
            with torch.enable_grad():
                units = self.network.hidden(outputs)
                gradients = torch.autograd.grad(units.sum(), outputs)
            for slope, gradient in zip(slopes, gradients, strict=True):
                slope += gradient.double().square().sum(0).cpu()
            rows += len(x)
            for power, total in enumerate(sums, start=1):
                total += units.detach().double().pow(power).sum(0).cpu()
        norm = down.double().square().sum(0)
        c = damped(self.moments.covariance, self.recipe.ridge)
        variance = sums[1] / rows - (sums[0] / rows).square()
        scores = variance[:, None] * kept(down, n, variant)
        for w, slope in zip(ups, slopes, strict=True):
            scores = scores + (slope / rows * norm)[:, None] * explained(w, c, n, variant)
        return assign(scores, n)

    def _permute(self, order: Tensor) -> None:
        self.dense = [*(w[order] for w in self.dense[:-1]), self.dense[-1][:, order].contiguous()]
        self.biases = [*(None if b is None else b[order] for b in self.biases[:-1]), self.biases[-1]]

    def _hidden(self, x: Tensor) -> Tensor:
        return self.network.hidden(
            [nn.functional.linear(x, w, b) for w, b in zip(self.dense[:-1], self.biases, strict=False)]
        )

    def _wanted(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self._hidden(x), self.dense[-1], self.biases[-1])

    def _module(self, solution: Solution, layer: Layer) -> nn.Module:
        module = fresh(layer, self.recipe.n, self.recipe.variant, self.recipe.rank, bias=True).float()
        dyad = module.dyad if self.recipe.rank else module
        with torch.no_grad():
            for parameter, value in zip(
                (dyad.wl, dyad.wu), from_dense(solution.w, dyad.n_dyad, dyad.variant), strict=True
            ):
                parameter.copy_(value)
            dyad.bias.copy_(solution.bias)
            if self.recipe.rank:
                module.a.copy_(solution.a)
                module.b.copy_(solution.b)
        return module

    @torch.no_grad()
    def _measure(self, modules: Sequence[nn.Module]) -> float:
        wrong, outputs = 0.0, []
        for x in self._chunks(self.held):
            outputs.append(self._wanted(x))
            wrong += float((self.network.run(modules, x) - outputs[-1]).double().square().sum())
        wanted = torch.cat(outputs).double()
        return (wrong / max(float((wanted - wanted.mean(0)).square().sum()), torch.finfo(torch.float64).tiny)) ** 0.5

    def _recover(self, modules: list[nn.Module], error: float) -> float:
        """Train; take it back where the held-out tokens do not gain."""
        before = [{k: v.clone() for k, v in module.state_dict().items()} for module in modules]
        recipe, parameters = self.recipe, [p for module in modules for p in module.parameters()]
        xs = list(self._chunks(self.xs))
        recover_network(
            lambda x: self.network.run(modules, x), parameters, xs, self._wanted, recipe.steps, recipe.rate, recipe.seed
        )
        after = self._measure(modules)
        if after < error:
            return after
        for module, state in zip(modules, before, strict=True):
            module.load_state_dict(state)
        return error

    def _chunks(self, xs: list[Tensor]) -> Any:
        return (part.float() for x in xs for part in x.split(_CHUNK))


def init_dyad(
    model: nn.Module, n: int = 4, variant: str = "it", init: str = "paper", ignore: Sequence[str] = ()
) -> NetworkReport:
    """Replace the feed-forward matrices of ``model`` in place by fresh :class:`effk.nn.DyadLinear` layers.

    For training from scratch, as published. Layers keep their dtype and whether they have a bias; the generator is
    PyTorch's global one. Networks whose name matches a glob pattern of ``ignore`` stay. The model stays in the mode,
    training or evaluation, that it is in.

    Raises:
        ValueError: no feed-forward network of a known shape, or sides that ``n`` does not divide; before any change.
    """
    training = model.training
    try:
        return compress(model, Dyad(start="random", n=n, variant=variant, init=init, ignore=tuple(ignore)))
    finally:
        model.train(training)


def convert_dense_to_dyad(
    linear: nn.Module,
    n: int,
    variant: str = "it",
    gram: Tensor | None = None,
    mean: Tensor | None = None,
    ridge: float = 1e-2,
    rank: int = 0,
) -> nn.Module:
    """One ``nn.Linear`` (or GPT-2's ``Conv1D``) as a DYAD layer.

    Args:
        gram: ``E[x x^T]`` ``[K, K]`` of its inputs; None masks (nearest in Frobenius norm).
        mean: ``E[x]`` ``[K]``; the Gram matrix is centred with it and the bias corrected: the mean output is exact.
        ridge, rank: as in :class:`Dyad`.

    Returns:
        :class:`effk.nn.DyadLinear`, with ``rank`` inside an :class:`effk.nn.DyadLowRank`.

    Raises:
        ValueError: sides that ``n`` does not divide, a Gram matrix of another shape, a mean without one.
    """
    layer = Layer.of("linear", linear)
    weight, bias = layer.weight(), _bias(layer)
    if gram is None and mean is not None:
        raise ValueError("convert_dense_to_dyad: gram: expected one beside a mean, got none")
    moments = None
    if gram is not None:
        if tuple(gram.shape) != (layer.k, layer.k) or (mean is not None and tuple(mean.shape) != (layer.k,)):
            raise ValueError(
                f"convert_dense_to_dyad: expected gram [{layer.k}, {layer.k}] and mean [{layer.k}], "
                f"got {list(gram.shape)} and {None if mean is None else list(mean.shape)}"
            )
        total = torch.zeros(layer.k, dtype=torch.float64) if mean is None else mean.double()
        moments = Moments(rows=1, shift=torch.zeros(layer.k), total=total, squares=gram.double())
    solution = solve(weight, bias, n, variant, moments, ridge=ridge, rank=rank)
    module = fresh(layer, n, variant, rank, bias=bias is not None or mean is not None)
    dyad = module.dyad if rank else module
    with torch.no_grad():
        for parameter, value in zip((dyad.wl, dyad.wu), from_dense(solution.w, n, variant), strict=True):
            parameter.copy_(value)
        if dyad.bias is not None:
            dyad.bias.copy_(solution.bias)
        if rank:
            module.a.copy_(solution.a)
            module.b.copy_(solution.b)
    return module


def fresh(
    layer: Layer, n: int, variant: str, rank: int = 0, init: str = "paper", bias: bool | None = None
) -> DyadLinear | DyadLowRank:
    """A layer with the sides, device and dtype of ``layer``."""
    if bias is None:
        bias = getattr(layer.module, "bias", None) is not None
    module: nn.Module = DyadLinear(layer.k, layer.n, n, variant, bias, init)
    module = DyadLowRank(module, rank) if rank else module
    return module.to(layer.module.weight.device, layer.module.weight.dtype)


def _bias(layer: Layer) -> Tensor | None:
    bias = getattr(layer.module, "bias", None)
    return None if bias is None else bias.detach().float()


def _error(w: Tensor, solution: Solution, moments: Moments) -> float:
    """Of all outputs, over their variation."""
    covariance = moments.covariance
    rows = relative_error(w, solution.dense, covariance)
    energy = (w.double() @ covariance * w.double()).sum(1).clamp_min(0)
    return float(((rows.square() * energy).sum() / energy.sum().clamp_min(torch.finfo(torch.float64).tiny)).sqrt())
