"""FFTConvDecoder: prompt and steps together are the causal convolution."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from effk.nn import FFTConvDecoder
from effk.ops import fftconv as fc
from fftconv_cases import problem, relative


def gates_at(p: object, t: int) -> list[Tensor | None]:
    return [None if gate is None else gate[..., t] for gate in (p.pregate, p.postgate)]


@pytest.mark.parametrize("parts", ("", "abs"))
@pytest.mark.parametrize("taps", (3, 150, 400))
@pytest.mark.parametrize("prompt", (0, 1, 17, 128, 399))
def test_prefill_then_decode(prompt: int, taps: int, parts: str) -> None:
    p = problem(400, taps, 2, 3, parts=parts)
    decoder = FFTConvDecoder(p.k, 400 - prompt, p.skip)
    cut = [None if t is None else t[..., :prompt].contiguous() for t in (p.u, p.pregate, p.postgate)]
    first = decoder.prefill(*cut)
    steps = [decoder.step(p.u[..., t], *gates_at(p, t)) for t in range(prompt, 400)]
    y = torch.cat((first, torch.stack(steps, -1)), -1)
    expected = fc.reference(*p.tensors)
    assert relative(y, expected) < 1e-6
    rows = (y - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert float(rows.max()) < 2e-6
    with pytest.raises(RuntimeError, match=f"FFTConvDecoder: expected at most capacity = {400 - prompt} steps"):
        decoder.step(p.u[..., 0], *gates_at(p, 0))


def test_decoder_starts_by_itself_and_again() -> None:
    p = problem(20, 20)
    decoder = FFTConvDecoder(p.k, 20)
    for _ in range(2):
        y = torch.stack([decoder.step(p.u[..., t]) for t in range(20)], -1)
        assert relative(y, fc.reference(p.u, p.k)) < 1e-6
        decoder.start(2)
    assert decoder.position == 0


def test_decoder_keeps_the_dtype() -> None:
    p = problem(30, 30, dtype=torch.bfloat16, parts="abs")
    decoder = FFTConvDecoder(p.k, 20, p.skip)
    first = decoder.prefill(*(t[..., :10] for t in (p.u, p.pregate, p.postgate)))
    y = torch.cat((first, torch.stack([decoder.step(p.u[..., t], *gates_at(p, t)) for t in range(10, 30)], -1)), -1)
    assert y.dtype == torch.bfloat16 and relative(y, fc.reference(*p.tensors)) < 3e-3


def test_decoder_operations() -> None:
    """8K positions: at least 20 times fewer than direct sums; and the count is that of the schedule."""
    decoder = FFTConvDecoder(torch.randn(1, 8), 8192)
    spent = sum(decoder.operations(t) for t in range(8192))
    assert 8192 * 8193 / spent >= 20
    assert [decoder.operations(t) for t in (0, 1, 2, 3, 8191)] == [4, 10, 4, 34, 2]
    assert decoder.operations(63) == 2 + 2 * 64**2
    for t, points in ((127, 256), (255, 256), (1023, 1024)):
        levels = points.bit_length() - 1
        assert decoder.operations(t) == 2 + 2 * (4 * points * levels - 6 * points + 8) + 12 * points


def test_decoder_bad_arguments() -> None:
    k = torch.randn(3, 20)
    for arguments, message in (
        ((k[0], 5), r"k: expected \(H, K\), got \[20\]"),
        ((k, 0), "capacity: expected at least 1, got 0"),
        ((k, 5, torch.zeros(4)), r"skip: expected \[3\], got \[4\]"),
    ):
        with pytest.raises(ValueError, match="FFTConvDecoder: " + message):
            FFTConvDecoder(*arguments)
    decoder = FFTConvDecoder(k, 5)
    decoder.start(2)
    with pytest.raises(ValueError, match=r"x_t: expected \[2, 3\], got \[1, 3\]"):
        decoder.step(torch.zeros(1, 3))
    with pytest.raises(ValueError, match=r"u: expected \(B, 3, P\), got \[2, 4, 9\]"):
        decoder.prefill(torch.zeros(2, 4, 9))
