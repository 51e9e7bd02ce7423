"""Short depthwise convolutions as a module, with a state for decoding."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..ops import depthwise_conv1d as op


class DepthwiseConv1d(nn.Module):
    """One short filter per channel: ``torch.ops.effk.depthwise_conv1d`` with its weights. Causal by default.

    ``weight`` ``(channels, taps)`` is in FIR order (tap 0 meets the current sample), ``bias`` ``(channels,)`` or None.
    x ``(B, channels, L)`` in layout "bhl", ``(B, L, channels)`` in "blh".
    """

    def __init__(
        self,
        channels: int,
        taps: int,
        pad_left: int | None = None,
        pad_right: int = 0,
        bias: bool = True,
        layout: str = "bhl",
        act: str = "none",
    ) -> None:
        """``pad_left`` None means ``taps - 1``. Raises ValueError for an unknown layout or act and sizes below 1."""
        super().__init__()
        if layout not in op.LAYOUTS or act not in op.ACTS:
            raise ValueError(
                f"DepthwiseConv1d: layout, act: expected one of {op.LAYOUTS}, {op.ACTS}, got {layout!r}, {act!r}"
            )
        if channels < 1 or taps < 1:
            raise ValueError(f"DepthwiseConv1d: channels, taps: expected at least 1, got {channels}, {taps}")
        self.pad_left = taps - 1 if pad_left is None else pad_left
        self.pad_right, self.layout, self.act = pad_right, layout, act
        self.weight = nn.Parameter(torch.empty(channels, taps))
        self.bias = nn.Parameter(torch.zeros(channels)) if bias else None
        nn.init.uniform_(self.weight, -1 / math.sqrt(taps), 1 / math.sqrt(taps))

    @classmethod
    def from_conv1d(
        cls, conv: nn.Conv1d, layout: str = "bhl", act: str = "none", causal: bool = False
    ) -> DepthwiseConv1d:
        """A copy of a depthwise ``nn.Conv1d``, its taps turned round.

        Args:
            causal: the model crops the result to the first L positions, as is usual with ``padding = taps - 1``: then
            pad
                on the left only.

        Raises:
            ValueError: the layer is not depthwise, or has a stride, dilation or another padding than zeros.
        """
        channels, taps = conv.out_channels, conv.kernel_size[0]
        plain = conv.stride == (1,) and conv.dilation == (1,) and conv.padding_mode == "zeros"
        if not plain or conv.groups != channels or conv.in_channels != channels or isinstance(conv.padding, str):
            raise ValueError(
                f"DepthwiseConv1d: conv: expected one filter per channel, stride 1, zero padding, got {conv}"
            )
        left, right = (taps - 1, 0) if causal else conv.padding * 2
        module = cls(channels, taps, left, right, conv.bias is not None, layout, act)
        with torch.no_grad():
            module.weight.copy_(conv.weight[:, 0].flip(1))
            if conv.bias is not None:
                module.bias.copy_(conv.bias)
        return module.to(conv.weight.device, conv.weight.dtype).train(conv.training)

    def forward(self, x: Tensor) -> Tensor:
        """``L + pad_left + pad_right - taps + 1`` positions, in the layout and dtype of x."""
        how = (self.pad_left, self.pad_right, self.layout, self.act)
        return torch.ops.effk.depthwise_conv1d(x.contiguous(), self.weight, self.bias, *how)

    def state(self, x: Tensor) -> Tensor:
        """What :meth:`step` has to know after a prompt x: its last ``taps - 1`` positions, zeros before the first."""
        time, kept = (2 if self.layout == "bhl" else 1), self.weight.shape[1] - 1
        length = x.shape[time]
        last = x.narrow(time, max(length - kept, 0), min(length, kept))
        missing = kept - last.shape[time]
        return nn.functional.pad(last, (missing, 0) if time == 2 else (0, 0, missing, 0)).contiguous()

    def step(self, x_t: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """One position ``(B, channels)`` of a causal convolution: its output, and the next state.

        Begin with ``state(prompt)``, or with zeros in the shape of :meth:`state`.

        Raises:
            RuntimeError: the module is not causal.
        """
        if (self.pad_left, self.pad_right) != (self.weight.shape[1] - 1, 0):
            raise RuntimeError(f"DepthwiseConv1d: step: expected causal padding, got {self.pad_left}, {self.pad_right}")
        time = 2 if self.layout == "bhl" else 1
        window = torch.cat((state, x_t.unsqueeze(time)), time)
        y = torch.ops.effk.depthwise_conv1d(window, self.weight, self.bias, 0, 0, self.layout, self.act)
        return y.squeeze(time), window.narrow(time, 1, state.shape[time]).contiguous()

    def extra_repr(self) -> str:
        channels, taps = self.weight.shape
        return (
            f"{channels}, taps={taps}, padding=({self.pad_left}, {self.pad_right}), bias={self.bias is not None}, "
            f"layout={self.layout}, act={self.act}"
        )
