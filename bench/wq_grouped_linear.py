"""`python -m bench --op wq_grouped_linear`: low-bit experts in one call, beside one call an expert and PyTorch in bf16.

A layer of eight experts, two a token, as a mixture's gate and up: tokens sorted by expert, every call with another routing and
another copy of the weights, so that they come from memory. Match: bf16 and float forms against float64 element by element,
within 2^-8 of sum |x w|; int8 within 1.5 % of the whole result (weight-only activations in groups of 128).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import linear

import effk
from effk.formats.wq import WqWeight
from effk.ops import wq_grouped_linear as grouped
from effk.ops import wq_linear as wq

from . import machine
from .report import OURS, Row
from .timing import Contender, quiet, summary, take_turns

EXPERTS, CHOSEN, GROUP = 8, 2, 128
N, K = 3072, 1024
TOKENS, TOKENS_QUICK = (1, 2, 4, 8, 512), (1, 8)
ROUTINGS = 16
INT8_BOUND, BF16_BOUND = 0.015, 2.0**-8


@dataclass(frozen=True)
class Routed:
    """Rows sorted by expert, and where each expert's begin."""

    x: Tensor
    offsets: Tensor

    @property
    def bounds(self) -> list[int]:
        return self.offsets.tolist()


def routed(tokens: int, seed: int) -> Routed:
    """Tokens that each choose two experts at random."""
    rng = torch.Generator().manual_seed(seed)
    chosen = torch.stack([torch.randperm(EXPERTS, generator=rng)[:CHOSEN] for _ in range(tokens)]).flatten()
    experts, order = chosen.sort(stable=True)
    x = torch.randn(tokens, K, generator=rng).bfloat16()[order // CHOSEN]
    return Routed(x, torch.searchsorted(experts, torch.arange(EXPERTS + 1), out_int32=True))


class Layer:
    """Copies of the experts' weights in every form."""

    def __init__(self, bits: int) -> None:
        rng = torch.Generator().manual_seed(0)
        codes = torch.randint(0, 1 << bits, (EXPERTS * N, K), generator=rng, dtype=torch.uint8)
        scales = (torch.rand(EXPERTS * N, K // GROUP, generator=rng) * 0.01 + 0.005).half()
        self.weight = WqWeight.from_codes(codes, scales, bits=bits, group_size=GROUP)
        first, count = grouped.pack(self.weight, EXPERTS), machine.copies(self.weight.nbytes())
        self.packed = [first, *(_copy(first) for _ in range(count - 1))]
        self.single = [
            [wq.PackedWeight(p.packed[e], p.scales[e], *[None] * 5, *p.geometry) for e in range(EXPERTS)]
            for p in self.packed
        ]
        plain = self.weight.dequantize().bfloat16().view(EXPERTS, N, K)
        self.plain = [plain, *(plain.clone() for _ in range(machine.copies(2 * plain.numel()) - 1))]

    def together(self, i: int, r: Routed, compute: str) -> Tensor:
        return grouped.grouped_linear(r.x, r.offsets, self.packed[i % len(self.packed)], None, compute)

    def loop(self, i: int, r: Routed, compute: str) -> Tensor:
        at, own = r.bounds, self.single[i % len(self.single)]
        spans = [(e, at[e], at[e + 1]) for e in range(EXPERTS) if at[e] < at[e + 1]]
        return torch.cat([wq.linear(r.x[a:b], own[e], None, compute) for e, a, b in spans])

    def torch_loop(self, i: int, r: Routed) -> Tensor:
        at, own = r.bounds, self.plain[i % len(self.plain)]
        spans = [(e, at[e], at[e + 1]) for e in range(EXPERTS) if at[e] < at[e + 1]]
        return torch.cat([linear(r.x[a:b], own[e]) for e, a, b in spans])


def _copy(p: grouped.PackedExperts) -> grouped.PackedExperts:
    return p._replace(packed=p.packed.clone(), scales=p.scales.clone())


def match(y: Tensor, r: Routed, weight: Tensor, compute: str) -> float:
    """Error over its bound."""
    at, worst, error, size = r.bounds, 0.0, 0.0, 0.0
    for e in range(EXPERTS):
        x, w = r.x[at[e] : at[e + 1]].double(), weight[e].double()
        expected, got = x @ w.T, y[at[e] : at[e + 1]].double()
        error, size = error + float((got - expected).square().sum()), size + float(expected.square().sum())
        if x.shape[0]:
            worst = max(worst, float(((got - expected).abs() / (BF16_BOUND * (x.abs() @ w.abs().T))).max()))
    return (error / size) ** 0.5 / INT8_BOUND if compute == "int8" else worst


@torch.inference_mode()
def run(threads: int, quick: bool, bits: tuple[int, ...], console: Console) -> list[Row]:
    """All rows; ours against the loop of ours and PyTorch's in the same turns."""
    rows: list[Row] = []
    for width in bits:
        layer = Layer(width)
        dense = layer.weight.dequantize().view(EXPERTS, N, K)
        for tokens in TOKENS_QUICK if quick else TOKENS:
            routings = [routed(tokens, seed) for seed in range(ROUTINGS)]
            calls: dict[str, tuple[str, Callable[[int, Routed], Tensor]]] = {}
            for compute in ("int8", "float"):
                calls[f"{OURS} {compute}"] = compute, partial(layer.together, compute=compute)
                calls[f"wq_linear loop {compute}"] = compute, partial(layer.loop, compute=compute)
            calls["torch loop bf16"] = ("bf16", layer.torch_loop)
            timed = take_turns({name: Contender(_Rotation(call, routings)) for name, (_, call) in calls.items()})
            found = {name: summary(quiet(turns)[0]) for name, turns in timed.items()}
            touched = statistics.fmean(
                sum(b > a for a, b in zip(r.bounds, r.bounds[1:], strict=False)) for r in routings
            )
            for name, (compute, call) in calls.items():
                ours, time = name.startswith(OURS), found[name]
                others = [found[o].us for o in calls if o == f"wq_linear loop {compute}" or o.startswith("torch")]
                share = touched / EXPERTS * (layer.weight.nbytes() if compute != "bf16" else 2 * EXPERTS * N * K)
                keys = {
                    "tokens": tokens,
                    "experts": EXPERTS,
                    "N": N,
                    "K": K,
                    "bits": 16 if compute == "bf16" else width,
                }
                rows.append(
                    Row(
                        "wq_grouped_linear", compute, keys, "bfloat16", effk.isa.active() if "torch" not in name else "native",
                        threads, name, torch.__version__ if "torch" in name else effk.__version__, time.us, time.iqr,
                        share / time.us / 1e3, 2 * CHOSEN * tokens * N * K / time.us / 1e3, None,
                        min(others) / time.us if ours else None, match(call(0, routings[0]), routings[0], dense, compute),
                        best_us=time.best,
                    )
                )  # fmt: skip
    table = Table("tokens", "bits", "backend", "us", "iqr", "GB/s", "GFLOP/s", "x best other", "match")
    for row in rows:
        table.add_row(
            str(row.shape["tokens"]), str(row.shape["bits"]), row.backend, f"{row.us:.0f}", f"{row.us_iqr:.0f}",
            f"{row.gbps:.1f}", f"{row.gflops:.0f}", "" if row.vs_best is None else f"{row.vs_best:.2f}", f"{row.match:.2g}",
        )  # fmt: skip
    console.print(table)
    return rows


class _Rotation:
    """Calls with the next copy and routing each time."""

    def __init__(self, call: Callable[[int, Routed], Tensor], routings: list[Routed]) -> None:
        self.call, self.routings, self.next = call, routings, 0

    def __call__(self) -> None:
        self.call(self.next, self.routings[self.next % len(self.routings)])
        self.next += 1
