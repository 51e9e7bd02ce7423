"""Feed-forward layers of relu_ffn to measure: sizes, types of rows, which neurons are active, results in float64.

Which neurons are active is chosen, not found: biases of the gates move every gate to a value of a chosen sign. Lists of
neighbouring calls have no neuron in common as long as density allows, so that no row comes from a cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

import effk  # noqa: F401  (registers the operations)

from . import machine

LAYER, DOWN, BATCH, PROMPT = "layer", "down", "batch", "prompt"  # whole layer, rows of down alone; 8 and many tokens
ROWS = ("bf16", "int8", "int4")
DOWN_ROWS = ("fp32", *ROWS)
KINDS = tuple(
    f"{what} {rows}" for what in (LAYER, DOWN, BATCH, PROMPT) for rows in (DOWN_ROWS if what == DOWN else ROWS)
)
GROUP = {"int4": 32}
DENSITIES = (0.05, 0.1, 0.2, 0.33, 0.5)
UNION, BATCH_TOKENS, PROMPT_TOKENS = 0.3, 8, 128
# Of the largest result of a row: rounding of fp32 sums and bf16 results; what torch's own int8 and int4 weights may differ.
TOLERANCE = {"fp32": 1e-5, "bf16": 1.6e-2, "int8": 4e-2, "int4": 0.4}
ops = torch.ops.effk


class Layer(NamedTuple):
    """d inputs and outputs, f neurons."""

    d: int
    f: int
    gated: bool

    def __str__(self) -> str:
        return f"{self.d}x{self.f}" + " gated" * self.gated


LAYERS = (Layer(4096, 11008, True), Layer(4096, 16384, False), Layer(2048, 8192, True), Layer(768, 3072, False))


class Made(NamedTuple):
    """What a backend makes of a problem."""

    call: Callable[[int], object]  # with weights and list i; this is timed
    match: Callable[[Tensor], float]  # error of the result of call(0) over its bound


class Packed(NamedTuple):
    """Rows of one matrix."""

    rows: Tensor
    scales: Tensor | None

    @property
    def nbytes(self) -> int:
        """What a call reads when it reads all."""
        return self.rows.numel() + (0 if self.scales is None else 4 * self.scales.numel())


def pack(w: Tensor, rows: str, group: int) -> Packed:
    """Rows [f, d] as of relu_ffn_pack."""
    packed, scales = ops.relu_ffn_pack(w, False, rows, group)
    return Packed(packed, scales if scales.numel() else None)


def disjoint(f: int, density: float, rng: torch.Generator) -> list[Tensor]:
    """Ascending lists of round(density f) neurons, without a neuron in common."""
    count = max(1, round(density * f))
    order = torch.randperm(f, generator=rng)
    return [part.sort().values for part in order.split(count) if len(part) == count]


class Weights:
    """The weights of a layer, or of down alone, as rows of one type; shared by all densities. Only gates have biases."""

    def __init__(self, layer: Layer, rows: str, alone: bool = False, seed: int = 0) -> None:
        self.layer, self.rows, self.group, self.alone = layer, rows, GROUP.get(rows, 0), alone
        rng = torch.Generator().manual_seed(seed)
        names = ("down",) if alone else ("gate", "up", "down") if layer.gated else ("up", "down")
        self.plain: dict[str, Tensor] = {}  # [f, d], down transposed, as packed
        made: dict[str, list[Packed]] = {}
        for name in names:
            w = torch.randn(layer.f, layer.d, generator=rng) / math.sqrt(layer.f if name == "down" else layer.d)
            # Every copy is packed: a clone would not have the large pages that packing asks for, and is 15 % slower.
            made[name] = [pack(w, rows, self.group)]
            count = machine.copies(made[name][0].nbytes * len(names))
            made[name] += [pack(w, rows, self.group) for _ in range(count - 1)]
            self.plain[name] = ops.relu_ffn_unpack(*made[name][0], rows, layer.d)
        self.copies = [list(parts) for parts in zip(*made.values(), strict=True)]

    @cached_property
    def first(self) -> str:
        """The matrix whose products are the gates."""
        return "gate" if self.layer.gated else "up"


class Problem:
    """Tokens and lists of one density. `tokens` 1: lists by turns; more: one list that is the union of the tokens' own."""

    def __init__(self, weights: Weights, tokens: int, density: float, seed: int = 1) -> None:
        self.weights, self.layer, self.tokens, self.density = weights, weights.layer, tokens, density
        rng = torch.Generator().manual_seed(seed)
        d, f = self.layer.d, self.layer.f
        self.lists = disjoint(f, density, rng)
        # Values of the active: far enough from zero that no backend's rounding changes who is active.
        self.size = 0.5 + torch.rand(f, generator=rng)
        if weights.alone:
            self.hidden = [torch.zeros(1, f).index_copy(1, part, self.size[part][None]) for part in self.lists]
            return
        self.x = torch.randn(1, d, generator=rng).expand(tokens, d).contiguous().bfloat16().float()
        if tokens > 1:  # so near each other that the same neurons are active
            self.x = (self.x + 0.02 * torch.randn(tokens, d, generator=rng)).bfloat16().float()
            del self.lists[1:]
        gates = self.x[:1] @ weights.plain[weights.first].T
        self.biases = []
        for part in self.lists:
            value = -self.size
            value[part] = self.size[part]
            self.biases.append((value - gates[0]).contiguous())

    def list_of(self, i: int) -> int:
        """Which list call i takes: another one in every round of the copies."""
        return i // len(self.weights.copies) % len(self.lists)

    @cached_property
    def exact(self) -> Tensor:
        """y of call 0 in float64."""
        w = self.weights.plain
        if self.weights.alone:
            part = self.lists[0]
            return self.hidden[0][:, part].double() @ w["down"][part].double()
        g = product(self.x, w[self.weights.first]) + self.biases[0].double()
        h = g.clamp(min=0)
        if self.layer.gated:
            h *= product(self.x, w["up"])
        active = (h != 0).any(0)
        return h[:, active] @ w["down"][active].double()

    def match(self, rows: str, dtype: torch.dtype = torch.float32) -> Callable[[Tensor], float]:
        """Largest error over what rows of that type and results of that dtype allow."""
        share = max(TOLERANCE[rows], TOLERANCE["fp32" if dtype == torch.float32 else "bf16"])
        exact = self.exact
        bound = share * exact.abs().amax(1, keepdim=True).expand_as(exact)

        def match(y: Tensor) -> float:
            ratio = float(((y.reshape(exact.shape).double() - exact).abs() / bound).max())
            return ratio if ratio == ratio else math.inf

        return match


def product(x: Tensor, w: Tensor, step: int = 2048) -> Tensor:
    """x W^T in float64 without a copy of all of W in float64."""
    return torch.cat([x.double() @ part.double().T for part in w.split(step)], 1)
