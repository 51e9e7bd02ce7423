"""A compressed model against the same model with plain float64 products."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from effk.nn import QuikLinear, WqEmbedding, WqLinear, WqTiedHead


class Dense(nn.Module):
    """The float64 twin of a compressed layer: plain products with the dequantised weight."""

    def __init__(self, layer: WqLinear | QuikLinear) -> None:
        super().__init__()
        self.weight = nn.Parameter(layer.to_weight().dequantize(torch.float64), requires_grad=False)
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.double(), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


def dequantised(model: nn.Module) -> nn.Module:
    """A float64 copy of a compressed model without any of our modules."""
    twin = copy.deepcopy(model)
    for name, module in list(twin.named_modules()):
        parent, _, leaf = name.rpartition(".")
        if isinstance(module, WqEmbedding):
            setattr(twin.get_submodule(parent), leaf, nn.Embedding.from_pretrained(Dense(module).weight))
        elif isinstance(module, (WqLinear, QuikLinear)):
            setattr(twin.get_submodule(parent), leaf, Dense(module))
        elif isinstance(module, WqTiedHead):
            setattr(twin.get_submodule(parent), leaf, Dense(module._embedding))
    return twin.double()


def assert_equals_dequantised(model: nn.Module, ids: Tensor) -> None:
    """The kernel-run model in fp32 (float form) is as close to the float64 truth as the dequantised model in fp32 is.

    Both round every product sum in fp32; each sum of length K errs by at most K 2^-24 sum |x w|, the kernel's like
    PyTorch's. The two therefore share one bound, which the fp32 twin's own error measures: both are maxima over the
    same logits of errors from the same recursion, and 8 covers the spread between two draws of it.
    """
    exact_model = dequantised(model)
    with torch.no_grad():
        got, exact = model(ids).logits.double(), exact_model(ids).logits
        reference = exact_model.float()(ids).logits.double()
    own, theirs = float((got - exact).abs().max()), float((reference - exact).abs().max())
    scale = float(exact.abs().max())
    assert 0 < theirs < 1e-4 * max(1.0, scale), "the yardstick itself must be rounding, not a difference of models"
    assert own <= 8 * theirs + 2.0**-24 * scale
