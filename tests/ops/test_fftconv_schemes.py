"""The direct and the overlap-save scheme, and the choice among schemes."""

from __future__ import annotations

import itertools

import pytest
import torch

from effk.ops import fftconv as fc
from fftconv_cases import (
    ALL,
    DTYPES,
    PARTS,
    Problem,
    check_backward,
    check_forward,
    every_tier,
    problem,
    relative,
    root_mean_square_bound,
)

ops = torch.ops.effk


@every_tier
@pytest.mark.parametrize("taps", (1, 2, 3, 7, 16, 31, 64))
def test_direct(tier: str, taps: int) -> None:
    for i, length in enumerate((1, 2, 15, 16, 17, 63, 64, 65, 200, 1025)):
        check_forward(
            problem(length, taps, 1 + i % 3, (1, 5)[i % 2], parts=PARTS[i % 8], dtype=DTYPES[i % 3], scheme="direct")
        )


@every_tier
@pytest.mark.parametrize("taps", (65, 129, 1000, 4097))
def test_overlap_save_equals_the_full_transform(tier: str, taps: int) -> None:
    if tier == "scalar" and not ALL:
        pytest.skip("slow; the tests of other lengths run on it")
    for parts in ("", "abs"):
        p = problem(100_000, taps, 1, 2, parts=parts, scheme="overlap_save")
        check_forward(p)
        full = Problem(*p.tensors, p.n_fft, scheme="fft").run()
        assert relative(p.run(), full.double()) < 2 * root_mean_square_bound(p.n_fft)


@every_tier
def test_overlap_save_lengths(tier: str) -> None:
    """Rows shorter than a block, one block, and one position more or less than whole blocks."""
    turn = itertools.count()
    for taps in (1, 5, 70, 257):
        for length in (1, 2, 255, 1000, 4096 - taps, 4096 - taps + 1, 4096 - taps + 2, 4096, 9000):
            i = next(turn)
            check_forward(
                problem(
                    length, taps, 1 + i % 2, 1 + i % 3, parts=PARTS[i % 8], dtype=DTYPES[i % 3], scheme="overlap_save"
                )
            )


def test_any_scheme_serves_auto() -> None:
    p = problem(300, 40, parts="ab")
    results = []
    for scheme in ("fft", "overlap_save", "direct"):
        spec = ops.fftconv_prepare(p.k, p.n_fft, "causal", scheme)
        y = ops.fftconv(p.u, spec, p.pregate, p.postgate, None, p.n_fft, "causal", "auto")
        check_forward(p, y)
        assert torch.equal(y, ops.fftconv(p.u, spec, p.pregate, p.postgate, None, p.n_fft, "causal", scheme))
        results.append(y)
    assert relative(results[0], results[2].double()) < 2e-6


@every_tier
@pytest.mark.parametrize("scheme", ("direct", "overlap_save"))
def test_backward_of_other_schemes(tier: str, scheme: str) -> None:
    for i, (length, taps) in enumerate(((1, 1), (5, 9), (100, 3), (1000, 40), (5000, 64), (9000, 3), (4097, 33))):
        taps = taps if scheme == "direct" else taps * 3
        p = problem(length, taps, 1 + i % 3, 2, parts=PARTS[7 - i], dtype=DTYPES[i % 3], scheme=scheme)
        check_backward(p, torch.randn(p.u.shape).to(p.u.dtype))


def test_plan_is_text() -> None:
    plans = {fc.plan(length, taps) for length, taps in ((100, 8), (1 << 17, 500), (1024, 1024), (1 << 19, 1 << 19))}
    assert len(plans) == 4 and all(isinstance(text, str) and text for text in plans)
