"""An example of a block around ``fftconv``: a gated long convolution with an implicit filter, for training and
decoding.

The operator of Hyena (Poli et al., 2023, arXiv:2302.10866) at order 2. Projections of x, each followed by a short
causal convolution, are two gates and a value; the value meets a filter as long as the sequence::

    (a, b, v) = short(W x)             y = W' (a * (k (*) (b * v) + skip * b * v))

The filter is not stored but computed: a small network with sine activations maps features of the position to one value
a channel, and a decaying window multiplies it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .depthwise_conv1d import DepthwiseConv1d
from .fftconv import FFTConv
from .fftconv_decoder import FFTConvDecoder
from .long_filter import LongFilter


class HyenaFilter(LongFilter):
    """``k[h, t] = exp(-rate[h] t / T) * network(features(t / T))[h] / sqrt(T)``, T = ``max_length``.

    In fp32 whatever the dtype of the module. Computed once per length while gradients are off and no parameter changes,
    so that the spectrum of the result is kept too.

    Features: t / T, and the sine and cosine of ``bands`` frequencies. Rates are fixed, spread geometrically such that
    the windows of the channels fall to 1 % between 0.1 T and 2 T.
    """

    def __init__(self, channels: int, max_length: int, hidden: int = 32, bands: int = 8) -> None:
        super().__init__()
        position = torch.arange(max_length, dtype=torch.float64)[:, None] / max_length
        angle = 2 * math.pi * position * torch.logspace(0, 1, bands, base=max(2, max_length // 4), dtype=torch.float64)
        features = torch.cat((position, angle.sin(), angle.cos()), 1)
        rate = math.log(100) / torch.logspace(math.log10(0.1), math.log10(2), channels, dtype=torch.float64)
        window = torch.exp(-position * rate) / math.sqrt(max_length)
        self.register_buffer("features", features.float(), persistent=False)
        self.register_buffer("window", window.float(), persistent=False)
        self.first = nn.Linear(features.shape[1], hidden)
        self.second = nn.Linear(hidden, hidden)
        self.last = nn.Linear(hidden, channels, bias=False)
        self._kept: tuple[tuple, Tensor] | None = None

    def forward(self, length: int) -> Tensor:
        """The first ``length`` taps, ``(channels, length)`` fp32."""
        if length > self.window.shape[0]:
            raise ValueError(f"HyenaFilter: length: expected at most {self.window.shape[0]}, got {length}")
        parameters = list(self.parameters())
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or any(p.is_inference() for p in parameters):
            return self._compute(length)
        key = (length, *((p.data_ptr(), p._version) for p in parameters))
        if self._kept is None or self._kept[0] != key:
            with torch.inference_mode(False), torch.no_grad():  # a tensor that the spectrum cache can watch
                self._kept = (key, self._compute(length))
        return self._kept[1]

    def _compute(self, length: int) -> Tensor:
        hidden = torch.sin(self.second(torch.sin(self.first(self.features[:length]))))
        return (self.last(hidden) * self.window[:length]).T.float().contiguous()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": None}


@dataclass
class HyenaState:
    """What :meth:`HyenaOperator.step` carries from one position to the next."""

    short: Tensor
    long: FFTConvDecoder


class HyenaOperator(nn.Module):
    """``(B, L, width)`` to ``(B, L, width)``, causal; L up to ``max_length``. See the module for the formula."""

    def __init__(
        self, width: int, max_length: int, taps: int = 3, hidden: int = 32, conv: FFTConv | None = None
    ) -> None:
        """
        Args:
            taps: length of the short convolutions.
            hidden: width of the filter's network.
            conv: the long convolution, to share one among layers.
        """
        super().__init__()
        self.inputs = nn.Linear(width, 3 * width)
        self.short = DepthwiseConv1d(3 * width, taps, layout="blh")
        self.filter = HyenaFilter(width, max_length, hidden)
        self.skip = nn.Parameter(torch.zeros(width))
        self.conv = FFTConv() if conv is None else conv
        self.outputs = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """All positions at once."""
        a, b, v = self.short(self.inputs(x)).transpose(1, 2).chunk(3, 1)
        y = self.conv(v, self.filter(x.shape[1]), b, a, self.skip.float())
        return self.outputs(y.transpose(1, 2))

    @torch.no_grad()
    def prefill(self, x: Tensor, capacity: int) -> tuple[Tensor, HyenaState]:
        """A prompt ``(B, P, width)``, P >= 0, and the state from which ``capacity`` more positions can be decoded."""
        inputs = self.inputs(x)
        decoder = FFTConvDecoder(self.filter(x.shape[1] + capacity), capacity, self.skip)
        state = HyenaState(self.short.state(inputs), decoder)
        if x.shape[1] == 0:
            decoder.start(x.shape[0])
            return x, state
        a, b, v = self.short(inputs).transpose(1, 2).chunk(3, 1)
        y = decoder.prefill(v, b, a)
        return self.outputs(y.transpose(1, 2)), state

    @torch.no_grad()
    def step(self, x_t: Tensor, state: HyenaState) -> Tensor:
        """One position ``(B, width)``; changes ``state``. Equals ``forward`` at that position up to rounding."""
        z, state.short = self.short.step(self.inputs(x_t), state.short)
        a, b, v = z.chunk(3, 1)
        return self.outputs(state.long.step(v, b, a))
