"""Rotate a Llama-shaped model's hidden channels without changing its function, so that no channel stands out.

Single channels of the residual stream hold values far above the rest; rounding a token's activations to 4 bits with one
range then loses the rest. A dense orthogonal rotation spreads them. With norms whose gain has moved into the layers behind
them, RMSNorm commutes with a rotation Q of the stream, and Q goes into the weights::

    embedding E -> E Q          reads the stream: W -> W diag(gain) Q          writes to it: W -> Q^T W, bias -> bias Q
    v -> R_h^T v and o -> o R_h, head by head: attention mixes tokens, not a head's channels

Q is a :mod:`effk.formats.hadamard` rotation behind random signs. Left to run time is the input of the down projection
(``QuikWeight.rotated``), which a nonlinearity lies before. A head that is tied to the embedding is untied, as the final gain
moves into it alone.

Source: Ashkboos et al., "QuaRot", 2024 (arXiv:2404.00456), sections 4 and 5.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...formats.hadamard import rotate
from ..embedding import untie

_NORMS = ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm", "Phi3RMSNorm")  # y = gain * x / rms(x)
_READS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
_WRITES = ("self_attn.o_proj", "mlp.down_proj")


@torch.no_grad()
def rotate_model(model: nn.Module, seed: int = 0) -> None:
    """Rotate ``model`` in place.

    Raises:
        ValueError: not a model of Llama's shape (blocks of q, k, v, o, gate, up, down behind RMSNorms, nothing else with a
            weight); it is unchanged.
    """
    inner, blocks = _check_shape(model)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head.weight is embedding.weight:
        head.weight = nn.Parameter(embedding.weight.detach().clone(), embedding.weight.requires_grad)
        model.config.tie_word_embeddings = False
        model.all_tied_weights_keys = {}
        untie(model)
    width = embedding.weight.shape[1]
    signs = (1 - 2 * torch.randint(0, 2, (width,), generator=torch.Generator().manual_seed(seed))).double()
    embedding.weight.copy_(rotate(embedding.weight.double() * signs))
    _absorb(inner.norm, (head,), signs)
    for block in blocks:
        for norm, readers in _READS.items():
            _absorb(block.get_submodule(norm), [block.get_submodule(name) for name in readers], signs)
        for name in _WRITES:
            layer = block.get_submodule(name)
            layer.weight.copy_(rotate((signs[:, None] * layer.weight.double()).t()).t())
            if layer.bias is not None:
                layer.bias.copy_(rotate(layer.bias.double() * signs))
        attention = block.self_attn
        for layer, side in ((attention.v_proj, 0), (attention.o_proj, 1)):
            heads = layer.weight.double().movedim(side, -1)
            layer.weight.copy_(rotate(heads.unflatten(-1, (-1, attention.head_dim))).flatten(-2).movedim(-1, side))
        if attention.v_proj.bias is not None:
            bias = attention.v_proj.bias.double().unflatten(-1, (-1, attention.head_dim))
            attention.v_proj.bias.copy_(rotate(bias).flatten())


def _absorb(norm: nn.Module, readers: list[nn.Module] | tuple[nn.Module, ...], signs: Tensor) -> None:
    """Move a norm's gain into the layers that read it, and rotate their inputs."""
    for layer in readers:
        layer.weight.copy_(rotate(layer.weight.double() * (norm.weight.double() * signs)))
    norm.weight.fill_(1.0)


def _check_shape(model: nn.Module) -> tuple[nn.Module, list[nn.Module]]:
    """The model without its head, and its blocks; ValueError."""

    def refuse(why: str) -> None:
        raise ValueError(f"rotate: model: expected one of Llama's shape, got {type(model).__name__}: {why}")

    inner, head = getattr(model, "model", None), None
    if hasattr(model, "get_output_embeddings"):
        head = model.get_output_embeddings()
    if inner is None or head is None or not isinstance(getattr(inner, "layers", None), nn.ModuleList):
        refuse("it has no model.layers with a head behind them")
    known = {id(inner.get_input_embeddings().weight), id(head.weight)}
    norms = [getattr(inner, "norm", None)]
    for block in inner.layers:
        names = dict(block.named_modules())
        norms += [names.get(norm) for norm in _READS]
        for name in (*(leaf for leaves in _READS.values() for leaf in leaves), *_WRITES):
            if type(names.get(name)) is not nn.Linear:
                refuse(f"{name} of a block is {type(names.get(name)).__name__}")
            known.add(id(names[name].weight))
        if not isinstance(getattr(block.self_attn, "head_dim", None), int):
            refuse("its attention does not say how wide a head is")
    if bad := [type(norm).__name__ for norm in norms if type(norm).__name__ not in _NORMS]:
        refuse(f"a norm is {bad[0]}")
    if other := [name for name, p in model.named_parameters() if p.dim() > 1 and id(p) not in known]:
        refuse(f"it also holds {other[0]}")
    return inner, list(inner.layers)
