"""The feed-forward experts of a mixture, over low-bit weights, running on ``torch.ops.effk.wq_grouped_linear``."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ..formats.wq import WqWeight
from ..ops.wq_grouped_linear import PackedExperts, pack, unpack
from .frozen import FrozenDtypes
from .wq_linear import COMPUTE_FORMS


class WqGroupedLinear(FrozenDtypes):
    """``y[m] = x[m] W_e^T`` for rows sorted by expert, with frozen low-bit ``W[experts, out_features, in_features]``.

    The buffers are the kernel's packed form (``csrc/formats/t16.h``)::

        packed    uint8 [experts, tiles, chunks, bytes]      scales   fp16 or fp32 [experts, tiles, groups, 16]
        zeros     uint8 [experts, tiles, groups, 16], or None

    ``state_dict`` holds this form; files hold the canonical one of ``[experts * out_features, in_features]``. ``compute`` is
    "float" or "int8", as in :class:`WqLinear`. Gradients flow to ``x`` only.
    """

    format_buffers: ClassVar[tuple[str, ...]] = ("packed", "scales", "zeros")

    def __init__(self, experts: int, n: int, k: int, bits: int, group_size: int, compute: str = "float") -> None:
        super().__init__()
        if compute not in COMPUTE_FORMS:
            raise ValueError(f"WqGroupedLinear: compute: expected one of {COMPUTE_FORMS}, got {compute!r}")
        self.experts, self.out_features, self.in_features = experts, n, k
        self.bits, self.group_size, self.compute = bits, group_size, compute
        for name in self.format_buffers:
            self.register_buffer(name, None)

    @classmethod
    def from_weight(cls, weight: WqWeight, experts: int, compute: str = "float") -> WqGroupedLinear:
        """Pack ``weight`` ``[experts * n, k]``, the experts' rows one after the other, for the kernels.

        Raises:
            ValueError: the weight is malformed, has a codebook or outliers, or rows that are no multiple of ``experts``.
        """
        weight.validate()
        packed = pack(weight, experts)
        module = cls(experts, *packed.geometry, compute)
        module.packed, module.scales, module.zeros = packed.tensors
        return module

    def to_weight(self) -> WqWeight:
        """The canonical form back; exact inverse of :meth:`from_weight`."""
        geometry = (self.out_features, self.in_features, self.bits, self.group_size)
        return unpack(PackedExperts(self.packed, self.scales, self.zeros, *geometry))

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        """``x`` ``[T, in_features]`` to ``[T, out_features]``; expert e has rows ``offsets[e]`` to ``offsets[e + 1]``."""
        b = self._buffers
        return torch.ops.effk.wq_grouped_linear.default(
            x, offsets, b["packed"], b["scales"], b["zeros"], None,
            self.out_features, self.in_features, self.bits, self.group_size, self.compute,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return (
            f"experts={self.experts}, in_features={self.in_features}, out_features={self.out_features}, "
            f"bits={self.bits}, group_size={self.group_size or 'row'}, compute={self.compute}"
        )


class GroupedExperts(nn.Module):
    """``sum_j w[t, j] down_e(act(gate_e(x[t])) * up_e(x[t]))``, ``e = index[t, j]``: the experts that a router chose.

    Takes the place of the experts of transformers' mixtures (Mixtral, Qwen2-MoE, Qwen3-MoE and others of that shape), with
    their names. The pairs of token and expert are sorted by expert, so that each product is one call over all experts.
    Sums over the chosen experts are fp32, in the router's order.

    Attributes:
        gate_up_proj: ``[experts, 2 * hidden, inputs]``, gates first; :class:`WqGroupedLinear`, or a plain parameter.
        down_proj: ``[experts, inputs, hidden]``; the same.
    """

    def __init__(
        self,
        gate_up_proj: nn.Parameter | WqGroupedLinear,
        down_proj: nn.Parameter | WqGroupedLinear,
        act_fn: Callable[[Tensor], Tensor],
        num_experts: int,
    ) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj, self.act_fn, self.num_experts = gate_up_proj, down_proj, act_fn, num_experts

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """``[T, inputs]`` to the same shape; index and weights of the chosen experts are ``[T, k]``."""
        tokens, chosen = top_k_index.shape
        expert, order = top_k_index.reshape(-1).sort(stable=True)
        bounds = torch.arange(self.num_experts + 1, device=expert.device, dtype=expert.dtype)
        offsets = torch.searchsorted(expert, bounds, out_int32=True)
        x = hidden_states.index_select(0, order // chosen)
        gate, up = _product(self.gate_up_proj, x, offsets).chunk(2, dim=-1)
        y = _product(self.down_proj, self.act_fn(gate) * up, offsets)
        y = torch.empty_like(y).index_copy_(0, order, y).view(tokens, chosen, -1)
        return (y.float() * top_k_weights.float().unsqueeze(-1)).sum(1).to(hidden_states.dtype)


def _product(weight: nn.Parameter | WqGroupedLinear, x: Tensor, offsets: Tensor) -> Tensor:
    if isinstance(weight, WqGroupedLinear):
        return weight(x, offsets)
    parts = zip(weight, x.tensor_split(offsets[1:-1].cpu().long()), strict=True)
    return torch.cat([linear(rows, expert) for expert, rows in parts])
