"""The decoder against transformers in float64, on every family, and what it promises beyond being close."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)  # fmt: skip

import effk
from effk.compress.passes.quik import Quik
from effk.compress.passes.rtn import Rtn
from effk.nn import WqLinear
from effk.nn.relu_ffn import SparseFFN
from effk.runtime.decoder import Decoder
from effk.runtime.errors import UnsupportedModel

VOCAB, WIDTH, INNER, LAYERS, HEADS = 199, 96, 208, 3, 6
_LLAMA = {
    "vocab_size": VOCAB, "hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS, "num_key_value_heads": 2, "max_position_embeddings": 700,
}  # fmt: skip
FAMILIES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_LLAMA, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4})),
    "llama tied, bias": lambda: LlamaForCausalLM(LlamaConfig(**_LLAMA, tie_word_embeddings=True, attention_bias=True, mlp_bias=True)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**_LLAMA, sliding_window=9)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**_LLAMA)),
    "opt": lambda: OPTForCausalLM(
        OPTConfig(
            vocab_size=VOCAB, hidden_size=WIDTH, ffn_dim=INNER, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
            max_position_embeddings=700, word_embed_proj_dim=WIDTH, pad_token_id=1, bos_token_id=2, eos_token_id=2,
        )
    ),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCAB, n_embd=WIDTH, n_inner=INNER, n_layer=LAYERS, n_head=HEADS, n_positions=700,
            bos_token_id=2, eos_token_id=2,
        )
    ),
}  # fmt: skip
# Terms in the sums that a value passes through, and roundings of activations to bf16 on the way: of a layer.
TERMS, ROUNDINGS = 4 * WIDTH + INNER, 12


def make(family: str) -> PreTrainedModel:
    model = FAMILIES[family]().eval()
    with torch.no_grad():  # away from the values that hide a missing bias, scale or position
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


def wanted(model: PreTrainedModel, ids: list[int]) -> Tensor:
    """Logits of transformers in float64, over the weights as ``model`` holds them."""
    with torch.inference_mode():
        return copy.deepcopy(model).double()(torch.tensor([ids])).logits[0]


def tokens(count: int) -> list[int]:
    return torch.randint(VOCAB, (count,)).tolist()


def feed(decoder: Decoder, ids: list[int], at_once: int, cache: str = "fp32") -> Tensor:
    """All logits: ``at_once`` tokens in one step, then one by one."""
    room = decoder.cache(2, len(ids), cache)
    return torch.cat(
        [decoder.step([(1, ids[:at_once])], room, "all"), *(decoder.step([(1, [i])], room) for i in ids[at_once:])]
    )


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_transformers(tier: str, family: str) -> None:
    model, ids = make(family), tokens(20)
    exact = wanted(model, ids)
    got = feed(Decoder.from_model(model), ids, 13)
    error = (got - exact).abs().max()
    assert error <= 2**-24 * LAYERS * TERMS * exact.abs().max()


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_transformers_in_bf16(family: str) -> None:
    model, ids = make(family).to(torch.bfloat16), tokens(20)
    exact = wanted(model, ids)
    decoder = Decoder.from_model(model)
    assert decoder.dtype == "bf16"
    error = (feed(decoder, ids, 13) - exact).abs().max()
    assert error <= 2**-9 * LAYERS * ROUNDINGS * exact.abs().max()


@pytest.mark.parametrize("cache,step", [("fp16", 2**-11), ("int8", 2**-7)])
def test_cache_costs_its_rounding(cache: str, step: float) -> None:
    model, ids = make("llama"), tokens(40)
    exact = wanted(model, ids)
    decoder = Decoder.from_model(model)
    close, rounded = feed(decoder, ids, 20), feed(decoder, ids, 20, cache)
    change = (rounded - close).abs().max() / exact.abs().max()
    assert 0 < change <= 4 * LAYERS * step  # of a key, a value and the two sums that they enter, per layer
    assert torch.equal(rounded, feed(decoder, ids, 33, cache))  # however the sequence is fed


@pytest.mark.parametrize("compute", ("int8", "float"))
@pytest.mark.parametrize("bits", (3, 4))
def test_compressed_layers(compute: str, bits: int) -> None:
    """The logits of the compressed model itself, which runs the same products in the same order."""
    model, ids = make("llama tied, bias"), tokens(20)
    effk.compress(model, Rtn(bits=bits, group_size=64, compute=compute, embedding_bits=8))
    with torch.inference_mode():
        exact = model(torch.tensor([ids])).logits[0]
    decoder = Decoder.from_model(model)
    assert isinstance(model.model.layers[0].mlp.up_proj, WqLinear)
    error = (feed(decoder, ids, 13) - exact).abs().max()
    # A last bit of difference may move a rounded activation by a step of 1 / 127 of its group.
    allowed = 2**-24 * LAYERS * TERMS if compute == "float" else LAYERS * ROUNDINGS / 127 / WIDTH**0.5
    assert error <= allowed * exact.abs().max()
    with torch.inference_mode():  # the model's weights moved; they are what they were
        assert torch.equal(model(torch.tensor([ids])).logits[0], exact)


def test_quik_layers() -> None:
    model, ids = make("llama"), tokens(20)
    effk.compress(model, Quik(bits=8, bits_a=8, outliers=16), calib=[torch.randint(VOCAB, (4, 32))])
    with torch.inference_mode():
        exact = model(torch.tensor([ids])).logits[0]
    error = (feed(Decoder.from_model(model), ids, 20) - exact).abs().max()
    assert error <= LAYERS * ROUNDINGS / 127 / WIDTH**0.5 * exact.abs().max()


@pytest.mark.parametrize("rows", ("fp32", "bf16"))
def test_sparse_networks(rows: str) -> None:
    """Networks that skip neurons, exactly; more than eight tokens and one."""
    model, ids = make("llama"), tokens(20)
    model.config.hidden_act = "relu"
    for layer in model.model.layers:
        mlp = layer.mlp
        mlp.act_fn = torch.nn.ReLU()
        if rows == "bf16":
            for linear in (mlp.gate_proj, mlp.up_proj, mlp.down_proj):
                linear.weight.data = linear.weight.data.bfloat16().float()
    exact = wanted(model, ids)
    for layer in model.model.layers:
        parts = (getattr(layer.mlp, name).weight for name in ("gate_proj", "up_proj", "down_proj"))
        layer.mlp = SparseFFN.from_weights(*parts, rows=rows)
    error = (feed(Decoder.from_model(model), ids, 13) - exact).abs().max()
    assert error <= 2**-24 * LAYERS * TERMS * exact.abs().max()
    model.model.layers[1].mlp.selector = torch.nn.Identity()
    with pytest.raises(UnsupportedModel, match="SparseFFN without selector, got SparseFFN"):
        Decoder.from_model(model)


@pytest.mark.parametrize("family", ("llama", "opt", "gpt2"))
def test_row_depends_on_neither_batch_nor_threads(family: str, two_threads: None) -> None:
    """Bit for bit: alone, beside others, in another slot, with other threads, and over chunks of a long prompt."""
    decoder = Decoder.from_model(make(family))
    ids, others = tokens(9), [tokens(n) for n in (1, 5, 17)]
    torch.set_num_threads(1)
    alone = feed(decoder, ids, 9, "fp16")[-1]
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        room = decoder.cache(4, 64)
        together = decoder.step([(2, others[0]), (0, others[1]), (3, ids), (1, others[2])], room)
        assert torch.equal(together[2], alone), threads
        assert room.lengths == [5, 17, 1, 9]


def test_long_prompts_are_cut() -> None:
    decoder = Decoder.from_model(make("llama"))
    first, second = tokens(600), tokens(650)
    room = decoder.cache(3, 700)
    got = decoder.step([(0, first), (2, second)], room)
    assert room.lengths == [600, 0, 650]
    apart = decoder.cache(1, 700)
    decoder.step([(0, second[:300])], apart, "none")
    assert torch.equal(decoder.step([(0, second[300:])], apart)[0], got[1])
    every = decoder.step([(0, first)], decoder.cache(1, 700), "all")
    assert every.shape == (600, VOCAB)
    assert torch.equal(every[-1], got[0])


def test_truncated_positions_are_forgotten() -> None:
    decoder, ids = Decoder.from_model(make("llama")), tokens(12)
    room = decoder.cache(1, 40)
    decoder.step([(0, ids)], room)
    decoder.step([(0, tokens(20))], room)
    room.truncate(0, 12)
    follow = tokens(3)
    fresh = decoder.cache(1, 40)
    decoder.step([(0, ids)], fresh)
    assert torch.equal(decoder.step([(0, follow)], room, "all"), decoder.step([(0, follow)], fresh, "all"))


def test_bad_calls_change_nothing() -> None:
    decoder = Decoder.from_model(make("llama"))
    room = decoder.cache(2, 8)
    decoder.step([(0, [1, 2, 3])], room)
    for runs, message in (
        ([(0, [1] * 6)], "expected 1 to 5 tokens for slot 0, got 6"),
        ([(1, [])], "expected 1 to 8 tokens for slot 1, got 0"),
        ([(2, [1])], "expected slots 0 to 1"),
        ([(1, [1]), (1, [2])], "each once, got 1"),
    ):
        with pytest.raises(ValueError, match=message):
            decoder.step(runs, room)
    with pytest.raises(RuntimeError, match=f"decoder_step: tokens: expected 0 to {VOCAB - 1}, got {VOCAB}"):
        decoder.step([(1, [VOCAB])], room)
    with pytest.raises(ValueError, match="logits: expected 'last', 'all' or 'none', got 'first'"):
        decoder.step([(1, [1])], room, "first")
    assert room.lengths == [3, 0]
    for slot, length in ((2, 0), (0, 4), (0, -1)):
        with pytest.raises(ValueError, match=r"KVCache\.truncate"):
            room.truncate(slot, length)
    with pytest.raises(ValueError, match="capacity: expected at most 700"):
        decoder.cache(1, 701)
    with pytest.raises(ValueError, match="dtype: expected one of"):
        decoder.cache(1, 7, "fp8")


def test_unknown_structures_are_refused() -> None:
    with pytest.raises(UnsupportedModel, match="expected one of .*'llama'.* got 'qwen3'"):
        Decoder.from_model(Qwen3ForCausalLM(Qwen3Config(**_LLAMA, head_dim=16)))
    model = FAMILIES["llama"]()
    model.model.layers[1].mlp.up_proj = torch.nn.Identity()
    with pytest.raises(UnsupportedModel, match="expected Linear, .* got Identity"):
        Decoder.from_model(model)
    model.model.layers[1].mlp = torch.nn.Identity()
    with pytest.raises(UnsupportedModel, match="no attribute 'gate_proj'"):
        Decoder.from_model(model)
    dynamic = LlamaForCausalLM(
        LlamaConfig(**_LLAMA, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
    )
    with pytest.raises(UnsupportedModel, match="frequencies that do not depend on the length"):
        Decoder.from_model(dynamic)


def test_dies_with_its_handle() -> None:
    decoder = Decoder.from_model(make("llama"))
    room = decoder.cache(1, 8)
    number = decoder._handle.clone()
    decoder._handle = number
    with pytest.raises(RuntimeError, match="decoder_step: decoder: expected what decoder_create returned, alive"):
        decoder.step([(0, [1])], room)
