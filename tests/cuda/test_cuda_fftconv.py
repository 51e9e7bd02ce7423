"""The CUDA kernels of fftconv and their binding against the float64 reference: on a GPU, and emulated on the CPU.

Both backends run the same tests; the emulated one is ``torch.ops.effk_emu`` in three orders of threads. Errors are
relative to the root mean square of the exact result, of every row for itself: with absolute tolerances an all-zero output
would pass. EFFK_TEST_ALL=1 runs every size, mode and type.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import cuda_backend
from cuda_backend import ORDERS, offered
from effk.ops import fftconv

ALL = os.environ.get("EFFK_TEST_ALL") == "1"
F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
DTYPES = (F16, BF16, F32)
# fp16 and bf16 rows are transformed in fp16 with fp32 sums: about 2^-12 a rounding, eight of them in a convolution, and one
# rounding of the result. fp32: 2^-24, and a few more roundings. Each with a factor of about three.
BOUND = {F16: 2e-3, BF16: 6e-3, F32: 1e-6}
SINGLE_KERNEL = [256, 512, 1024, 2048, 4096, 8192, 16384, 32768]  # complex points


class Backend(cuda_backend.Backend):
    def prepare(self, k: Tensor, n_fft: int, mode: str = "causal", scheme: str = "auto") -> Tensor:
        return self.ops.fftconv_prepare(k.to(self.device), n_fft, mode, scheme)

    def __call__(self, case: Case, scheme: str = "auto") -> Tensor:
        spec = self.prepare(case.k, case.n_fft, case.mode)
        u, pregate, postgate, skip = self.move(case.u, case.pregate, case.postgate, case.skip)
        return self.ops.fftconv(u, spec, pregate, postgate, skip, case.n_fft, case.mode, scheme).cpu()

    def backward(self, case: Case, gy: Tensor, mask: list[bool] | None = None) -> list[Tensor]:
        spec = self.prepare(case.k, case.n_fft, case.mode)
        gy, u, pregate, postgate, skip = self.move(gy, case.u, case.pregate, case.postgate, case.skip)
        mask = mask or [True, True, pregate is not None, postgate is not None, skip is not None]
        taps = case.k.shape[1]
        grads = self.ops.fftconv_backward(
            gy, u, spec, pregate, postgate, skip, case.n_fft, taps, case.mode, "auto", mask
        )
        return [g.cpu() for g in grads]


class Case:
    """Random tensors of one call."""

    def __init__(
        self,
        shape: tuple[int, int, int],
        taps: int,
        n_fft: int,
        mode: str = "causal",
        dtype: torch.dtype = F16,
        gates: str = "",
        seed: int = 0,
    ) -> None:
        g = torch.Generator().manual_seed(seed)

        def rows(wanted: bool = True) -> Tensor | None:
            return torch.randn(shape, generator=g).to(dtype) if wanted else None

        self.u = rows()
        self.k = torch.randn(shape[1], taps, generator=g)
        self.pregate, self.postgate = rows("pre" in gates), rows("post" in gates)
        self.skip = torch.randn(shape[1], generator=g) if "skip" in gates else None
        self.n_fft, self.mode = n_fft, mode
        self.text = f"{shape} K {taps} n_fft {n_fft} {mode} {dtype} {gates}"

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.u, self.k, self.pregate, self.postgate, self.skip

    def check(self, y: Tensor) -> None:
        assert y.dtype == self.u.dtype
        expected = fftconv.reference(*self.tensors, mode=self.mode)
        close(y, expected, BOUND[self.u.dtype], self.text)


def close(got: Tensor, expected: Tensor, bound: float, text: str) -> None:
    """Every row, for itself: rms error below ``bound`` times its rms, largest error below four times that of its largest."""
    got, expected = got.double().reshape(-1, got.shape[-1]), expected.reshape(-1, got.shape[-1])
    assert torch.isfinite(got).all(), text
    error = got - expected
    scale = expected.pow(2).mean(-1).sqrt()
    rms = (error.pow(2).mean(-1).sqrt() / scale).max().item()
    assert rms <= bound, f"{text}: rms {rms:.2e}, at most {bound}"
    largest = (error.abs().amax(-1) / expected.abs().amax(-1)).max().item()
    assert largest <= 4 * bound, f"{text}: largest {largest:.2e}, at most {4 * bound}"


@pytest.fixture(params=ORDERS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Backend]:
    yield from offered(request.param, monkeypatch, Backend)


def sizes_of(mode: str, points: int) -> tuple[int, int, int]:
    """L, K, n_fft of the fullest problem of a transform."""
    if mode == "circular":
        return points, points, points
    return (points, points, 2 * points) if mode == "causal" else (points, 2 * points, 2 * points)


@pytest.mark.parametrize("points", SINGLE_KERNEL)
def test_one_kernel(backend: Backend, points: int) -> None:
    """Every fused kernel at its full length; all modes and types where that is quick."""
    modes = fftconv.MODES if points <= 4096 or ALL else (fftconv.MODES[SINGLE_KERNEL.index(points) % 3],)
    for i, mode in enumerate(modes):
        for dtype in DTYPES if points <= 1024 or ALL else (DTYPES[(i + SINGLE_KERNEL.index(points)) % 2],):
            length, taps, n_fft = sizes_of(mode, points)
            case = Case(
                (3 if points <= 512 else 1, 2 if points <= 4096 else 1, length),
                taps,
                n_fft,
                mode,
                dtype,
                "pre post skip",
            )
            case.check(backend(case))


@pytest.mark.parametrize("points", [65536, 131072, 1 << 19, 1 << 20, 1 << 21] if ALL else [65536])
def test_three_kernels(backend: Backend, points: int) -> None:
    case = Case((1, 1, points - 5), 300, 2 * points, gates="pre post skip", dtype=BF16)
    case.check(backend(case))
    if ALL:
        case = Case((2, 1, points + 1000), points - 2000, 2 * points, gates="post")
        case.check(backend(case))


@pytest.mark.parametrize("points", [256, 1 << 14, 1 << 15, 1 << 16, 1 << 21])
def test_fp32(backend: Backend, points: int) -> None:
    """Butterflies in fp32, every factor among them."""
    if points > 1 << 16 and not ALL:
        pytest.skip("EFFK_TEST_ALL=1")
    case = Case((1, 1, points - 1), 1000 if points > 1000 else 100, 2 * points, dtype=F32, gates="pre skip")
    case.check(backend(case))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lengths_and_gates(backend: Backend, dtype: torch.dtype) -> None:
    """Any L, K, B and H, rows longer than half the transform, sizes that are no powers of two, each gate for itself."""
    shapes = [
        ((1, 2, 300), 5, 512, "causal"),
        ((3, 2, 1000), 25, 1024, "causal"),
        ((5, 1, 17), 3, 32, "causal"),
        ((1, 1, 1), 1, 32, "causal"),
        ((2, 3, 2), 700, 1024, "causal"),
        ((2, 2, 511), 2, 512, "causal"),
        ((33, 1, 128), 100, 256, "causal"),
        ((2, 2, 96), 96, 96, "circular"),
        ((3, 1, 160), 7, 160, "circular"),
        ((2, 1, 1536), 1536, 1536, "circular"),
        ((2, 1, 160), 320, 320, "bidirectional"),
        ((1, 2, 700), 1536, 1536, "bidirectional"),
        ((2, 1, 3000), 1000, 5120, "causal"),
        ((1, 1, 16385), 100, 32768, "causal"),
    ]
    for seed, (shape, taps, n_fft, mode) in enumerate(shapes):
        gates = ("", "pre", "post", "pre post skip", "skip")[(seed + DTYPES.index(dtype)) % 5]
        case = Case(shape, taps, n_fft, mode, dtype, gates, seed)
        case.check(backend(case))


def test_impulses(backend: Backend) -> None:
    """An impulse shifts the filter, and the filter 1 returns the row: to the rounding of its type."""
    for dtype in DTYPES:
        u = torch.zeros(1, 1, 600)
        u[..., 100] = 1.0
        case = Case((1, 1, 600), 600, 2048, dtype=dtype)
        case.u = u.to(dtype)
        y = backend(case)
        assert torch.allclose(
            y[0, 0, :100].float(), torch.zeros(100), atol=4 * BOUND[dtype] * case.k.abs().max().item()
        )
        case.check(y)
        case = Case((1, 1, 600), 1, 1024, dtype=dtype)
        case.k = torch.ones(1, 1)
        case.check(backend(case))


def test_rows_of_any_size(backend: Backend) -> None:
    """Rows 2^80 apart (2^14 for fp16), tiny and huge filters: each row is as exact as if it were alone."""
    for dtype, far in ((F16, 2.0**7), (BF16, 2.0**40), (F32, 2.0**40)):
        for points in (256, 4096, 65536):
            if points == 65536 and dtype == F16:
                continue
            case = Case((4, 2, points), 50, 2 * points, dtype=dtype)
            scales = torch.tensor([far, 1 / far, 1.0, 0.0])[:, None, None]
            case.u = (case.u.float() * scales).to(dtype)
            case.k *= torch.tensor([[4.0], [0.25]]) if dtype == F16 else torch.tensor([[2.0**30], [2.0**-30]])
            if points > 4096:
                case.u, case.k = case.u[:, :1].contiguous(), case.k[:1]
            y, expected = backend(case), fftconv.reference(*case.tensors)
            assert torch.equal(y[3], torch.zeros_like(y[3]))
            rows = [0, 2] if dtype == F16 else [0, 1, 2]  # 2^-7 is where a result of fp16 begins to lose bits
            close(y[rows], expected[rows], BOUND[dtype], f"{dtype} {points}")


def test_rows_and_calls_do_not_matter(backend: Backend) -> None:
    """The bits of a row depend on no other row, also where rows share a block; nor on the call."""
    for length, dtype in ((200, F16), (512, BF16), (3000, F16), (200, F32)):
        case = Case((5, 2, length), 64, 4096 if length > 1000 else 1024, dtype=dtype, gates="pre post skip")
        whole = backend(case)
        assert torch.equal(whole, backend(case))
        case.u[0] = float("nan")
        case.u[1] *= 100
        spoilt = backend(case)
        assert torch.isnan(spoilt[0]).all()
        assert torch.equal(spoilt[2:], whole[2:])
        for name in ("u", "pregate", "postgate"):
            setattr(case, name, getattr(case, name)[4:].contiguous())
        assert torch.equal(backend(case), whole[4:])


def test_off_alignment(backend: Backend) -> None:
    case = Case((2, 2, 256), 30, 512, gates="pre post")
    y = backend(case)
    spec = backend.prepare(case.k, 512)

    def shifted(t: Tensor) -> Tensor:
        room = torch.empty(t.numel() + 1, dtype=t.dtype, device=backend.device)
        return room[1:].view(t.shape).copy_(t)

    u, pregate, postgate = (shifted(t) for t in (case.u, case.pregate, case.postgate))
    assert torch.equal(backend.ops.fftconv(u, spec, pregate, postgate, None, 512, "causal", "fft").cpu(), y)


BACKWARD = [
    ((3, 2, 100), 100, 256, "causal", "pre post skip"),
    ((5, 3, 300), 40, 512, "causal", "skip"),
    ((2, 1, 1000), 25, 1024, "causal", "pre"),
    ((2, 2, 192), 192, 192, "circular", "post"),
    ((2, 2, 256), 200, 256, "circular", "pre post skip"),
    ((3, 1, 333), 1024, 1024, "bidirectional", "pre post skip"),
    ((2, 1, 640), 1280, 1280, "bidirectional", ""),
    ((3, 2, 2048), 2048, 4096, "causal", "pre post skip"),
    ((1, 1, 8192), 300, 16384, "causal", "pre post"),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backward(backend: Backend, dtype: torch.dtype) -> None:
    for seed, (shape, taps, n_fft, mode, gates) in enumerate(BACKWARD):
        case = Case(shape, taps, n_fft, mode, dtype, gates, seed)
        gy = torch.randn(shape, generator=torch.Generator().manual_seed(99)).to(dtype)
        expected = fftconv.reference_backward(gy, *case.tensors, mode=mode)
        for name, got, want in zip(
            ("u", "k", "pregate", "postgate", "skip"), backend.backward(case, gy), expected, strict=True
        ):
            if want is None:
                assert got.numel() == 0
            elif name == "skip":  # fp32 sums of products of both signs: 2^-24 of the sum of magnitudes, a few times
                v = case.u.double() * (1 if case.pregate is None else case.pregate.double())
                g = gy.double() * (1 if case.postgate is None else case.postgate.double())
                assert ((got.double() - want).abs() <= 1e-6 * (g * v).abs().sum((0, 2))).all()
            else:
                assert got.shape == want.shape
                # k: rows of fp16 and bf16 are transformed alike, and nothing is rounded to their type
                close(got, want, BOUND[F16] if name == "k" and dtype == BF16 else BOUND[dtype], f"{case.text} {name}")


@pytest.mark.parametrize("dtype", [F16, F32] if ALL else [F16], ids=str)
def test_backward_of_three_kernels(backend: Backend, dtype: torch.dtype) -> None:
    points = 65536
    case = Case((2, 1, points - 9), 200, 2 * points, gates="pre skip", dtype=dtype)
    gy = torch.randn(case.u.shape, generator=torch.Generator().manual_seed(99)).to(dtype)
    gu, gk, *_ = backend.backward(case, gy, [True, True, False, False, False])
    expected = fftconv.reference_backward(gy, *case.tensors)
    close(gu, expected[0], BOUND[dtype], case.text)
    close(gk, expected[1], BOUND[dtype], case.text)


def test_mask_and_empty(backend: Backend) -> None:
    case = Case((2, 2, 64), 20, 128, gates="pre post skip")
    whole = backend.backward(case, case.u)
    for i in range(5):
        alone = backend.backward(case, case.u, [j == i for j in range(5)])
        assert torch.equal(alone[i], whole[i])
        assert all(g.numel() == 0 for j, g in enumerate(alone) if j != i)
    none = Case((0, 2, 64), 20, 128)
    assert backend(none).shape == (0, 2, 64)
    gk = backend.backward(none, none.u, [False, True, False, False, False])[1]
    assert torch.equal(gk, torch.zeros(2, 20))


def test_errors(backend: Backend) -> None:
    ops, home = backend.ops, backend.device
    k, u = torch.randn(2, 20, device=home), torch.randn(1, 2, 64, device=home).half()
    spec = ops.fftconv_prepare(k, 128, "causal", "auto")

    def refused(message: str, u: Tensor = u, spec: Tensor = spec, gate: Tensor | None = None, n_fft: int = 128, mode: str = "causal",
                scheme: str = "auto") -> None:  # fmt: skip
        with pytest.raises(RuntimeError, match=message):
            ops.fftconv(u, spec, gate, None, None, n_fft, mode, scheme)

    refused("fftconv: spec: expected one prepared on CUDA for H = 2, n_fft = 256", n_fft=256)
    refused("fftconv: spec: expected one prepared on CUDA .*mode 'bidirectional'", mode="bidirectional")
    refused("fftconv: spec: expected one prepared on CUDA .*scheme 'direct'", scheme="direct")
    refused("fftconv: spec: expected one prepared on CUDA for H = 1", u=u[:, :1].contiguous())
    refused("fftconv: spec: expected what fftconv_prepare returns", spec=spec.double())
    refused("fftconv: spec: expected what fftconv_prepare returned, got a view", spec=torch.cat([spec[:1], spec])[1:])
    refused("fftconv: n_fft: expected L = 64 in mode 'circular'", mode="circular")
    refused("fftconv: n_fft: expected at least L", u=torch.randn(1, 2, 130, device=home).half())
    refused("fftconv: n_fft: expected 2\\^a", n_fft=7)
    refused("fftconv: mode: expected", mode="same")
    refused("fftconv: scheme: expected", scheme="fast")
    refused("fftconv: pregate: expected float16", gate=u.float())
    refused("fftconv: u: expected", u=u[0])
    refused("fftconv: u: expected", u=u.double())
    with pytest.raises(RuntimeError, match="fftconv_prepare: k: expected"):
        ops.fftconv_prepare(k.half(), 128, "causal", "auto")
    with pytest.raises(RuntimeError, match="fftconv_prepare: k: expected n_fft = 128 taps in mode 'bidirectional'"):
        ops.fftconv_prepare(k, 128, "bidirectional", "auto")
    with pytest.raises(RuntimeError, match="fftconv_backward: mask: expected no gradient of pregate"):
        ops.fftconv_backward(u, u, spec, None, None, None, 128, 20, "causal", "auto", [True, True, True, False, False])


def test_spectra_of_the_other_device(backend: Backend) -> None:
    """The CPU reads the header; CUDA, which would have to wait for it, knows its own by their size."""
    k, u = torch.randn(2, 20), torch.randn(1, 2, 64)
    theirs = torch.ops.effk.fftconv_prepare(k, 128, "causal", "fft")
    with pytest.raises(RuntimeError, match="fftconv: spec: expected one prepared on CUDA"):
        backend.ops.fftconv(*backend.move(u, theirs), None, None, None, 128, "causal", "auto")
    with pytest.raises(RuntimeError, match="fftconv: spec: expected .* prepared on cpu"):
        torch.ops.effk.fftconv(u, backend.prepare(k, 128).cpu(), None, None, None, 128, "causal", "auto")


def test_what_cannot_be_checked_is_nan(backend: Backend) -> None:
    """A spectrum of the right size and the wrong contents, or of more taps than there is room for."""
    u = torch.randn(1, 2, 64, device=backend.device)
    for dtype in DTYPES:
        x = u.to(dtype)
        spec = backend.prepare(torch.randn(2, 66), 128)  # L + K - 1 = 129
        assert torch.isnan(backend.ops.fftconv(x, spec, None, None, None, 128, "causal", "auto")).all()
        spec = torch.zeros_like(spec)
        assert torch.isnan(backend.ops.fftconv(x, spec, None, None, None, 128, "causal", "auto")).all()
    spec = backend.prepare(torch.randn(2, 20), 128)
    grads = backend.ops.fftconv_backward(
        u, u, spec, None, None, None, 128, 21, "causal", "auto", [False, True, False, False, False]
    )
    assert torch.isnan(grads[1]).all()


def test_decoding_is_not_there_yet(backend: Backend) -> None:
    k, x = torch.randn(2, 8, device=backend.device), torch.randn(1, 2, device=backend.device)
    buffer = torch.zeros(1, 2, 16, device=backend.device)
    with pytest.raises(
        RuntimeError, match="fftconv_decode_prepare: k: expected a tensor on cpu, because .* not on CUDA yet"
    ):
        backend.ops.fftconv_decode_prepare(k, 128)
    with pytest.raises(
        RuntimeError, match="fftconv_decode_step: x_t: expected a tensor on cpu, because .* not on CUDA yet"
    ):
        backend.ops.fftconv_decode_step(x, buffer, buffer.clone(), k, [], 0)
