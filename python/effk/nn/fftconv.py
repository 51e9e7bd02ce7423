"""Long convolutions as modules: one that any number of layers share, and one with the call of the published module."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops import fftconv as op
from .derived_cache import DerivedCache

SPECTRA_PER_FILTER = 4  # sequence lengths in turn


class FFTConv(nn.Module):
    """``y = ((u * pregate) (*) k + skip * u * pregate) * postgate``, rows ``(B, H, L)`` with filters ``(H, K)``.

    No parameters: one instance serves all layers. Differentiable with respect to everything; when k needs no gradient
    (it is constant, or gradients are off) its spectrum is kept, see :class:`effk.nn.derived_cache.DerivedCache`. In a
    traced graph (compile, export) it is prepared in every call; where that matters, keep ``conv.cached_spectrum(k, L)``
    as a buffer and call ``torch.ops.effk.fftconv``. Formula, shapes, dtypes, modes, errors: :mod:`effk.ops.fftconv`.
    """

    def __init__(self, n_fft: int | None = None, mode: str = "causal", scheme: str = "auto") -> None:
        """
        Args:
            n_fft: FFT size; None for the smallest legal one of each call.
            mode: "causal", "circular" or "bidirectional".
            scheme: "auto", "fft", "overlap_save" or "direct".

        Raises:
            ValueError: an unknown mode or scheme.
        """
        super().__init__()
        if mode not in op.MODES:
            raise ValueError(f"FFTConv: mode: expected one of {op.MODES}, got {mode!r}")
        if scheme not in op.SCHEMES:
            raise ValueError(f"FFTConv: scheme: expected one of {op.SCHEMES}, got {scheme!r}")
        self.n_fft, self.mode, self.scheme = n_fft, mode, scheme
        self._cache = DerivedCache(_spectrum, SPECTRA_PER_FILTER)

    def forward(
        self,
        u: Tensor,
        k: Tensor,
        pregate: Tensor | None = None,
        postgate: Tensor | None = None,
        skip: Tensor | None = None,
    ) -> Tensor:
        """``(B, H, L)`` to ``(B, H, L)`` of the same dtype."""
        wants_gradient = k.requires_grad and torch.is_grad_enabled()
        if wants_gradient or u.dim() != 3 or torch.compiler.is_compiling():
            return op.fftconv(u, k, pregate, postgate, skip, self.n_fft, self.mode, self.scheme)
        n_fft, taps = self._size(u.shape[-1], k)
        spec = self._cache.get((k,), taps, n_fft, self.mode, self.scheme)
        u, pregate, postgate = (None if t is None else t.contiguous() for t in (u, pregate, postgate))
        return torch.ops.effk.fftconv(u, spec, pregate, postgate, skip, n_fft, self.mode, self.scheme)

    def cached_spectrum(self, k: Tensor, length: int) -> Tensor:
        """The spectrum of k for rows of ``length``: computed when first asked for, and again after writes to k."""
        n_fft, taps = self._size(length, k)
        return self._cache.get((k,), taps, n_fft, self.mode, self.scheme)

    def clear_cache(self) -> None:
        """Forget all spectra: after writes to a filter that PyTorch does not count, such as through ``k.data``."""
        self._cache.clear()

    def extra_repr(self) -> str:
        return f"n_fft={self.n_fft}, mode={self.mode}, scheme={self.scheme}"

    def _size(self, length: int, k: Tensor) -> tuple[int, int]:
        """n_fft and how many taps count."""
        taps = k.shape[-1] if k.dim() else 1
        if self.n_fft is not None:
            return self.n_fft, taps
        if self.mode == "causal":
            taps = min(taps, max(length, 1))
        return op.default_n_fft(length, taps, self.mode), taps


def _spectrum(k: Tensor, taps: int, n_fft: int, mode: str, scheme: str) -> Tensor:
    return torch.ops.effk.fftconv_prepare(op.as_filter(k[..., :taps]), n_fft, mode, scheme)


class FlashFFTConv(nn.Module):
    """The call of the module that FlashFFTConv (arXiv:2311.05908) releases: ``conv(u, k, pregate, postgate)``.

    ``seqlen`` is the FFT size, and the convolution is the circular one of that size, of which L positions are
    returned: a causal convolution needs ``seqlen >= L + K - 1``, as a rule twice the length. Any size of
    :mod:`effk.ops.fftconv`, any L <= seqlen and K <= seqlen, each gate on its own, fp32 too, ``k`` with a leading 1.

    ``dtype`` is what the released module computes in. Here u says what is stored, and arithmetic is fp32 on the CPU.
    ``use_32_butterfly``, its choice between two kernels, is accepted and ignored.
    """

    def __init__(self, seqlen: int, dtype: torch.dtype = torch.float16, use_32_butterfly: bool = True) -> None:
        super().__init__()
        self.seqlen, self.dtype = seqlen, dtype
        self._convs = nn.ModuleDict({mode: FFTConv(seqlen, mode) for mode in op.MODES})

    def forward(self, u: Tensor, k: Tensor, pregate: Tensor | None = None, postgate: Tensor | None = None) -> Tensor:
        """``(B, H, L)`` to ``(B, H, L)`` of the same dtype."""
        length, taps, size = u.shape[-1], k.shape[-1], self.seqlen
        if max(length, taps) > size:
            raise ValueError(f"FlashFFTConv: u, k: expected at most seqlen = {size} positions, got {length} and {taps}")
        if length + taps - 1 <= size:
            return self._convs["causal"](u, k, pregate, postgate)
        if taps == size and 2 * length <= size:
            return self._convs["bidirectional"](u, k, pregate, postgate)
        padded = (None if t is None else nn.functional.pad(t, (0, size - length)) for t in (u, pregate, postgate))
        u, pregate, postgate = padded
        return self._convs["circular"](u, k, pregate, postgate)[..., :length]

    def extra_repr(self) -> str:
        return f"seqlen={self.seqlen}"
