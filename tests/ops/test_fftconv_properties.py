"""What fftconv promises beyond being close: impulses, independence of rows and threads, range, symmetries."""

from __future__ import annotations

import itertools

import pytest
import torch

from effk import isa
from effk.ops import fftconv as fc
from fftconv_cases import EPS, SCHEMES, TIERS, Problem, check_forward, every_tier, problem, relative

ops = torch.ops.effk


@every_tier
@pytest.mark.parametrize("length", (30, 64, 100, 500, 2048))
def test_impulses(tier: str, length: int) -> None:
    """An impulse at s gives k from s on, and k = impulse at j delays by j; to 2 ulp (4 EPS) of the largest per level."""
    p = problem(length, length, 2, 3, scheme="fft")
    allowed = 4 * EPS * p.n_fft.bit_length()
    for s in {0, 1, length // 2, length - 1}:
        u = torch.zeros_like(p.u)
        u[..., s] = 1
        y = Problem(u, p.k, None, None, None, p.n_fft, scheme="fft").run()
        expected = torch.zeros_like(u)
        expected[..., s:] = p.k[:, : length - s]
        assert float((y - expected).abs().max()) <= allowed * float(p.k.abs().max())
        k = torch.zeros_like(p.k)
        k[:, s] = 1
        y = Problem(p.u, k, None, None, None, p.n_fft, scheme="fft").run()
        expected = torch.zeros_like(u)
        expected[..., s:] = p.u[..., : length - s]
        assert float((y - expected).abs().max()) <= allowed * float(p.u.abs().max())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_future_does_not_leak(scheme: str) -> None:
    """To the rounding of a transform: every output of it sees every input. Direct sums are causal exactly."""
    p = problem(1000, 60, 2, 2, scheme=scheme, parts="s")
    before = p.run()
    for t in (1, 500, 999):
        u = p.u.clone()
        u[..., t:] += 1
        after = Problem(u, p.k, None, None, p.skip, p.n_fft, scheme=scheme).run()
        change = float((after - before)[..., :t].abs().max())
        assert change <= (0 if scheme == "direct" else 1e-6 * float(before.abs().max()))
        assert not torch.equal(before[..., t:], after[..., t:])


@every_tier
@pytest.mark.parametrize(("scheme", "taps"), list(zip(SCHEMES, (100, 70, 9), strict=False)))
@pytest.mark.parametrize("parts", ("", "abs"))
def test_rows_and_threads_do_not_matter(tier: str, scheme: str, taps: int, parts: str) -> None:
    """Bit for bit: any rows alone, any number of threads, again."""
    p = problem(333, taps, 3, 5, parts=parts, scheme=scheme)
    y, gy = p.run(), torch.randn(3, 5, 333)
    grads = p.backward(gy)
    for b, h in ((slice(0, 1), slice(None)), (slice(1, 3), slice(2, 4)), (slice(None), slice(4, 5))):
        part = p.rows(b, h)
        assert torch.equal(part.run(), y[b, h])
        some = part.backward(gy[b, h].contiguous())
        assert all(torch.equal(some[i], grads[i][b, h]) for i in (0, 2, 3) if grads[i].numel())
        if b == slice(None):
            assert all(torch.equal(some[i], grads[i][h]) for i in (1, 4) if grads[i].numel())
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        assert torch.equal(p.run(), y)
        assert all(torch.equal(a, b) for a, b in zip(p.backward(gy), grads, strict=True))


@pytest.mark.parametrize("n_fft", (65536, 131072, 262144))
def test_threads_inside_one_transform_do_not_matter(n_fft: int) -> None:
    p = problem(n_fft // 2, n_fft // 2, 1, 1, n_fft, scheme="fft", parts="ab")
    gy = torch.randn_like(p.u)
    y, grads = p.run(), p.backward(gy)
    for threads in (2, 3, 7):
        torch.set_num_threads(threads)
        assert torch.equal(p.run(), y)
        assert all(torch.equal(a, b) for a, b in zip(p.backward(gy), grads, strict=True))


def test_a_spectrum_serves_every_tier() -> None:
    p = problem(500, 500, 1, 3)
    specs = {}
    for name in TIERS:
        with isa.use(name):
            specs[name] = ops.fftconv_prepare(p.k, p.n_fft, p.mode, p.scheme)
    for maker, user in itertools.product(TIERS, TIERS):
        with isa.use(user):
            p.spec = specs[maker]
            check_forward(p)


def test_linearity() -> None:
    p, q = problem(700, 700, seed=1), problem(700, 700, seed=2)
    both = Problem(2 * p.u - 3 * q.u, p.k, None, None, None, p.n_fft).run()
    apart = 2 * p.run().double() - 3 * Problem(q.u, p.k, None, None, None, p.n_fft).run().double()
    assert relative(both, apart) < 3e-6
    assert torch.equal(Problem(4 * p.u, p.k, None, None, None, p.n_fft).run(), 4 * p.run())  # powers of two are exact


def test_bidirectional_is_two_causal_passes() -> None:
    p = problem(100, 256, mode="bidirectional")
    ahead = fc.fftconv(p.u, p.k[:, :128])
    behind = p.k[:, 128:].flip(1)  # lags -1, -2, ...
    back = fc.fftconv(p.u.flip(2), torch.nn.functional.pad(behind, (1, 0))).flip(2)
    assert relative(p.run(), (ahead + back).double()) < 2e-6


def test_circular_is_causal_folded() -> None:
    p = problem(96, 96, mode="circular")
    long = fc.reference(torch.nn.functional.pad(p.u, (0, 96)), p.k)
    assert relative(p.run(), long[..., :96] + long[..., 96:]) < 1e-6


@every_tier
@pytest.mark.parametrize("scheme", SCHEMES)
def test_dynamic_range_does_not_leak(tier: str, scheme: str) -> None:
    """Rows of 1e6 and 1e-6 side by side, in the batch and in the channels: each accurate relative to itself."""
    for batch, channels in ((2, 1), (2, 4), (3, 3), (1, 4)):
        p = problem(200, 60, batch, channels, parts="s", scheme=scheme)
        scale = 10.0 ** (6 - 12 * (torch.arange(batch * channels) % 2)).view(batch, channels, 1)
        p.u = p.u * scale
        expected, y = fc.reference(*p.tensors), p.run()
        rows = (y.double() - expected).norm(dim=-1) / expected.norm(dim=-1)
        assert float(rows.max()) < 1e-6
        gy = torch.randn_like(p.u) * scale.flip(0)
        gu = p.backward(gy)[0].double()
        wanted = fc.reference_backward(gy, *p.tensors)[0]
        assert float(((gu - wanted).norm(dim=-1) / wanted.norm(dim=-1)).max()) < 1e-6
    p = problem(200, 60, 2, 4, scheme=scheme)
    p.k = p.k * 10.0 ** torch.tensor([6.0, -6.0, 0.0, -12.0])[:, None]
    rows = (p.run().double() - fc.reference(*p.tensors)).norm(dim=-1) / fc.reference(*p.tensors).norm(dim=-1)
    assert float(rows.max()) < 1e-6


@every_tier
@pytest.mark.parametrize("value", (float("nan"), float("inf")))
@pytest.mark.parametrize("scheme", SCHEMES)
def test_nan_stays_in_its_row(tier: str, scheme: str, value: float) -> None:
    p = problem(100, 20, 3, 4, scheme=scheme)
    gy = torch.randn_like(p.u)
    clean, grads = p.run(), p.backward(gy)
    p.u[1, 2, 50] = value
    y, spoilt = p.run(), p.backward(gy)
    touched = torch.zeros(3, 4, dtype=torch.bool)
    touched[1, 2] = True
    assert torch.equal(y[~touched], clean[~touched])
    assert not y[1, 2, 50:].isfinite().all()
    assert torch.equal(spoilt[0], grads[0])  # gu does not depend on u
    assert torch.equal(spoilt[1][[0, 1, 3]], grads[1][[0, 1, 3]]) and not spoilt[1][2].isfinite().all()


def test_extreme_magnitudes() -> None:
    """Subnormal inputs do no harm, and values whose products fit into fp32 do not overflow on the way."""
    p = problem(100, 100)
    for scale in (1e-30, 1e30):
        q = Problem(p.u * scale, p.k, None, None, None, p.n_fft)
        assert relative(q.run() / scale, fc.reference(*p.tensors)) < 1e-6
    tiny = Problem(p.u * 1e-42, p.k, None, None, None, p.n_fft).run()
    assert tiny.isfinite().all() and float(tiny.abs().max()) < 1e-40


def test_empty_batches() -> None:
    k = torch.randn(3, 10)
    for shape in ((0, 3, 20), (0, 3, 1), (2, 3, 0)):
        assert fc.fftconv(torch.zeros(shape), k).shape == shape
