"""What a decoder-only transformer of transformers consists of, found by its modules: the families that the runtime knows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import _C
from ..nn.relu_ffn import SparseFFN
from .errors import UnsupportedModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


@dataclass(frozen=True)
class Block:
    """One layer. ``qkv`` and ``up`` hold the modules of their products in the order of the outputs; ``down`` is None where one
    module of ``up`` is the whole feed-forward network.
    """

    attention_norm: nn.Module
    qkv: Sequence[nn.Module]
    out: nn.Module
    ffn_norm: nn.Module
    up: Sequence[nn.Module]
    down: nn.Module | None


@dataclass(frozen=True)
class Structure:
    """A decoder as the runtime runs it. ``window`` 0: every position is seen. Tables are fp32."""

    vocab: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    act: str
    gated: bool
    scale: float
    window: int
    max_positions: int
    embedding: nn.Module
    positions: Tensor | None
    cosine: Tensor | None
    sine: Tensor | None
    blocks: Sequence[Block]
    final_norm: nn.Module
    head: nn.Module


def structure_of(model: PreTrainedModel) -> Structure:
    """The structure of a Llama, Mistral, Qwen2, OPT or GPT-2 model, plain or compressed.

    Raises:
        UnsupportedModel: another architecture, or one of these with a feature that the runtime does not have.
    """
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    read = _FAMILIES.get(kind)
    if read is None:
        raise UnsupportedModel(f"runtime: model: expected one of {sorted(_FAMILIES)}, got {kind!r}")
    try:
        structure = read(model, model.config)
    except AttributeError as missing:  # a part was replaced by something else
        raise UnsupportedModel(f"runtime: {kind}: expected its modules as transformers names them: {missing}") from None
    if structure.head_dim % 16 or structure.head_dim > _C.kv_max_head_dim:  # csrc/formats/kv.h
        raise UnsupportedModel(
            f"runtime: {kind}: head_dim: expected a multiple of 16 up to {_C.kv_max_head_dim}, got {structure.head_dim}"
        )
    return structure


def _refuse(kind: str, feature: str, wanted: Any, got: Any) -> None:
    if got != wanted:
        raise UnsupportedModel(f"runtime: {kind}: {feature}: expected {wanted!r}, got {got!r}")


def _activation(kind: str, name: str) -> str:
    if name not in ACTIVATIONS:
        raise UnsupportedModel(f"runtime: {kind}: activation: expected one of {sorted(ACTIVATIONS)}, got {name!r}")
    return ACTIVATIONS[name]


def _window(model: PreTrainedModel, config: Any) -> int:
    """The sliding window that all layers share."""
    sliding = getattr(config, "sliding_window", None)
    if config.model_type == "qwen2" and not getattr(config, "use_sliding_window", False):
        return 0
    kinds = set(getattr(config, "layer_types", None) or ["sliding_attention" if sliding else "full_attention"])
    if len(kinds) > 1:
        raise UnsupportedModel(f"runtime: {config.model_type}: layer_types: expected one kind, got {sorted(kinds)}")
    return int(sliding) if sliding and kinds == {"sliding_attention"} else 0


def _rope(rotary: nn.Module, positions: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines ``[positions, rotary / 2]`` from the model's own module, with whatever scaling it applies."""
    kind = getattr(rotary, "rope_type", "default")
    if "dynamic" in kind or kind == "longrope":  # their frequencies change with the length of the sequence
        raise UnsupportedModel(f"runtime: rope: expected frequencies that do not depend on the length, got {kind!r}")
    with torch.inference_mode():
        cosine, sine = rotary(torch.zeros(1, dtype=torch.float32), torch.arange(positions)[None])
    half = cosine.shape[-1] // 2
    return cosine[0, :, :half].float().contiguous().clone(), sine[0, :, :half].float().contiguous().clone()


