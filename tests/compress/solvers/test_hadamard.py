"""Rotating a model leaves its function alone, spreads its channels, and refuses what it does not know."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from effk.compress.solvers.hadamard import rotate_model
from small_models import small_model, token_batches

IDS = token_batches(1)[0]
ROTATED = ("llama", "qwen2", "mistral")


@torch.no_grad()
def streams(model: nn.Module) -> tuple[Tensor, Tensor]:
    """Logits, and what the last block hands on."""
    out = model(IDS, output_hidden_states=True)
    return out.logits, out.hidden_states[-2]


@pytest.mark.parametrize("name", ROTATED)
def test_the_function_stays(name: str) -> None:
    """RMSNorm works in fp32 even in a float64 model; a wrong transpose or a lost gain shows in the first digit."""
    model = small_model(name).double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4)  # so that attention and gates are far from linear
    logits, stream = streams(model)
    before = copy.deepcopy(model)
    rotate_model(model)
    rotated, turned = streams(model)
    assert torch.allclose(rotated, logits, rtol=0, atol=1e-5 * float(logits.abs().max()))
    assert not torch.allclose(turned, stream, rtol=0.1), "the stream itself is another"
    assert torch.allclose(turned.norm(dim=-1), stream.norm(dim=-1), rtol=1e-5)
    assert all(bool((norm.weight == 1).all()) for n, norm in model.named_modules() if n.endswith("norm"))
    for leaf in ("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"):
        old, new = (m.model.layers[1].get_submodule(leaf).weight for m in (before, model))
        assert not torch.allclose(old, new, rtol=0.1), leaf


def test_rotations_that_are_not_symmetric() -> None:
    """Width 96 and heads of 12 have Paley's matrix of 12, which is not its own transpose, as that of 36 above is."""
    config = small_model("llama").config.to_dict()
    config |= {"hidden_size": 96, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 12}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4) if parameter.dim() == 2 else parameter.add_(0.1 * torch.randn_like(parameter))
    logits, _ = streams(model)
    rotate_model(model)
    assert torch.allclose(streams(model)[0], logits, rtol=0, atol=1e-5 * float(logits.abs().max()))


def test_a_tied_head_gets_a_weight_of_its_own() -> None:
    model = small_model("llama")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    rotate_model(model)
    assert model.lm_head.weight is not model.model.embed_tokens.weight and not model.config.tie_word_embeddings


def test_seeds() -> None:
    first, second, third = (small_model("llama") for _ in range(3))
    rotate_model(first)
    rotate_model(second)
    rotate_model(third, seed=1)
    weights = [m.model.layers[0].mlp.up_proj.weight for m in (first, second, third)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_large_channels_are_spread() -> None:
    model = small_model("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 5] *= 100
        stream = streams(model)[1]
        rotate_model(model)
        turned = streams(model)[1]
    peak = [float((s.abs().amax(-1) / s.square().mean(-1).sqrt()).max()) for s in (stream, turned)]
    assert peak[0] > 5 and peak[1] < 0.6 * peak[0]


@pytest.mark.parametrize(
    ("name", "message"),
    [("opt", "OPTForCausalLM"), ("gpt2", "GPT2LMHeadModel"), ("bert", "BertModel"), ("gpt_neox", "GPTNeoXForCausalLM")],
)
def test_other_shapes_are_refused(name: str, message: str) -> None:
    model = small_model(name)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=f"expected one of Llama's shape, got {message}"):
        rotate_model(model)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_what_else_reads_the_stream_is_refused() -> None:
    model = small_model("llama")
    model.model.layers[1].mlp.extra = nn.Linear(72, 72)
    with pytest.raises(ValueError, match=r"it also holds model.layers.1.mlp.extra.weight"):
        rotate_model(model)
    model = small_model("llama")
    model.model.layers[2].input_layernorm = nn.LayerNorm(72)
    with pytest.raises(ValueError, match="a norm is LayerNorm"):
        rotate_model(model)
