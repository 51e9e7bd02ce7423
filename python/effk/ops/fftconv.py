"""``torch.ops.effk.fftconv``: depthwise convolution with filters as long as the sequence, gates and skip in one pass.

Formula, for rows ``u[b, h, :]`` and filters ``k[h, :]``::

    v = u * pregate                                 each of pregate, postgate and skip optional
    y = (c + skip[h] * v) * postgate                c is v convolved with k:

    causal         c[t] = sum_{j=0}^{K-1} k[j] v[t-j]                   n_fft >= L + K - 1
    circular       c[t] = sum_{j=0}^{K-1} k[j] v[(t-j) mod L]           n_fft  = L >= K
    bidirectional  c[t] = sum_{j=-K/2}^{K/2-1} k[j mod K] v[t-j]        n_fft  = K >= 2 L

with v = 0 outside 0 .. L-1 except in the circular mode. ``k[0]`` multiplies the current sample (``nn.Conv1d`` stores
its taps the other way round); the bidirectional mode keeps the tap of lag -j at position K - j.

Operations (library ``effk``):

    fftconv_prepare(k, n_fft, mode, scheme) -> spec                         once per filter
    fftconv(u, spec, pregate, postgate, skip, n_fft, mode, scheme) -> y
    fftconv_backward(gy, u, spec, pregate, postgate, skip, n_fft, k_len, mode, scheme, mask)
        -> (gu, gk, gpre, gpost, gskip)
    fftconv_decode_prepare(k, tile) -> spec                                 lags 0 .. 2 tile - 1, tile = 128 * 2**i
    fftconv_decode_step(x_t, xbuf, ybuf, k, specs, t) -> y_t                writes xbuf, ybuf

Shapes and dtypes: u, pregate, postgate, y ``(B, H, L)`` of one dtype, fp32, bf16 or fp16, dense; any L >= 1. k
``(H, K)`` fp32, skip ``(H,)`` fp32. spec: an opaque fp32 buffer that names the n_fft, mode and scheme it was made for,
shared by any number of calls. n_fft: ``2**a``, ``3 * 2**a`` or ``5 * 2**a``, 32 to ``2**24``. Arithmetic is fp32
whatever the dtype. mask: which of u, k, pregate, postgate, skip need a gradient; the others come back empty. gk and
gskip are fp32, the rest as u. decode: x_t, y_t ``(B, H)``, xbuf, ybuf ``(B, H, T)``, all fp32; ybuf starts as zero, or
as the prompt's contribution to each position; ``specs[i]`` has tile ``128 * 2**i``.

``scheme``: "fft", one transform per row; "overlap_save", blocks, for filters much shorter than the sequence; "direct",
for a few dozen taps (these two causal only); "auto" chooses by K and n_fft. The call must name the scheme of its spec,
or "auto".

Errors: RuntimeError naming the operation, the argument, what was expected and what came, before any work.

A row of the result depends on neither the other rows nor the number of threads; NaN or infinity spoils its own row
only, but all of that row: also positions before it, because every output of a transform sees every input. For the same
reason causality holds to rounding, not exactly, unless the scheme is direct. Second derivatives raise. Under autocast
u and the gates are cast. Nothing depends on whether a module is in training mode.

Source: FlashFFTConv (Fu, Kumbong, Nguyen, Ré, 2023, arXiv:2311.05908): the decomposition of section 3.1 and the fusion
of padding, gates, spectral product and crop. :mod:`effk.ops.monarch` is that decomposition in plain torch. Decoding:
relaxed convolution as in Flash Inference (Oncescu et al., 2024, arXiv:2410.12982) and FutureFill (Agarwal et al.,
2024, arXiv:2410.03766).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from effk import _C

from . import autocast

MODES = ("causal", "circular", "bidirectional")
SCHEMES = ("auto", "fft", "overlap_save", "direct")
MIN_FFT, MAX_FFT = 32, 1 << 24
FIRST_FFT_TILE = 128  # decoding: smaller tiles are direct sums, and need no spectrum
SMALLEST_TRANSFORM = 256  # complex points, on the CPU


def smallest_size(n: int) -> int:
    """The smallest legal FFT size that is at least ``n``: ``2**a``, ``3 * 2**a`` or ``5 * 2**a`` from 32 up."""
    if n > MAX_FFT:
        raise ValueError(f"fftconv: n_fft: expected at most {MAX_FFT}, got a problem that needs {n}")
    power = 1 << (max(n, MIN_FFT) - 1).bit_length()
    return min(size for size in (power, power // 4 * 3, power // 8 * 5) if size >= max(n, MIN_FFT))


def default_n_fft(length: int, taps: int, mode: str = "causal") -> int:
    """The smallest legal ``n_fft`` for rows of ``length`` and filters of ``taps``."""
    if mode == "causal":
        return smallest_size(length + taps - 1)
    return length if mode == "circular" else taps


def as_filter(k: Tensor) -> Tensor:
    """``k`` as the operations take it: ``(H, K)``, fp64 rounded to fp32, dense; ``(1, H, K)`` is accepted too."""
    if k.dim() == 3 and k.shape[0] == 1:
        k = k[0]
    return (k.float() if k.dtype == torch.float64 else k).contiguous()


def fftconv(
    u: Tensor,
    k: Tensor,
    pregate: Tensor | None = None,
    postgate: Tensor | None = None,
    skip: Tensor | None = None,
    n_fft: int | None = None,
    mode: str = "causal",
    scheme: str = "auto",
) -> Tensor:
    """Prepare ``k`` and convolve; differentiable with respect to u, k, both gates and skip.

    Preparing costs about as much as one row per filter; :class:`effk.nn.FFTConv` keeps spectra of constant filters.

    Args:
        u: ``(B, H, L)``, fp32, bf16 or fp16.
        k: ``(H, K)`` or ``(1, H, K)``, fp32 or fp64.
        pregate, postgate: as u.
        skip: ``(H,)``, fp32.
        n_fft: FFT size; None for the smallest legal one, causal taps beyond L, which meet no sample, left out.

    Returns:
        ``(B, H, L)``, dtype of u.
    """
    k = as_filter(k)
    u, pregate, postgate = _rows(u, pregate, postgate)
    if n_fft is None:
        if mode == "causal" and u.dim() and k.shape[-1] > u.shape[-1] > 0:
            k = k[..., : u.shape[-1]].contiguous()
        n_fft = default_n_fft(u.shape[-1] if u.dim() else 1, k.shape[-1], mode)
    spec = torch.ops.effk.fftconv_prepare(k.detach(), n_fft, mode, scheme)
    if torch.is_grad_enabled() and k.requires_grad:
        if (
            torch.compiler.is_compiling()
        ):  # which refuses an autograd.Function that gets one tensor twice: y = u * conv(u)
            pregate, postgate = (None if gate is None else gate.view_as(gate) for gate in (pregate, postgate))
        return _FFTConv.apply(u, k, spec, pregate, postgate, skip, n_fft, mode, scheme)
    return torch.ops.effk.fftconv(u, spec, pregate, postgate, skip, n_fft, mode, scheme)


def plan(length: int, taps: int, n_fft: int | None = None, mode: str = "causal", scheme: str = "auto") -> str:
    """What a call on CPU rows of ``length`` with filters of ``taps`` does: scheme, transform, factors, blocks."""
    size = default_n_fft(length, taps, mode) if n_fft is None else n_fft
    return _C.fftconv_plan(size, taps, mode, scheme)


def _rows(u: Tensor, pregate: Tensor | None, postgate: Tensor | None) -> list[Tensor | None]:
    """Dense, and under autocast cast: an autograd.Function is not reached by the dispatcher's autocast."""
    dtype = None
    if torch.is_autocast_enabled(u.device.type):
        dtype = torch.get_autocast_dtype(u.device.type)
    return [
        None if t is None else (t if dtype is None else autocast.to(t, dtype)).contiguous()
        for t in (u, pregate, postgate)
    ]


