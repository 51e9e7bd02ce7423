"""Attention calls to measure: decoding and prompts of real models' shapes, the data of one call, its result in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from . import machine

DECODE, PREFILL = "decode", "prefill"
CONTEXTS, SEQUENCES, PROMPTS = (128, 512, 2048, 8192), (1, 8), (512, 2048)
CHECKED = 8  # of a prompt, this many last tokens are compared
EPS = 2.0**-24


@dataclass(frozen=True)
class Heads:
    """Query heads, kv heads and their size."""

    name: str
    heads: int
    kv_heads: int
    d: int

    def __str__(self) -> str:
        return self.name


SMOLLM2, LLAMA = Heads("smollm2", 9, 3, 64), Heads("llama-8b", 32, 8, 128)
SHAPES = (SMOLLM2, LLAMA)


@dataclass(frozen=True)
class Made:
    """A backend's call, and its result as (sequences, tokens, heads, D)."""

    call: Callable[[int], Tensor]
    read: Callable[[Tensor], Tensor]
    cache_bytes: int  # of keys and values that a call has to read
    error: float = 0.0  # of a weight and a result, relative, beside fp32 arithmetic
    query_error: float = 0.0  # of a query, relative to the largest value of its head


class Problem:
    """``sequences`` sequences of ``context`` tokens, of which the last ``tokens`` are asked for: one, or all."""

    def __init__(self, heads: Heads, context: int, sequences: int, kind: str) -> None:
        self.heads, self.context, self.sequences, self.kind = heads, context, sequences, kind
        self.tokens = 1 if kind == DECODE else context

    def keys(self) -> dict[str, int]:
        """The `shape` of a row."""
        h = self.heads
        return {"B": self.sequences, "H": h.heads, "KV": h.kv_heads, "D": h.d, "L": self.context, "T": self.tokens}

    def _normal(self, seed: int, tokens: int, heads: int) -> Tensor:
        return torch.randn(self.sequences, tokens, heads, self.heads.d, generator=torch.Generator().manual_seed(seed))

    @cached_property
    def q(self) -> Tensor:
        """(sequences, tokens, heads, D)."""
        return self._normal(1, self.tokens, self.heads.heads)

    @cached_property
    def kv(self) -> tuple[Tensor, Tensor]:
        """Keys and values (sequences, context, kv heads, D), of values that fp16 and bf16 hold exactly."""
        return tuple(self._normal(s, self.context, self.heads.kv_heads).bfloat16().float() for s in (2, 3))

    @property
    def scale(self) -> float:
        return self.heads.d**-0.5

    def copies(self, nbytes: int) -> int:
        """Caches that take turns: a token of a model finds its own in memory, a prompt has just written it."""
        return machine.copies(nbytes) if self.kind == DECODE else 1

    def flops(self) -> int:
        """Of the positions that tokens see; a multiply-add is two."""
        seen = self.tokens * self.context - self.tokens * (self.tokens - 1) // 2
        return 4 * self.sequences * self.heads.heads * self.heads.d * seen

    def match(self, got: Tensor, made: Made, kv: tuple[Tensor, Tensor]) -> float:
        """Largest error over its bound, for the last tokens of the first and last sequence. kv: as the backend stores them.

        Scores are off by a chain of D products, and by the rounding of q; weights by twice the worst score; sums by a chain of at
        most all positions, each as if done one after the other.
        """
        worst, n = 0.0, min(self.tokens, CHECKED)
        group = self.heads.heads // self.heads.kv_heads
        for s in {0, self.sequences - 1}:
            q = self.q[s, -n:].double()
            k, v = (t[s].double().repeat_interleave(group, 1) for t in kv)
            scores = self.scale * torch.einsum("thd,jhd->htj", q, k)
            last = self.context - n + torch.arange(n)
            weights = scores.masked_fill(torch.arange(self.context) > last[:, None], -torch.inf).softmax(-1)
            want = torch.einsum("htj,jhd->thd", weights, v)
            size = self.scale * torch.einsum("thd,jhd->htj", q.abs(), k.abs()).amax(-1)
            rounding = self.scale * torch.einsum("th,jhd->htj", q.abs().amax(-1), k.abs()).amax(-1)
            off = (self.heads.d + 16) * EPS * size + made.query_error * rounding
            rate = 2.2 * off + (self.context + 64) * EPS + 4e-7 + 3 * made.error
            bound = rate.T[..., None] * torch.einsum("htj,jhd->thd", weights, v.abs())
            worst = max(worst, float(((got[s, -n:].double() - want).abs() / bound).max()))
        return worst
