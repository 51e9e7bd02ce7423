"""Pairs of modules between which a channel scale can move without changing the model: ``(t W) (x / t) = W x``.

The producer of an input divides by t, its consumers multiply:

* a norm with a weight -> q, k, v; or -> gate, up (division of the norm's weight, and bias if it has one);
* up -> down: the gated product is linear in up's rows;
* v -> o: attention mixes tokens, not channels. Heads that share keys and values share their scale.

Names tell where the pairs are, and a model may use a norm for more than its name says; so who folds must compare the
block's output before and after (:func:`fold_block` does, and takes the change back).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .calibrate import Block
from .layers import Layer

_TOLERANCE = (
    0.05  # relative change of a block's contribution: room for bf16 weights (2^-9 each), far below a wrong fold
)
# Norms whose output is linear in ``weight`` (and ``bias``); Gemma's multiplies by 1 + weight and is left out.
_NORMS = ("LayerNorm", "LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm", "Phi3RMSNorm", "RMSNorm")
_PAIRS = (
    ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    ("mlp.up_proj", ("mlp.down_proj",)),
    ("self_attn.v_proj", ("self_attn.o_proj",)),
)


@dataclass(frozen=True, eq=False)
class Fold:
    """A place where a channel scale can be folded.

    Attributes:
        name: module name of the producer.
        producer: a norm or ``nn.Linear``.
        consumers: the layers that read the producer's output (through a function that keeps channels apart).
        repeat: how many heads of the consumer's input share one head of the producer's output (1: none).
        width: channels in a head; only with ``repeat > 1``.
    """

    name: str
    producer: nn.Module
    consumers: tuple[Layer, ...]
    repeat: int = 1
    width: int = 1

    def shared(self, per_channel: Tensor) -> Tensor:
        """``[K]`` input channels of the consumers -> the mean over those that one producer channel feeds, ``[K]``."""
        if self.repeat == 1:
            return per_channel
        heads = per_channel.reshape(-1, self.repeat, self.width)
        return heads.mean(1, keepdim=True).expand_as(heads).reshape(-1)

    @torch.no_grad()
    def apply(self, scale: Tensor) -> None:
        """Multiply the consumers' columns by ``scale`` ``[K]`` (as :meth:`shared` would leave it) and divide the producer."""
        for layer in self.consumers:
            layer.module.weight.mul_(scale.to(layer.module.weight.dtype))
        out = scale.reshape(-1, self.repeat, self.width)[:, 0].reshape(-1) if self.repeat > 1 else scale
        weight = self.producer.weight
        weight.div_((out if weight.dim() == 1 else out.unsqueeze(1)).to(weight.dtype))
        if getattr(self.producer, "bias", None) is not None:
            self.producer.bias.div_(out.to(self.producer.bias.dtype))


def find_folds(model: nn.Module, layers: Sequence[Layer]) -> list[Fold]:
    """All folds of the model's blocks whose consumers are all in ``layers``, in module order."""
    by_name = {layer.name: layer for layer in layers}
    modules = dict(model.named_modules())
    found = []
    for block in dict.fromkeys(layer.block for layer in layers if layer.block is not None):
        for source, targets in _PAIRS:
            producer = modules.get(f"{block}.{source}")
            consumers = tuple(by_name[name] for leaf in targets if (name := f"{block}.{leaf}") in by_name)
            if producer is None or len(consumers) != len(targets) or any(layer.transposed for layer in consumers):
                continue
            if source == "mlp.up_proj" and f"{block}.mlp.gate_proj" not in modules:
                continue  # then an activation function lies between up and down
            repeat, width = 1, 1
            if type(producer) is nn.Linear:
                repeat, rest = divmod(consumers[0].k, producer.out_features)
                width = getattr(modules.get(f"{block}.self_attn"), "head_dim", 0) if repeat > 1 else 1
                if rest or not width or producer.out_features % width:
                    continue
            elif type(producer).__name__ not in _NORMS or producer.weight is None:
                continue
            found.append(Fold(f"{block}.{source}", producer, consumers, repeat, width))
    return found


@torch.no_grad()
def fold_block(block: Block, folds: Sequence[Fold], scales: Sequence[Tensor]) -> bool:
    """Apply one scale per fold to a block; False, with the block as it was, when that changed its function."""
    hidden = block.hidden[0]
    before = block.run(0)
    for fold, scale in zip(folds, scales, strict=True):
        fold.apply(scale)
    change = (block.run(0) - before).float().norm() / (before - hidden).float().norm().clamp_min(1e-12)
    if bool(change < _TOLERANCE):
        return True
    for fold, scale in zip(reversed(folds), reversed(scales), strict=True):
        fold.apply(1 / scale)
    return False
