"""The activations that linear layers apply to what they have just summed: names, float64 formulas, derivatives.

    none  z      relu  max(z, 0)      silu  z / (1 + exp(-z))
    gelu  z/2 (1 + erf(z / sqrt(2)))      gelu_tanh  z/2 (1 + tanh(sqrt(2/pi) (z + 0.044715 z^3)))

Source: Hendrycks, Gimpel, "Gaussian Error Linear Units", 2016 (gelu, gelu_tanh, silu).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

ACTS = ("none", "relu", "gelu", "gelu_tanh", "silu")


def apply(z: Tensor, act: str) -> Tensor:
    """``act(z)`` in the dtype of z, differentiable: what a layer does where the kernel cannot do it on the way."""
    if act == "none":
        return z
    if act.startswith("gelu"):
        return torch.nn.functional.gelu(z, approximate="tanh" if act == "gelu_tanh" else "none")
    return torch.nn.functional.silu(z) if act == "silu" else torch.relu(z)


def gradient(gy: Tensor, z: Tensor, act: str) -> Tensor:
    """``gy * act'(z)``, dtype of z. The derivative of relu at 0 is 0; z may be relu's result as well."""
    if act == "none":
        return gy
    if act.startswith("gelu"):
        return torch.ops.aten.gelu_backward(gy, z, approximate="tanh" if act == "gelu_tanh" else "none")
    return torch.ops.aten.silu_backward(gy, z) if act == "silu" else torch.ops.aten.threshold_backward(gy, z, 0)


def reference(z: Tensor, act: str) -> Tensor:
    """The formulas of this module in float64."""
    z = z.double()
    if act == "relu":
        return torch.where(z > 0, z, torch.where(z.isnan(), z, 0.0))
    if act == "silu":
        return z / (1 + torch.exp(-z))
    if act == "gelu":
        return z / 2 * torch.erfc(-z / math.sqrt(2))
    if act == "gelu_tanh":
        return z / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
    return z
