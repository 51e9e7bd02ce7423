"""DepthwiseConv1d: copies of nn.Conv1d, and decoding with a state."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from effk.nn import DepthwiseConv1d


@pytest.mark.parametrize("layout", ("bhl", "blh"))
@pytest.mark.parametrize(("taps", "padding"), [(1, 0), (3, 1), (4, 3), (5, 0), (7, 9)])
def test_copy_of_conv1d(taps: int, padding: int, layout: str) -> None:
    conv, x = nn.Conv1d(6, 6, taps, padding=padding, groups=6, bias=taps != 4), torch.randn(2, 6, 40)
    module = DepthwiseConv1d.from_conv1d(conv, layout)
    y = module(x if layout == "bhl" else x.transpose(1, 2))
    assert torch.allclose(y if layout == "bhl" else y.transpose(1, 2), conv(x), rtol=1e-5, atol=1e-6)
    if padding == taps - 1:
        causal = DepthwiseConv1d.from_conv1d(conv, layout, "silu", causal=True)
        y = causal(x if layout == "bhl" else x.transpose(1, 2))
        expected = nn.functional.silu(conv(x)[..., :40])
        assert torch.allclose(y if layout == "bhl" else y.transpose(1, 2), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("act", ("none", "silu"))
@pytest.mark.parametrize("layout", ("bhl", "blh"))
def test_steps_equal_the_whole(layout: str, act: str) -> None:
    time = 2 if layout == "bhl" else 1
    for taps in (1, 2, 4):
        module = DepthwiseConv1d(6, taps, layout=layout, act=act)
        x = torch.randn(2, 6, 20) if layout == "bhl" else torch.randn(2, 20, 6)
        y = module(x)
        for prompt in (0, 1, 2, 9):
            state = module.state(x.narrow(time, 0, prompt))
            for t in range(prompt, 20):
                y_t, state = module.step(x.select(time, t), state)
                assert torch.allclose(y_t, y.select(time, t), rtol=1e-5, atol=1e-6)


def test_short_conv_bad_arguments() -> None:
    with pytest.raises(ValueError, match="one filter per channel"):
        DepthwiseConv1d.from_conv1d(nn.Conv1d(6, 6, 3))
    with pytest.raises(ValueError, match="one filter per channel"):
        DepthwiseConv1d.from_conv1d(nn.Conv1d(6, 6, 3, dilation=2, groups=6))
    with pytest.raises(ValueError, match="layout, act: expected"):
        DepthwiseConv1d(6, 3, layout="hbl")
    with pytest.raises(RuntimeError, match="step: expected causal padding, got 1, 1"):
        DepthwiseConv1d(6, 3, 1, 1).step(torch.zeros(1, 6), torch.zeros(1, 6, 2))
