"""Results are recycled: calling an operation again and again does not grow the process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from effk.formats.wq import WqWeight
from effk.nn import WqLinear

CALLS, RESULT = 1000, 64 << 10  # bytes


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def convolution() -> Callable[[], Tensor]:
    u, k = torch.randn(1, 64, 256), torch.randn(64, 256)
    spec = torch.ops.effk.fftconv_prepare(k, 512, "causal", "fft")
    return lambda: torch.ops.effk.fftconv(u, spec, None, None, None, 512, "causal", "fft")


def short_convolution() -> Callable[[], Tensor]:
    x, w = torch.randn(1, 64, 256), torch.randn(64, 4)
    return lambda: torch.ops.effk.depthwise_conv1d(x, w, None, 3, 0, "bhl", "none")


def linear() -> Callable[[], Tensor]:
    scales = torch.ones(256, 1, dtype=torch.float16)
    weight = WqWeight.from_codes(torch.randint(0, 15, (256, 32), dtype=torch.uint8), scales, bits=4, group_size=32)
    module, x = WqLinear.from_weight(weight, compute="float"), torch.randn(64, 32)
    return lambda: module(x)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the resident size from /proc")
@pytest.mark.parametrize("make", [convolution, short_convolution, linear])
def test_results_are_recycled(make: Callable[[], Callable[[], Tensor]]) -> None:
    call = make()
    with torch.no_grad():
        y = call()
        assert y.numel() * y.element_size() == RESULT
        for _ in range(50):
            y = call()
        before = resident()
        for _ in range(CALLS):
            y = call()
    assert resident() - before < CALLS * RESULT / 4


def test_held_results_are_not_recycled() -> None:
    call = convolution()
    first = call()
    copy = first.clone()
    others = [call().fill_(-1.0) for _ in range(5)]
    assert torch.equal(first, copy) and len({t.data_ptr() for t in [first, *others]}) == 6
