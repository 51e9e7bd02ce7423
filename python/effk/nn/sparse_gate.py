"""The gates of ``torch.ops.effk.relu_ffn`` as an activation module in PyTorch: for training, and where zeros are not
skipped."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops.relu_ffn import APPROXIMATE, GATES

WITHOUT_PARAM = ("relu", "relu2", "drelu")
PER_NEURON = ("shifted_relu", "fatrelu", "silu_threshold")


def apply_gate(
    g: Tensor, kind: str, param: Tensor | None = None, allowed: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``a`` in the dtype of ``g`` ``[..., f]``, differentiable, and which neurons are active (bool, not
    differentiable).

    ``allowed`` (bool) limits whom ``top_k`` ranks. Formulas: :mod:`effk.ops.relu_ffn`.
    """
    x = g.float()
    p = None if param is None else param.to(x.device)
    if kind in ("relu", "drelu", "relu2"):
        a, active = (x * x if kind == "relu2" else x), ~(x <= 0)
    elif kind == "shifted_relu":
        a, active = x - p, ~(x <= p)
    elif kind == "fatrelu":
        a, active = x, ~(x <= p)
    elif kind == "silu_threshold":
        a = nn.functional.silu(x)
        active = ~(a.detach().abs() < p)
    elif kind == "gelu_gauss":
        over = x - (x.mean(-1, keepdim=True) + p * x.std(-1, correction=0, keepdim=True))
        a, active = nn.functional.gelu(over, approximate="tanh"), ~(over <= 0)
    else:
        size = x.detach().abs()
        size = size if allowed is None else torch.where(allowed, size, -torch.inf)
        order = size.sort(dim=-1, descending=True, stable=True).indices[..., : int(p)]
        a, active = x, torch.zeros_like(x, dtype=torch.bool).scatter(-1, order, True)
    return torch.where(active, a, 0.0).to(g.dtype), active


class SparseGate(nn.Module):
    """An activation that is zero for many neurons: ``a = gate(g)``, element by element or (``gelu_gauss``, ``top_k``)
    by row.

    Args:
        kind: one of :data:`effk.ops.relu_ffn.GATES` but ``drelu``, which also acts on up.
        param: the gate's parameter, one value or (thresholds and shifts) one a neuron; None where it takes none.
    """

    def __init__(self, kind: str, param: Tensor | float | None = None) -> None:
        super().__init__()
        if kind not in GATES or kind == "drelu":
            raise ValueError(f"SparseGate: kind: expected one of {[k for k in GATES if k != 'drelu']}, got {kind!r}")
        check_param("SparseGate", kind, param)
        self.kind = kind
        value = None if param is None else torch.as_tensor(param, dtype=torch.float32).reshape(-1)
        self.register_buffer("param", value, persistent=False)

    @property
    def exact(self) -> bool:
        """Whether this is the model's own function rather than an approximation of one without zeros."""
        return self.kind not in APPROXIMATE

    def forward(self, g: Tensor) -> Tensor:
        return apply_gate(g, self.kind, self.param)[0]

    def extra_repr(self) -> str:
        param = "" if self.param is None else f", param={float(self.param.mean()):.4g}"
        return f"{self.kind}{param}{' (mean)' if self.param is not None and self.param.numel() > 1 else ''}"


def check_param(who: str, kind: str, param: Tensor | float | None) -> None:
    """Raise ``ValueError`` unless ``param`` is what gate ``kind`` takes."""
    if (param is None) != (kind in WITHOUT_PARAM):
        expected = "none" if kind in WITHOUT_PARAM else "one"
        raise ValueError(f"{who}: param: expected {expected} for gate {kind!r}, got {param!r}")
    if param is not None and torch.as_tensor(param).numel() > 1 and kind not in PER_NEURON:
        raise ValueError(f"{who}: param: expected one value for gate {kind!r}, got {torch.as_tensor(param).numel()}")
