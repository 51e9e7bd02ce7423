"""Exact decoding with a long convolution, one token at a time, in O(log^2) operations a token."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..ops import fftconv as op


def spread(length: int) -> int:
    """Row length of the buffers for ``length`` positions: a step touches one position of every row, and rows a multiple of
    4 KiB apart would share a few lines of every cache."""
    return length + 16 if length % 1024 == 0 else length


class FFTConvDecoder:
    """A causal long convolution whose input arrives one position at a time: gates, filter and skip as in ``fftconv``.

    Position t adds its direct term to its own output; then, with s = t + 1 and U the largest power of two that divides
    s, the last U inputs add all they contribute to the next U outputs. Every pair of an input and an output meets
    exactly once. Tiles up to U = 64 are direct sums, larger ones cyclic FFTs of 2 U points with a spectrum prepared
    beforehand. A prompt is convolved at once, together with what it adds to the positions to come; the schedule then
    counts from the first position after it.

    Memory: two buffers ``(B, H, capacity)`` fp32 and, per channel, spectra of about 4 * capacity floats. No gradients.

    Source: relaxed convolution, as in Flash Inference (Oncescu et al., 2024, arXiv:2410.12982) and FutureFill (Agarwal
    et al., 2024, arXiv:2410.03766).
    """

    @torch.no_grad()
    def __init__(self, k: Tensor, capacity: int, skip: Tensor | None = None) -> None:
        """
        Args:
            k: ``(H, K)`` or ``(1, H, K)``, fp32 or fp64; taps from K on count as 0. May be the caller's memory: do not
                write to it while decoding.
            capacity: how many positions can be decoded after the prompt.
            skip: ``(H,)`` fp32.

        Raises:
            ValueError: k is not a filter, capacity below 1, or skip of another shape.
        """
        k = op.as_filter(k.detach())
        if k.dim() != 2 or 0 in k.shape:
            raise ValueError(f"FFTConvDecoder: k: expected (H, K), got {list(k.shape)}")
        if capacity < 1:
            raise ValueError(f"FFTConvDecoder: capacity: expected at least 1, got {capacity}")
        if skip is not None and tuple(skip.shape) != (k.shape[0],):
            raise ValueError(f"FFTConvDecoder: skip: expected [{k.shape[0]}], got {list(skip.shape)}")
        k = nn.functional.pad(k, (0, spread(k.shape[1]) - k.shape[1])).contiguous()
        self.k, self.capacity, self.skip = k, capacity, None if skip is None else skip.detach().float()
        self.position = 0
        tiles, tile = [], op.FIRST_FFT_TILE
        while tile < capacity:
            tiles.append(torch.ops.effk.fftconv_decode_prepare(k, tile))
            tile *= 2
        self._specs = tiles
        self._x: Tensor | None = None
        self._y: Tensor | None = None

    def start(self, batch: int) -> None:
        """Begin without a prompt; :meth:`step` does so by itself when nothing was begun."""
        self._begin(torch.zeros(batch, self.k.shape[0], spread(self.capacity), device=self.k.device))

    @torch.no_grad()
    def prefill(self, u: Tensor, pregate: Tensor | None = None, postgate: Tensor | None = None) -> Tensor:
        """Begin with a prompt ``(B, H, P)``, P >= 0; returns its outputs, in its dtype, and forgets what was before.

        One causal convolution of P + capacity positions, the last ``capacity`` of them zero: their outputs are what the
        prompt contributes to them.
        """
        if u.dim() != 3 or u.shape[1] != self.k.shape[0]:
            raise ValueError(f"FFTConvDecoder: u: expected (B, {self.k.shape[0]}, P), got {list(u.shape)}")
        length = u.shape[-1]
        if length == 0:
            self.start(u.shape[0])
            return u.clone()
        v = u.float() if pregate is None else u.float() * pregate.float()
        y = op.fftconv(nn.functional.pad(v, (0, spread(self.capacity))), self.k, skip=self.skip)
        self._begin(y[..., length:].contiguous())
        prompt = y[..., :length]
        return (prompt if postgate is None else prompt * postgate.float()).to(u.dtype).contiguous()

    @torch.no_grad()
    def step(self, x_t: Tensor, pregate: Tensor | None = None, postgate: Tensor | None = None) -> Tensor:
        """The next position: ``(B, H)`` to ``(B, H)``, dtype of x_t; gates ``(B, H)``.

        Raises:
            RuntimeError: ``capacity`` positions have been decoded.
            ValueError: x_t of another shape.
        """
        if self._x is None:
            self.start(x_t.shape[0])
        if tuple(x_t.shape) != tuple(self._x.shape[:2]):
            raise ValueError(f"FFTConvDecoder: x_t: expected {list(self._x.shape[:2])}, got {list(x_t.shape)}")
        if self.position >= self.capacity:
            raise RuntimeError(f"FFTConvDecoder: expected at most capacity = {self.capacity} steps, got one more")
        v = x_t.float() if pregate is None else x_t.float() * pregate.float()
        if self.position + 1 < self.capacity:
            y = torch.ops.effk.fftconv_decode_step(v.contiguous(), self._x, self._y, self.k, self._specs, self.position)
        else:  # the last position adds to no other
            y = self._y[..., self.position] + self.k[:, 0] * v
        self.position += 1
        if self.skip is not None:
            y = torch.addcmul(y, self.skip, v)
        return (y if postgate is None else y * postgate.float()).to(x_t.dtype)

    def operations(self, t: int) -> int:
        """Floating-point operations per channel and sequence that step t spends on the convolution.

        Two for the direct term. A direct tile: ``2 U**2``. An FFT tile, M = max(U, 256) complex points (2 M real ones
        packed): two split-radix transforms of ``4 M log2 M - 6 M + 8``, and ``12 M`` for twist, product and addition. A
        direct sum would spend ``2 (t + 1)``.
        """
        s = t + 1
        if s >= self.capacity:
            return 2
        u = s & -s
        if u < op.FIRST_FFT_TILE:
            return 2 + 2 * u * u
        points = max(u, op.SMALLEST_TRANSFORM)
        return 2 + 2 * (4 * points * int(math.log2(points)) - 6 * points + 8) + 12 * points

    def _begin(self, y: Tensor) -> None:
        self._y, self._x, self.position = y, torch.zeros_like(y), 0
