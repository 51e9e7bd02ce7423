"""Layers of bitmask_linear to measure, and what is compared: our sparse weights, our dense ones, torch's dense layer."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

import effk
from effk.formats.wq import WqWeight
from effk.ops import bitmask_linear as bm
from effk.ops import wq_linear as wq

from . import machine

NAME, VERSION = "effk bitmask_linear", effk.__version__
WQ, DENSE, TORCH = "effk wq_linear", "effk dense_linear", "torch linear"
BITS = {"fp32": 32, "bf16": 16, "int8": 8, "int4": 4}
SPARSITIES = (0.5, 0.75)
ROWS = (1, 4, 8, 128, 512)
COLD_ROWS = 8  # up to here weights come from memory


@dataclass(frozen=True)
class Layer:
    """n outputs, k inputs."""

    n: int
    k: int

    def __str__(self) -> str:
        return f"{self.n}x{self.k}"


LAYERS = tuple(
    Layer(n, k)
    for n, k in (
        (4096, 4096), (11008, 4096), (4096, 11008), (8192, 2048), (2048, 8192), (3072, 768), (768, 3072), (1536, 576), (576, 1536)
    )
)  # fmt: skip


class Made(NamedTuple):
    """What a backend makes of a problem."""

    call: Callable[[int], Tensor]  # with copy i of the weight; this is timed
    match: Callable[[Tensor], float]  # error of a result over its bound
    nbytes: int  # that a call reads of the weight


class Problem:
    """x and W of one size; zeros are where random numbers say, as unstructured pruning leaves them."""

    def __init__(self, layer: Layer, m: int, seed: int = 0) -> None:
        self.layer, self.m = layer, m
        rng = torch.Generator().manual_seed(seed)
        self.w = torch.randn(layer.n, layer.k, generator=rng) / math.sqrt(layer.k)
        self.order = torch.rand(layer.n, layer.k, generator=rng)
        self.x = torch.randn(m, layer.k, generator=rng)

    @cached_property
    def checked(self) -> Tensor:
        """Rows that are compared."""
        return torch.arange(min(self.m, 4))

    def sparse(self, sparsity: float) -> Tensor:
        """The weight with so many zeros."""
        return self.w.where(self.order >= sparsity, torch.zeros(()))

    def copies(self, nbytes: int) -> int:
        """Copies of a weight that make it cold; for many rows it is read once in a while anyway."""
        return machine.copies(nbytes) if self.m <= COLD_ROWS else 1

    def match(self, exact: Tensor, w: Tensor, x: Tensor, store: float = 2.0**-24) -> Callable[[Tensor], float]:
        """Against float64: sums of k products in fp32, the result rounded to ``store``."""
        size = x[self.checked].double().abs() @ w.double().abs().T
        bound = self.layer.k * 2.0**-24 * size + store * (exact.abs() + 1e-3 * size)

        def error(y: Tensor) -> float:
            return float(((y[self.checked].double() - exact).abs() / bound).max())

        return error


def sparse(values: str, sparsity: float, compute: str) -> Callable[[Problem], Made]:
    """Our sparse weight."""

    def make(p: Problem) -> Made:
        w = p.sparse(sparsity)
        weights = [bm.pack(w, values=values)]
        weights += [bm.pack(w, values=values) for _ in range(p.copies(weights[0].nbytes) - 1)]
        dense = bm.unpack(weights[0]).float()
        x = p.x.bfloat16() if values == "bf16" else p.x
        if compute == "int8":
            first = weights[0]
            codes = torch.ops.effk.bitmask_unpack(first.values, first.masks, first.ptr, None, first.n, first.k)
            exact = bm.reference_int8(x[p.checked], codes, first.scale)
        else:
            exact = bm.reference(x[p.checked], dense)
        match = p.match(exact, dense, x, 2.0**-8 if values == "bf16" else 2.0**-24)
        return Made(lambda i: bm.linear(x, weights[i % len(weights)], None, compute), match, weights[0].nbytes)

    return make


def low_bit(bits: int, group: int) -> Callable[[Problem], Made]:
    """Our dense weight of few bits, activations rounded to int8."""

    def make(p: Problem) -> Made:
        step, half = group or p.layer.k, 1 << (bits - 1)
        if p.layer.k % step:
            raise ValueError(f"no whole groups of {step} in {p.layer.k} columns")
        parts = p.w.unflatten(1, (-1, step))
        scales = parts.abs().amax(2).half() / (half - 1)
        codes = ((parts / scales.float()[..., None]).round().clamp(-half, half - 1) + half).to(torch.uint8).flatten(1)
        weight = WqWeight.from_codes(codes, scales, bits=bits, group_size=group)
        packed = [wq.pack(weight)]
        nbytes = packed[0].packed.numel() + packed[0].scales.numel() * 2
        packed += [wq.pack(weight) for _ in range(p.copies(nbytes) - 1)]
        exact = wq.reference(p.x[p.checked], weight, None, "int8")
        match = p.match(exact, weight.dequantize(), p.x)
        return Made(lambda i: wq.linear(p.x, packed[i % len(packed)], None, "int8"), match, nbytes)

    return make


def dense(dtype: torch.dtype, ours: bool) -> Callable[[Problem], Made]:
    """A dense weight in floating point, packed by us or torch's."""

    def make(p: Problem) -> Made:
        w, x = p.w.to(dtype), p.x.to(dtype)
        nbytes = w.numel() * w.element_size()
        match = p.match(
            bm.reference(x[p.checked], w.float()), w.float(), x, 2.0**-24 if dtype == torch.float32 else 2.0**-7
        )
        count = p.copies(nbytes)
        if ours:
            name = "fp32" if dtype == torch.float32 else "bf16"
            packed = [torch.ops.effk.dense_pack(w, name) for _ in range(count)]
            linear = torch.ops.effk.dense_linear
            return Made(lambda i: linear(x, packed[i % count], p.layer.n, None, "none"), match, nbytes)
        weights = [w.clone() for _ in range(count)]
        return Made(lambda i: torch.nn.functional.linear(x, weights[i % count]), match, nbytes)

    return make