# ---- float64 reference ---------------------------------------------------------------------------


def reference(
    u: Tensor,
    k: Tensor,
    pregate: Tensor | None = None,
    postgate: Tensor | None = None,
    skip: Tensor | None = None,
    mode: str = "causal",
    method: str | None = None,
) -> Tensor:
    """The formulas of this module in float64, independent of the kernels.

    Args:
        method: "direct" (a dense matrix per channel: small problems) or "fft"; None chooses.

    Returns:
        float64 ``(B, H, L)``.
    """
    v, k = _gated(u, pregate), k.double()
    y = _convolve(v, k, mode, method)
    if skip is not None:
        y = y + skip.double()[:, None] * v
    return y if postgate is None else y * postgate.double()


def reference_backward(
    gy: Tensor,
    u: Tensor,
    k: Tensor,
    pregate: Tensor | None = None,
    postgate: Tensor | None = None,
    skip: Tensor | None = None,
    mode: str = "causal",
    method: str | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of u, k, pregate, postgate and skip, float64; None for what is not there. With g = postgate gy::

    gv = corr(g, k) + skip g          gu = pregate gv      gpre = u gv
    gk = sum_b corr(g, v)[:K]         gpost = gy (c + skip v)      gskip = sum_{b,t} g v
    """
    v, k, gy = _gated(u, pregate), k.double(), gy.double()
    g = gy if postgate is None else gy * postgate.double()
    gv, gk = _correlate(g, v, k, mode, method)
    through = torch.zeros((), dtype=torch.float64) if skip is None else skip.double()[:, None]
    gv = gv + through * g
    return (
        gv if pregate is None else pregate.double() * gv,
        gk,
        None if pregate is None else u.double() * gv,
        None if postgate is None else gy * (_convolve(v, k, mode, method) + through * v),
        None if skip is None else (g * v).sum(dim=(0, 2)),
    )


def _gated(u: Tensor, gate: Tensor | None) -> Tensor:
    return u.double() if gate is None else u.double() * gate.double()


def _taps_of_lags(length: int, taps: int, mode: str) -> tuple[Tensor, Tensor]:
    """For output t and input s, ``[L, L]``: which tap joins them, and whether one does."""
    lag = torch.arange(length)[:, None] - torch.arange(length)[None, :]
    if mode == "causal":
        there = (lag >= 0) & (lag < taps)
    elif mode == "circular":
        lag = lag % length
        there = lag < taps
    else:
        there = (lag >= -(taps // 2)) & (lag < taps // 2)
        lag = lag % taps
    return torch.where(there, lag, 0), there


def _period(length: int, taps: int, mode: str) -> int:
    if mode == "causal":
        return 1 << (length + taps - 2).bit_length()  # nothing wraps: any size that is long enough
    return length if mode == "circular" else taps


def _direct(length: int, channels: int, method: str | None) -> bool:
    return method == "direct" or (method is None and length <= 64 and channels * length * length <= 1 << 18)


def _convolve(v: Tensor, k: Tensor, mode: str, method: str | None) -> Tensor:
    (channels, taps), length = k.shape, v.shape[-1]
    if _direct(length, channels, method):
        tap, there = _taps_of_lags(length, taps, mode)
        return torch.einsum("hts,bhs->bht", k[:, tap] * there, v)
    period = _period(length, taps, mode)
    return torch.fft.irfft(torch.fft.rfft(v, period) * torch.fft.rfft(k, period), period)[..., :length]


def _correlate(g: Tensor, v: Tensor, k: Tensor, mode: str, method: str | None) -> tuple[Tensor, Tensor]:
    """The two adjoints of :func:`_convolve` at (v, k), applied to g."""
    (channels, taps), length = k.shape, v.shape[-1]
    if _direct(length, channels, method):
        tap, there = _taps_of_lags(length, taps, mode)
        gv = torch.einsum("hts,bht->bhs", k[:, tap] * there, g)
        pairs = torch.einsum("bht,bhs->hts", g, v) * there
        return gv, torch.zeros_like(k).index_add_(1, tap.flatten(), pairs.flatten(1))
    period = _period(length, taps, mode)
    spectrum, conj = torch.fft.rfft(g, period), torch.conj
    gv = torch.fft.irfft(spectrum * conj(torch.fft.rfft(k, period)), period)[..., :length]
    gk = torch.fft.irfft((spectrum * conj(torch.fft.rfft(v, period))).sum(0), period)[..., :taps]
    return gv, gk


# ---- shapes, for torch.compile and export --------------------------------------------------------


def _size_from_library(name: str, device: torch.device, *arguments: Any) -> Any:
    """How long a spectrum is: the library knows for the CPU; elsewhere, or for symbolic shapes, the run will tell."""
    if device.type in ("cpu", "meta") and all(isinstance(a, int | str) for a in arguments):
        return getattr(_C, name)(*arguments)
    return torch.library.get_ctx().new_dynamic_size()


@torch.library.register_fake("effk::fftconv_prepare")
def _(k, n_fft, mode, scheme):
    torch._check(k.dim() == 2, lambda: f"fftconv_prepare: k: expected (H, K), got {list(k.shape)}")
    return k.new_empty((_size_from_library("fftconv_spec_floats", k.device, *k.shape, n_fft, mode, scheme),))


def _check_rows(op: str, u: Tensor, **others: Tensor | None) -> None:
    torch._check(u.dim() == 3, lambda: f"{op}: u: expected (B, H, L), got {list(u.shape)}")
    for name, t in others.items():
        if t is not None:
            torch._check(
                t.shape == u.shape and t.dtype == u.dtype,
                lambda t=t, name=name: (
                    f"{op}: {name}: expected {u.dtype} {list(u.shape)} as u, got {t.dtype} {list(t.shape)}"
                ),
            )


@torch.library.register_fake("effk::fftconv")
def _(u, spec, pregate, postgate, skip, n_fft, mode, scheme):
    _check_rows("fftconv", u, pregate=pregate, postgate=postgate)
    return u.new_empty(u.shape)


@torch.library.register_fake("effk::fftconv_backward")
def _(gy, u, spec, pregate, postgate, skip, n_fft, k_len, mode, scheme, mask):
    _check_rows("fftconv_backward", u, gy=gy, pregate=pregate, postgate=postgate)
    like, filters, channels = u.shape, (u.shape[1], k_len), (u.shape[1],)
    shapes = [
        shape if wanted else (0,) for shape, wanted in zip((like, filters, like, like, channels), mask, strict=True)
    ]
    dtypes = (u.dtype, torch.float32, u.dtype, u.dtype, torch.float32)
    return tuple(u.new_empty(shape, dtype=dtype) for shape, dtype in zip(shapes, dtypes, strict=True))


@torch.library.register_fake("effk::fftconv_decode_prepare")
def _(k, tile):
    return k.new_empty((_size_from_library("fftconv_decode_floats", k.device, k.shape[0], tile),))


@torch.library.register_fake("effk::fftconv_decode_step")
def _(x_t, xbuf, ybuf, k, specs, t):
    return x_t.new_empty(x_t.shape)


# ---- gradients -----------------------------------------------------------------------------------


def _gradients(ctx: Any, gy: Tensor, wanted: Sequence[bool]) -> list[Tensor | None]:
    """One call for all that is wanted of u, k, pregate, postgate, skip."""
    u, spec, *others = ctx.saved_tensors
    mask = [bool(w) for w in wanted]
    grads = torch.ops.effk.fftconv_backward(
        gy.contiguous(), u, spec, *others, ctx.n_fft, ctx.k_len, ctx.mode, ctx.scheme, mask
    )
    return [grad if want else None for grad, want in zip(grads, mask, strict=True)]


def _keep(ctx: Any, tensors: tuple[Tensor | None, ...], n_fft: int, k_len: int, mode: str, scheme: str) -> None:
    ctx.save_for_backward(*tensors)
    ctx.n_fft, ctx.k_len, ctx.mode, ctx.scheme = n_fft, k_len, mode, scheme


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, n_fft, mode, scheme = inputs
    _keep(ctx, tensors, n_fft, 0, mode, scheme)


def _backward(ctx: Any, gy: Tensor) -> tuple[Any, ...]:
    need = ctx.needs_input_grad
    gu, _, *others = _gradients(ctx, gy, (need[0], False, *need[2:5]))
    return gu, None, *others, None, None, None


torch.library.register_autograd("effk::fftconv", _backward, setup_context=_setup)


class _FFTConv(torch.autograd.Function):
    """fftconv with a gradient for the filter that ``spec`` was prepared from; ``k`` itself is not kept."""

    @staticmethod
    def forward(ctx, u, k, spec, pregate, postgate, skip, n_fft, mode, scheme):
        _keep(ctx, (u, spec, pregate, postgate, skip), n_fft, k.shape[1], mode, scheme)
        return torch.ops.effk.fftconv(u, spec, pregate, postgate, skip, n_fft, mode, scheme)

    @staticmethod
    def backward(ctx, gy):
        need = ctx.needs_input_grad
        gu, gk, *others = _gradients(ctx, gy, (*need[:2], *need[3:6]))
        return gu, gk, None, *others, None, None, None


def _no_second_derivative(ctx: Any, *grads: Any) -> Any:
    raise RuntimeError("fftconv_backward: second derivatives are not implemented")


torch.library.register_autograd("effk::fftconv_backward", _no_second_derivative)


# ---- autocast: u and the gates take the autocast dtype; the spectrum and skip stay fp32 ------------------------

autocast.cast_arguments("fftconv", (0, 2, 3))
