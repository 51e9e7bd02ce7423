"""Decoding token by token: relaxed convolution against the direct sum over the past, and their operations by count."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

import effk
from effk.nn.fftconv_decoder import spread

from .fftconv_problem import DECODE, Shape, bound
from .measure import Say
from .report import OURS, Row

OP = "fftconv"
SHAPE = Shape(1, 256, 8192)
TOKENS = (64, 128, 256, 512, 1024, 2048, 4096, 8192)  # where the time so far is a row
DIRECT = "torch direct sum"
ROUNDS = 3
FIRST_FFT_TILE = 128  # smaller tiles are direct sums
SEED = 7


def operations(tokens: int) -> float:
    """Of relaxed convolution for one channel, by the schedule; the direct sum takes tokens * (tokens + 1).

    Position s = 1, 2, ... closes a tile of U samples, the largest power of two that divides s: U^2 multiply-adds, or
    from FIRST_FFT_TILE on a transform of U complex points there and back in split-radix operations, and 12 U for
    packing, the product by the spectrum and adding. A tile that nobody reads any more is left out.
    """
    total = 2.0 * tokens
    for s in range(1, tokens):
        u = s & -s
        if u < FIRST_FFT_TILE:
            total += 2 * u * min(u, tokens - s)
        else:
            total += 2 * (4 * u * math.log2(u) - 6 * u + 8) + 12 * u
    return total


def relaxed(x: Tensor, k: Tensor) -> Callable[[], tuple[Tensor, list[float]]]:
    """Decodes all of x [B, H, T] with the op, from empty buffers; gives y and the seconds of each step."""
    ops, (b, h, tokens) = torch.ops.effk, x.shape
    tiles = [FIRST_FFT_TILE << i for i in range(max(0, (tokens - 1).bit_length() - FIRST_FFT_TILE.bit_length() + 1))]
    k = torch.nn.functional.pad(k, (0, spread(k.shape[-1]) - k.shape[-1]))
    specs = [ops.fftconv_decode_prepare(k, tile) for tile in tiles]

    def decode() -> tuple[Tensor, list[float]]:
        xbuf, ybuf = torch.zeros(b, h, spread(tokens)), torch.zeros(b, h, spread(tokens))  # as FFTConvDecoder does

        def step(x_t: Tensor, t: int) -> Tensor:
            if t + 1 == tokens:
                return ybuf[..., t] + k[:, 0] * x_t
            return ops.fftconv_decode_step(x_t, xbuf, ybuf, k, specs, t)

        return steps(x, step)

    return decode


def direct(x: Tensor, k: Tensor) -> Callable[[], tuple[Tensor, list[float]]]:
    """The same as a dot product per channel and step: vecdot, which beat the sum of products, bmm and einsum."""
    reverse, tokens = k.flip(-1).contiguous(), x.shape[-1]

    def decode() -> tuple[Tensor, list[float]]:
        past = torch.zeros(x.shape)

        def step(x_t: Tensor, t: int) -> Tensor:
            past[..., t] = x_t
            return torch.linalg.vecdot(past[..., : t + 1], reverse[:, tokens - 1 - t :])

        return steps(x, step)

    return decode


def steps(x: Tensor, step: Callable[[Tensor, int], Tensor]) -> tuple[Tensor, list[float]]:
    """Calls step(x[..., t], t) for every t.

    Results are copied away: kept one by one, they would pin the heap above each step's temporary, which grows.
    """
    columns = [column.contiguous() for column in x.unbind(-1)]
    y, taken, now = torch.empty_like(x), [], time.perf_counter
    for t, column in enumerate(columns):
        start = now()
        y_t = step(column, t)
        taken.append(now() - start)
        y[..., t] = y_t
    return y, taken


def rows(threads: int, tier: str, say: Say, shape: Shape = SHAPE) -> list[Row]:
    """Microseconds per token up to several lengths; the ways to decode take turns."""
    generator = torch.Generator().manual_seed(SEED)
    x = torch.randn(shape.b, shape.h, shape.l, generator=generator)
    k = torch.randn(shape.h, shape.l, generator=generator) * torch.exp(-4 * torch.arange(shape.l) / shape.l)
    n = 2 * shape.l
    exact = torch.fft.irfft(torch.fft.rfft(x.double(), n) * torch.fft.rfft(k.double(), n), n)[..., : shape.l]
    ways = {OURS: relaxed(x, k), DIRECT: direct(x, k)}
    taken: dict[str, list[list[float]]] = {name: [] for name in ways}
    match: dict[str, float] = {}
    with effk.isa.use(tier):
        for _ in range(ROUNDS):
            for name, decode in ways.items():
                y, seconds = decode()
                taken[name].append(seconds)
                match[name] = error(y, exact)
    out = []
    for tokens in (t for t in TOKENS if t <= shape.l):
        here = Shape(shape.b, shape.h, tokens)
        keys = here.keys() | {"n_fft": tokens}
        for name in ways:
            each = [1e6 * sum(seconds[:tokens]) / tokens for seconds in taken[name]]
            us, ours = statistics.median(each), name == OURS
            spread = max(each) - min(each)
            ratio = tokens * (tokens + 1) / operations(tokens)
            flops = shape.b * shape.h * (operations(tokens) / tokens if ours else tokens + 1)
            case = f"{DECODE}, {ratio:.1f} times fewer operations than the sum" if ours else DECODE
            fixed = (OP, case, keys, "float32", tier if ours else "native", threads, name)
            version = effk.__version__ if ours else torch.__version__
            out.append(Row(*fixed, version, us, spread, None, flops / us / 1e3, None, None, match[name], min(each)))
    say(f"{shape} {DECODE}: {len(ways)} backends")
    return out


def error(y: Tensor, exact: Tensor) -> float:
    """Largest relative rms error of a row over its bound."""
    wrong = (y.double() - exact).square().mean(-1) / exact.square().mean(-1)
    value = float(wrong.max().sqrt()) / bound(2 * y.shape[-1])
    return value if value == value else math.inf
