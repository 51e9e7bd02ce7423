"""Layers of bitmask_linear to measure, and what is compared: our sparse weights, our dense ones, torch's dense layer."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

import effk
from effk.formats.wq import WqWeight
from effk.ops import bitmask_linear as bm
from effk.ops import wq_linear as wq

from . import machine

NAME, VERSION = "effk bitmask_linear", effk.__version__
WQ, DENSE, TORCH, CSR = "effk wq_linear", "effk dense_linear", "torch linear", "torch sparse CSR"
BITS = {"fp32": 32, "bf16": 16, "int8": 8, "int4": 4}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SPARSITIES = (0.5, 0.75)
ROWS = (1, 4, 8, 128, 512)
COLD_ROWS = 8  # up to here weights come from memory
CHECKED = 256  # rows of the weight that are compared with float64


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
    """x and W of one size; zeros are where random numbers say, as unstructured pruning leaves them.

    ``before``: a problem of the same layer, whose weights are taken over. Packing a rotation of them takes longer than timing it.
    """

    def __init__(self, layer: Layer, m: int, before: Problem | None = None) -> None:
        self.layer, self.m = layer, m
        rng = torch.Generator().manual_seed(0)
        if before is not None and before.layer == layer:
            self.w, self.order, self._packed = before.w, before.order, before._packed
        else:
            self.w = torch.randn(layer.n, layer.k, generator=rng) / math.sqrt(layer.k)
            self.order = torch.rand(layer.n, layer.k, generator=rng)
            self._packed: dict[object, list] = {}
        self.x = torch.randn(m, layer.k, generator=rng)

    @cached_property
    def checked(self) -> tuple[Tensor, Tensor]:
        """Tokens and rows of the weight that are compared: the first and the last, and some between."""
        rows = torch.linspace(0, self.layer.n - 1, min(self.layer.n, CHECKED)).round().long()
        return torch.arange(min(self.m, 4)), rows

    def sparse(self, sparsity: float) -> Tensor:
        """The weight with so many zeros."""
        return self.w.where(self.order >= sparsity, torch.zeros(()))

    def rotation(
        self, key: object, first: Callable[[], Any], again: Callable[[Any], Any], nbytes: Callable[[Any], int]
    ) -> list[Any]:
        """Copies of a packed weight that make it cold; for many rows it is read once in a while anyway."""
        made = self._packed.setdefault(key, [])
        if not made:
            made.append(first())
        if self.m > COLD_ROWS:
            return made[:1]
        made += [again(made[0]) for _ in range(machine.copies(nbytes(made[0])) - len(made))]
        return made

    def match(self, exact: Tensor, w: Tensor, x: Tensor, store: float = 2.0**-24) -> Callable[[Tensor], float]:
        """Against float64 results of the checked tokens and rows ``w``: sums of k products in fp32, rounded to ``store``."""
        tokens, rows = self.checked
        size = x[tokens].double().abs() @ w.double().abs().T
        bound = self.layer.k * 2.0**-24 * size + store * (exact.abs() + 1e-3 * size)

        def error(y: Tensor) -> float:
            return float(((y[tokens][:, rows].double() - exact).abs() / bound).max())

        return error


def codes_of(weight: bm.BitmaskWeight) -> Tensor:
    """Stored values, dense."""
    return torch.ops.effk.bitmask_unpack(weight.values, weight.masks, weight.ptr, None, weight.n, weight.k)


def sparse(values: str, sparsity: float, compute: str) -> Callable[[Problem], Made]:
    """Our sparse weight."""

    def make(p: Problem) -> Made:
        weights = p.rotation(
            (NAME, values, sparsity),
            lambda: bm.pack(p.sparse(sparsity), values=values),
            lambda first: bm.pack(codes_of(first), scale=first.scale, values=values),  # faster than rounding again
            lambda first: first.nbytes,
        )
        first, (tokens, rows) = weights[0], p.checked
        x = p.x.bfloat16() if values == "bf16" else p.x
        codes = codes_of(first)[rows].float()
        dense = codes if first.scale is None else codes * first.scale[rows]
        if compute == "int8":
            exact = bm.reference_int8(x[tokens], codes, first.scale[rows])
        else:
            exact = bm.reference(x[tokens], dense)
        match = p.match(exact, dense, x, 2.0**-8 if values == "bf16" else 2.0**-24)
        return Made(lambda i: bm.linear(x, weights[i % len(weights)], None, compute), match, first.nbytes)

    return make


def low_bit(bits: int, group: int) -> Callable[[Problem], Made]:
    """Our dense weight of few bits, activations rounded to int8."""

    def make(p: Problem) -> Made:
        step, half = group or p.layer.k, 1 << (bits - 1)
        if p.layer.k % step:
            raise ValueError(f"no whole groups of {step} in {p.layer.k} columns")

        def weight_of(w: Tensor) -> WqWeight:
            parts = w.unflatten(1, (-1, step))
            scales = parts.abs().amax(2).half() / (half - 1)
            codes = (
                ((parts / scales.float()[..., None]).round().clamp(-half, half - 1) + half).to(torch.uint8).flatten(1)
            )
            return WqWeight.from_codes(codes, scales, bits=bits, group_size=group)

        plain = functools.cache(lambda: weight_of(p.w))
        packed = p.rotation((WQ, bits, group), lambda: wq.pack(plain()), lambda first: wq.pack(plain()), wq_bytes)
        tokens, rows = p.checked
        some = weight_of(p.w[rows])
        match = p.match(wq.reference(p.x[tokens], some, None, "int8"), some.dequantize(), p.x)
        return Made(lambda i: wq.linear(p.x, packed[i % len(packed)], None, "int8"), match, wq_bytes(packed[0]))

    return make


def wq_bytes(packed: wq.PackedWeight) -> int:
    """Bytes that a product with one token reads."""
    return packed.packed.numel() + packed.scales.numel() * 2


def dense(name: str, ours: bool) -> Callable[[Problem], Made]:
    """A dense weight in floating point, packed by us or torch's."""

    def make(p: Problem) -> Made:
        w, x = p.w.to(DTYPES[name]), p.x.to(DTYPES[name])
        nbytes = w.numel() * w.element_size()
        first = (lambda: torch.ops.effk.dense_pack(w, name)) if ours else w.clone
        weights = p.rotation((ours, name), first, lambda made: first(), lambda made: nbytes)
        tokens, rows = p.checked
        some = w[rows].float()
        match = p.match(bm.reference(x[tokens], some), some, x, 2.0**-24 if name == "fp32" else 2.0**-7)
        if ours:
            linear = torch.ops.effk.dense_linear
            return Made(lambda i: linear(x, weights[i % len(weights)], p.layer.n, None, "none"), match, nbytes)
        return Made(lambda i: torch.nn.functional.linear(x, weights[i % len(weights)]), match, nbytes)

    return make


def csr(sparsity: float) -> Callable[[Problem], Made]:
    """torch's compressed rows, fp32 with indices of 32 bits."""

    def make(p: Problem) -> Made:
        def pack() -> Tensor:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # "in beta state"
                plain = p.sparse(sparsity).to_sparse_csr()
                return torch.sparse_csr_tensor(
                    plain.crow_indices().int(), plain.col_indices().int(), plain.values(), size=plain.shape
                )

        def again(w: Tensor) -> Tensor:
            return torch.sparse_csr_tensor(
                w.crow_indices().clone(), w.col_indices().clone(), w.values().clone(), size=w.shape
            )

        def nbytes(w: Tensor) -> int:
            return w.values().numel() * 8 + w.crow_indices().numel() * 4

        weights = p.rotation((CSR, sparsity), pack, again, nbytes)
        tokens, rows = p.checked
        some = p.sparse(sparsity)[rows]
        match = p.match(bm.reference(p.x[tokens], some), some, p.x)
        return Made(lambda i: (weights[i % len(weights)] @ p.x.T).T, match, nbytes(weights[0]))

    return make