def _llama(model: PreTrainedModel, config: Any) -> Structure:
    core = model.model
    blocks = []
    for layer in core.layers:
        attention, mlp = layer.self_attn, layer.mlp
        extra = [name for name in ("q_norm", "k_norm") if getattr(attention, name, None) is not None]
        _refuse(config.model_type, "norms of q and k", [], extra)
        sparse = isinstance(mlp, SparseFFN)
        up = (mlp,) if sparse else (mlp.gate_proj, mlp.up_proj)
        down = None if sparse else mlp.down_proj
        blocks.append(
            Block(
                layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj), attention.o_proj,
                layer.post_attention_layernorm, up, down,
            )
        )  # fmt: skip
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cosine, sine = _rope(core.rotary_emb, config.max_position_embeddings)
    return Structure(
        vocab=config.vocab_size,
        width=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        inner=config.intermediate_size,
        act=_activation(config.model_type, config.hidden_act),
        gated=True,
        scale=head_dim**-0.5,
        window=_window(model, config),
        max_positions=config.max_position_embeddings,
        embedding=core.embed_tokens,
        positions=None,
        cosine=cosine,
        sine=sine,
        blocks=blocks,
        final_norm=core.norm,
        head=model.lm_head,
    )


def _opt(model: PreTrainedModel, config: Any) -> Structure:
    core = model.model.decoder
    _refuse("opt", "do_layer_norm_before", True, config.do_layer_norm_before)
    _refuse("opt", "word_embed_proj_dim", config.hidden_size, config.word_embed_proj_dim)
    blocks = []
    for layer in core.layers:
        attention = layer.self_attn
        blocks.append(
            Block(
                layer.self_attn_layer_norm, (attention.q_proj, attention.k_proj, attention.v_proj), attention.out_proj,
                layer.final_layer_norm, (layer.fc1,), layer.fc2,
            )
        )  # fmt: skip
    table = core.embed_positions
    head_dim = config.hidden_size // config.num_attention_heads
    return Structure(
        vocab=config.vocab_size,
        width=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_attention_heads,
        head_dim=head_dim,
        inner=config.ffn_dim,
        act=_activation("opt", config.activation_function),
        gated=False,
        scale=head_dim**-0.5,
        window=0,
        max_positions=config.max_position_embeddings,
        embedding=core.embed_tokens,
        positions=table.weight.detach()[table.offset :].float().contiguous(),
        cosine=None,
        sine=None,
        blocks=blocks,
        final_norm=core.final_layer_norm,
        head=model.lm_head,
    )


def _gpt2(model: PreTrainedModel, config: Any) -> Structure:
    core = model.transformer
    _refuse("gpt2", "scale_attn_weights", True, config.scale_attn_weights)
    _refuse("gpt2", "scale_attn_by_inverse_layer_idx", False, config.scale_attn_by_inverse_layer_idx)
    _refuse("gpt2", "add_cross_attention", False, config.add_cross_attention)
    head_dim = config.n_embd // config.n_head
    blocks = [
        Block(
            layer.ln_1, (layer.attn.c_attn,), layer.attn.c_proj,
            layer.ln_2, (layer.mlp.c_fc,), layer.mlp.c_proj,
        )
        for layer in core.h
    ]  # fmt: skip
    return Structure(
        vocab=config.vocab_size,
        width=config.n_embd,
        heads=config.n_head,
        kv_heads=config.n_head,
        head_dim=head_dim,
        inner=config.n_inner or 4 * config.n_embd,
        act=_activation("gpt2", config.activation_function),
        gated=False,
        scale=head_dim**-0.5,
        window=0,
        max_positions=config.n_positions,
        embedding=core.wte,
        positions=core.wpe.weight.detach().float().contiguous(),
        cosine=None,
        sine=None,
        blocks=blocks,
        final_norm=core.ln_f,
        head=model.lm_head,
    )


_FAMILIES = {"llama": _llama, "mistral": _llama, "qwen2": _llama, "opt": _opt, "gpt2": _gpt2}
