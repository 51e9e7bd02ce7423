"""The weights of a decoder as its operations take them, and the one block of memory that they move to."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..formats import large_pages
from ..nn import QuikLinear, WqLinear
from ..nn.relu_ffn import SparseFFN
from ..nn.wq_embedding import WqTiedHead
from .errors import UnsupportedModel

_OPS = torch.ops.effk
_FORMS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_ALIGN = 64


@dataclass
class Weight:
    """One matrix: ``streams`` are the names of the buffers of ``module`` that a step of one row reads from end to end."""

    module: nn.Module
    streams: tuple[str, ...]
    bias: Tensor | None

    def tensors(self) -> list[Tensor]:
        """The streams, in the order in which they move."""
        return [getattr(self.module, name) for name in self.streams]

    def add(self, decoder: Tensor, layer: int, place: str) -> None:
        """Give it to the decoder."""
        m, b = self.module, self.module._buffers
        if isinstance(m, WqLinear):
            _OPS.decoder_wq(decoder, layer, place, *m._weight_args(), self.bias, *m._geometry(), m.compute)
        elif isinstance(m, QuikLinear):
            _OPS.decoder_quik(
                decoder, layer, place, b["packed"], b["scales"], b["reduced"], b["w_out"], self.bias, b["int_idx"],
                b["fp_idx"], m.out_features, m.n_base, m.bits, m.bits_a, m.quantizer,
            )  # fmt: skip
        elif isinstance(m, SparseFFN):
            _OPS.decoder_relu_ffn(
                decoder, layer, b["gate_rows"], b["up_rows"], b["down_rows"], b["gate_scales"], b["up_scales"],
                b["down_scales"], b["gate_bias"], b["up_bias"], b["down_bias"], m.rows, m.gate, b["param"], b["mask"],
                m.mask_group, "auto",
            )  # fmt: skip
        else:
            _OPS.decoder_dense(decoder, layer, place, m.packed, m.f_out, self.bias)


class _Panels(nn.Module):
    """A dense weight, packed for ``dense_linear``."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.f_out = weight.shape[0]
        self.register_buffer("packed", _OPS.dense_pack(weight.detach().contiguous(), _FORMS[weight.dtype]))


def weight_of(module: nn.Module) -> Weight:
    """The weight of a linear layer, or all of a :class:`SparseFFN`.

    Raises:
        UnsupportedModel: a kind of layer that the runtime does not have.
    """
    bias = getattr(module, "bias", None)
    bias = None if bias is None else bias.detach()
    if isinstance(module, WqTiedHead):
        module = module._embedding
    if isinstance(module, WqLinear):
        return Weight(module, ("packed", "scales"), bias)
    if isinstance(module, QuikLinear) and not module.rotated:
        return Weight(module, ("packed",) if module.w_out is None else ("packed", "w_out"), bias)
    if isinstance(module, SparseFFN) and module.selector is None and not module.reference:
        return Weight(module, tuple(f"{p}_rows" for p in ("gate", "up", "down") if p != "gate" or module.gated), None)
    if type(module) is nn.Linear:
        return Weight(_Panels(module.weight), ("packed",), bias)
    if type(module).__name__ == "Conv1D":  # GPT-2's, [in, out]
        return Weight(_Panels(module.weight.T), ("packed",), bias)
    raise UnsupportedModel(
        "runtime: layer: expected Linear, WqLinear, QuikLinear without rotation or SparseFFN without selector, "
        f"got {type(module).__name__}"
    )


def move_together(weights: Sequence[Weight]) -> int:
    """Move the streams of all weights, in this order, into one block of large pages; returns their bytes.

    The buffers of the modules become views of the block, so that nothing is kept twice. Why: a product with one row is bound
    by reading its weight, and the weights of small layers, in small pages and apart from each other, are read at two thirds
    of the speed: every 4 KiB cost a miss of the address cache, and every weight starts a stream anew.
    """
    moves = {id(t): t for weight in weights for t in weight.tensors()}
    total = sum(-(-t.nbytes // _ALIGN) * _ALIGN for t in moves.values())
    if total == 0:
        return 0
    room, at = large_pages.reserve(-(-total // large_pages.PAGE) * large_pages.PAGE), 0
    for weight in weights:
        for name in weight.streams:
            old = getattr(weight.module, name)
            if moves.pop(id(old), None) is None:  # shared with a weight before it
                continue
            new = room[at : at + old.nbytes].view(old.dtype).view(old.shape)
            new.copy_(old)
            setattr(weight.module, name, new)
            at += -(-old.nbytes // _ALIGN) * _ALIGN
    del moves, old
    _return_freed_memory()
    return total


def _return_freed_memory() -> None:
    """To the system: glibc keeps freed blocks of less than 32 MB, which were the weights of most layers."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
