"""fftconv against the float64 reference, on every tier, forward and backward."""

from __future__ import annotations

import itertools

import pytest
import torch

from effk import isa
from effk.ops import fftconv as fc
from effk.ops import monarch
from fftconv_cases import (
    ALL,
    DTYPES,
    PARTS,
    TIERS,
    Problem,
    check_backward,
    check_forward,
    every_tier,
    problem,
    relative,
)

SIZES = sorted({f * 2**a for f in (1, 3, 5) for a in range(17) if 32 <= f * 2**a <= 8192})


def lengths(n_fft: int) -> list[int]:
    return sorted({1, 2, 3, 17, n_fft // 2 - 1, n_fft // 2, n_fft // 2 + 1, n_fft})


def test_smallest_size() -> None:
    assert [fc.smallest_size(n) for n in (1, 32, 33, 41, 49, 65, 4097, 5121, 6145, 1 << 24)] == [
        32, 32, 40, 48, 64, 80, 5120, 6144, 8192, 1 << 24,
    ]  # fmt: skip
    with pytest.raises(
        ValueError, match=r"fftconv: n_fft: expected at most 16777216, got a problem that needs 16777217"
    ):
        fc.smallest_size((1 << 24) + 1)


# ---- the references themselves ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", fc.MODES)
def test_references_agree(mode: str) -> None:
    """Direct sums, float64 FFTs and dense Monarch matrices are three ways to one result."""
    for length, taps in {"causal": ((1, 1), (5, 3), (20, 33), (16, 49)), "circular": ((64, 64), (48, 5)),
                         "bidirectional": ((1, 32), (20, 48), (32, 64))}[mode]:  # fmt: skip
        for parts in PARTS:
            p = problem(length, taps, mode=mode, parts=parts)
            direct = fc.reference(*p.tensors, mode, "direct")
            assert relative(fc.reference(*p.tensors, mode, "fft"), direct) < 1e-13
            factors = {32: (4, 8), 48: (3, 16), 64: (4, 4, 4), 80: (5, 16)}[p.n_fft]
            u, k, *rest = p.tensors
            assert relative(monarch.monarch_reference(u, k, factors, *rest), direct) < 1e-13
            gy = torch.randn_like(p.u)
            pairs = zip(
                fc.reference_backward(gy, *p.tensors, mode, "fft"),
                fc.reference_backward(gy, *p.tensors, mode, "direct"),
                strict=True,
            )
            assert all(a is b is None or relative(a, b) < 1e-12 for a, b in pairs)


def test_direct_reference_is_the_sum_in_words() -> None:
    u, k = torch.randn(1, 1, 6), torch.randn(1, 12)
    for mode, taps in (("causal", 4), ("circular", 5), ("bidirectional", 12)):
        y = fc.reference(u, k[:, :taps], mode=mode, method="direct")
        for t in range(6):
            total = 0.0
            for s in range(6):
                if mode == "causal":
                    tap = t - s if 0 <= t - s < taps else None
                elif mode == "circular":
                    tap = (t - s) % 6 if (t - s) % 6 < taps else None
                else:
                    tap = (t - s) % taps
                total += 0.0 if tap is None else float(k[0, tap]) * float(u[0, 0, s])
            assert abs(total - float(y[0, 0, t])) < 1e-12


@pytest.mark.parametrize(("mode", "n_fft"), [*itertools.product(fc.MODES, (32, 64))])
def test_reference_gradients_by_finite_differences(mode: str, n_fft: int) -> None:
    length, taps = {
        "causal": (n_fft // 2, n_fft // 2),
        "circular": (n_fft, n_fft - 3),
        "bidirectional": (n_fft // 2, n_fft),
    }[mode]
    p = problem(length, taps, 2, 1, n_fft, mode, parts="abs")
    inputs = [t.double().requires_grad_() for t in p.tensors]
    y = fc.reference(*inputs, mode)
    gy = torch.randn_like(y)
    exact = fc.reference_backward(gy, *(t.detach() for t in inputs), mode)
    for tensor, grad in zip(inputs, exact, strict=True):
        step = torch.randn_like(tensor)
        with torch.no_grad():
            up = fc.reference(*(t + step if t is tensor else t for t in inputs), mode)
            down = fc.reference(*(t - step if t is tensor else t for t in inputs), mode)
            difference = (up - down) / 2  # linear in each argument: exact for steps of any size, up to rounding
            size = float(((up.abs() + down.abs()) * gy.abs()).sum())
            assert abs(float((difference * gy).sum() - (grad * step).sum())) < 1e-13 * size
    for grad, automatic in zip(exact, torch.autograd.grad(y, inputs, gy), strict=True):
        assert relative(grad, automatic) < 1e-12


# ---- forward ----------------------------------------------------------------------------------------------------------


@pytest.mark.emulated
@every_tier
def test_small(tier: str) -> None:
    """Every path once, quick enough for an emulated CPU: a transform in one block and in several, modes, schemes, dtypes."""
    shapes = ((20, 20, "causal", "fft"), (300, 300, "causal", "fft"), (96, 96, "circular", "fft"), (20, 40, "bidirectional", "fft"),
              (5000, 2000, "causal", "fft"), (300, 70, "causal", "overlap_save"), (100, 9, "causal", "direct"))  # fmt: skip
    for i, (length, taps, mode, scheme) in enumerate(shapes):
        p = problem(length, taps, 1, 1, mode=mode, scheme=scheme, dtype=DTYPES[i % 3], parts=("abs", "")[i % 2])
        check_forward(p)
        check_backward(p, torch.randn(p.u.shape).to(p.u.dtype))


@every_tier
@pytest.mark.parametrize("n_fft", SIZES)
def test_causal(tier: str, n_fft: int) -> None:
    """All lengths of note and the extreme numbers of taps; gates, dtypes, batches and channels in turn."""
    turn = itertools.count(SIZES.index(n_fft))
    for length in lengths(n_fft):
        most = n_fft + 1 - length
        for taps in sorted({1, min(5, most), min(length, most), most}):
            i = next(turn)
            batch, channels = (1, 2, 3, 8)[i % 4], (1, 5, 16)[i % 3] if n_fft <= 1024 else 1 + i % 2
            check_forward(problem(
                length, taps, batch, channels, n_fft, dtype=DTYPES[i // 2 % 3], parts=PARTS[i % 8], scheme=("auto", "fft")[i % 2],
            ))  # fmt: skip


@every_tier
@pytest.mark.parametrize("mode", ("circular", "bidirectional"))
def test_other_modes(tier: str, mode: str) -> None:
    for i, n_fft in enumerate(SIZES):
        shapes = [(n_fft, taps) for taps in (1, 5, n_fft)]
        if mode == "bidirectional":
            shapes = [(length, n_fft) for length in (1, n_fft // 2 - 1, n_fft // 2)]
        for j, (length, taps) in enumerate(shapes):
            turn = i + j
            channels = (1, 5, 16)[turn % 3] if n_fft <= 1024 else 1
            check_forward(problem(
                length, taps, 1 + turn % 3, channels, n_fft, mode, dtype=DTYPES[turn % 3], parts=PARTS[turn % 8],
            ))  # fmt: skip


LARGE = [10240, 12288, 16384, 20480, 24576, 32768, 65536, 98304, 131072, 163840, 262144, 524288, 1 << 20]


@pytest.mark.parametrize("n_fft", [*LARGE, *([1 << 21, 3 << 20, 5 << 20, 1 << 22, 1 << 24] if ALL else [])])
def test_large(n_fft: int) -> None:
    """Half the transform's length of samples and of taps; few rows, so that threads share one transform."""
    tiers = [name for name in TIERS if name != "scalar"] or TIERS
    i = LARGE.index(n_fft) if n_fft in LARGE else 0
    p = problem(
        n_fft // 2,
        n_fft // 2 + 1,
        1,
        1 + (n_fft <= 65536),
        n_fft,
        dtype=DTYPES[i % 2],
        parts=PARTS[i % 8],
        scheme="fft",
    )
    for name in tiers[-1:] if n_fft > 1 << 18 else tiers:
        with isa.use(name):
            check_forward(replace_spec(p))
            torch.set_num_threads(2)
            check_forward(replace_spec(p))
            torch.set_num_threads(1)


def replace_spec(p: Problem) -> Problem:
    p.spec = None
    return p


@pytest.mark.parametrize("mode", ("circular", "bidirectional"))
@pytest.mark.parametrize("n_fft", [16384, 98304, 262144])
def test_large_other_modes(mode: str, n_fft: int) -> None:
    check_forward(problem(n_fft if mode == "circular" else n_fft // 2 - 3, n_fft, 1, 1, n_fft, mode, parts="abs"))


@every_tier
def test_many_channels(tier: str) -> None:
    for batch, channels, length in ((2, 111, 100), (1, 768, 64), (8, 111, 33)):
        check_forward(problem(length, length, batch, channels, parts="ab"))
        check_forward(problem(length, length, batch, channels, dtype=torch.bfloat16, parts="s"))


# ---- gradients --------------------------------------------------------------------------------------------------------


@every_tier
@pytest.mark.parametrize("n_fft", [*SIZES[::3], 4096])
def test_backward(tier: str, n_fft: int) -> None:
    turn = itertools.count(SIZES.index(n_fft))
    for length in lengths(n_fft):
        most = n_fft + 1 - length
        for taps in sorted({1, min(length, most), most}):
            i = next(turn)
            batch, channels = (1, 2, 3)[i % 3], (1, 5, 16)[i // 3 % 3] if n_fft <= 512 else 1
            p = problem(
                length,
                taps,
                batch,
                channels,
                n_fft,
                dtype=DTYPES[i // 2 % 3],
                parts=PARTS[i % 8],
                scheme=("auto", "fft")[i % 2],
            )
            check_backward(p, torch.randn(p.u.shape).to(p.u.dtype))


@every_tier
@pytest.mark.parametrize("mode", ("circular", "bidirectional"))
def test_backward_of_other_modes(tier: str, mode: str) -> None:
    for i, n_fft in enumerate((32, 40, 48, 64, 256, 320, 1024, 1536)):
        for j, share in enumerate((1, 2)):
            length = n_fft if mode == "circular" else n_fft // 2 - (share == 2)
            taps = n_fft // share if mode == "circular" else n_fft
            p = problem(
                length, taps, 1 + i % 3, 2, n_fft, mode, dtype=DTYPES[(i + j) % 3], parts=PARTS[(i + 3 * j) % 8]
            )
            check_backward(p, torch.randn(p.u.shape).to(p.u.dtype))


@pytest.mark.parametrize("n_fft", [16384, 65536, 262144])
def test_backward_large(n_fft: int) -> None:
    p = problem(n_fft // 2, n_fft // 2, 1, 1, n_fft, parts="abs", scheme="fft")
    gy = torch.randn_like(p.u)
    check_backward(p, gy)
    torch.set_num_threads(2)
    check_backward(p, gy)


def test_backward_meets_the_specification() -> None:
    """N = 4K, fp32: relative rms 2e-6 for each; the filter's gradient over 64 sequences too."""
    for batch in (2, 64):
        p = problem(2048, 2048, batch, 1, 4096, parts="abs", scheme="fft")
        gy = torch.randn_like(p.u)
        for grad, want in zip(p.backward(gy), fc.reference_backward(gy, *p.tensors), strict=True):
            assert relative(grad, want) < 2e-6


def test_backward_computes_what_the_mask_says() -> None:
    p = problem(50, 40, parts="abs")
    gy = torch.randn_like(p.u)
    whole = p.backward(gy)
    for mask in itertools.product((True, False), repeat=5):
        for want, full, grad in zip(mask, whole, p.backward(gy, list(mask)), strict=True):
            assert torch.equal(grad, full) if want else grad.shape == (0,)
