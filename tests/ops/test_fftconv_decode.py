"""fftconv_decode_step: every pair of an input and an output once, and the causal convolution in the end."""

from __future__ import annotations

import pytest
import torch

from effk.ops import fftconv as fc
from fftconv_cases import every_tier, gamma, norms, problem, relative

ops = torch.ops.effk


def tiles_for(k: torch.Tensor, positions: int) -> list[torch.Tensor]:
    tiles, tile = [], fc.FIRST_FFT_TILE
    while tile < positions:
        tiles.append(ops.fftconv_decode_prepare(k, tile))
        tile *= 2
    return tiles


def decode(x: torch.Tensor, k: torch.Tensor, start: torch.Tensor | None = None) -> torch.Tensor:
    xbuf, ybuf = torch.zeros_like(x), torch.zeros_like(x) if start is None else start.clone()
    specs = tiles_for(k, x.shape[2])
    steps = [ops.fftconv_decode_step(x[..., t].contiguous(), xbuf, ybuf, k, specs, t) for t in range(x.shape[2])]
    return torch.stack(steps, -1)


@every_tier
@pytest.mark.parametrize("positions", (1, 2, 64, 100, 127))
def test_decoding_direct_tiles_is_exact_on_integers(tier: str, positions: int) -> None:
    """Every pair of an input and an output meets exactly once: small integers leave no room for rounding."""
    x = torch.randint(-8, 9, (2, 3, positions)).float()
    for taps in {1, min(5, positions), positions, positions + 9}:
        k = torch.randint(-8, 9, (3, taps)).float()
        assert torch.equal(decode(x, k).double(), fc.reference(x, k, method="direct"))


def test_decoding_counts_each_pair_once() -> None:
    """With FFT tiles: an impulse meets distinct integer taps; rounded to integers, nothing is missing or double."""
    positions = 700
    k = (1 + torch.arange(positions)).float().repeat(1, 1)
    for s in (0, 1, 63, 64, 127, 128, 129, 255, 256, 300, 511, 512, 699):
        x = torch.zeros(1, 1, positions)
        x[..., s] = 1
        expected = torch.zeros(positions)
        expected[s:] = k[0, : positions - s]
        assert torch.equal(decode(x, k)[0, 0].round(), expected)


@every_tier
@pytest.mark.parametrize("positions", (128, 129, 300, 1000, 2048))
def test_decoding_is_the_causal_convolution(tier: str, positions: int) -> None:
    if tier == "scalar" and positions > 1000:
        pytest.skip("slow, and no other path")
    for taps in {3, 100, positions // 2 + 1, positions}:
        p = problem(positions, taps, 2, 3)
        y, expected = decode(p.u, p.k), fc.reference(p.u, p.k)
        assert relative(y, expected) < 1e-6
        worst = gamma(p.n_fft) * norms(p.u) * norms(p.k)
        assert bool(((y - expected).abs() <= worst).all())


def test_decoding_continues_from_what_ybuf_holds() -> None:
    p, start = problem(200, 200), torch.randn(2, 3, 200)
    assert relative(decode(p.u, p.k, start), fc.reference(p.u, p.k) + start.double()) < 1e-6


def test_decoding_rows_are_independent() -> None:
    p = problem(300, 300, 3, 4)
    y = decode(p.u, p.k)
    assert torch.equal(decode(p.u[1:2, 2:].contiguous(), p.k[2:].contiguous()), y[1:2, 2:])
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(decode(p.u, p.k), y)


def test_opcheck_decoding() -> None:
    k, buffer = torch.randn(3, 300), torch.randn(2, 3, 300)
    torch.library.opcheck(ops.fftconv_decode_prepare.default, (k, 128))
    specs = [ops.fftconv_decode_prepare(k, tile) for tile in (128, 256)]
    for t in (4, 255):
        torch.library.opcheck(
            ops.fftconv_decode_step.default, (torch.randn(2, 3), buffer.clone(), buffer.clone(), k, specs, t)
        )


def test_bad_arguments_of_decoding() -> None:
    k, x, buffer = torch.randn(3, 300), torch.randn(2, 3), torch.zeros(2, 3, 300)
    specs = [ops.fftconv_decode_prepare(k, tile) for tile in (128, 256)]
    step = ops.fftconv_decode_step
    cases = [
        (r"^fftconv_decode_step: t: expected .*299.* got 300", (x, buffer, buffer.clone(), k, specs, 300)),
        (r"^fftconv_decode_step: t: expected .* got -1", (x, buffer, buffer.clone(), k, specs, -1)),
        (r"^fftconv_decode_step: x_t: expected .* got .*\[2, 4\]", (torch.randn(2, 4), buffer, buffer.clone(), k, specs, 0)),
        (r"^fftconv_decode_step: x_t: expected .*float32.* got .*bfloat16", (x.bfloat16(), buffer, buffer.clone(), k, specs, 0)),
        (r"^fftconv_decode_step: ybuf: expected .* got .*\[2, 3, 299\]", (x, buffer, buffer[..., 1:].contiguous(), k, specs, 0)),
        (r"^fftconv_decode_step: k: expected .* got .*\[4, 300\]", (x, buffer, buffer.clone(), torch.randn(4, 300), specs, 0)),
        (r"^fftconv_decode_step: specs: expected at least 2 at t = 255, got 1", (x, buffer, buffer.clone(), k, specs[:1], 255)),
        (r"^fftconv_decode_step: specs.*: expected .* got", (x, buffer, buffer.clone(), k, [*specs[:1], ops.fftconv_decode_prepare(k, 512)], 0)),
    ]  # fmt: skip
    for message, arguments in cases:
        with pytest.raises(RuntimeError, match=message):
            step(*arguments)
    for tile in (64, 100, -128, 1 << 40):
        with pytest.raises(RuntimeError, match=rf"^fftconv_decode_prepare: tile: expected .* got {tile}"):
            ops.fftconv_decode_prepare(k, tile)
