"""Random models of several architectures, small enough for every test, and the least method there can be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from effk.compress import Context, Handler, Layer, LayerPlan, Plan, Recipe, register
from effk.compress.calibrate import LayerStats
from effk.compress.recipe import expect_bits, expect_group_size
from effk.formats.wq import WqWeight, csr_from_mask, num_groups

VOCABULARY = 97
_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_LLAMA = _IDS | {
    "vocab_size": VOCABULARY, "hidden_size": 72, "intermediate_size": 104, "num_hidden_layers": 3,
    "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
_PLAIN = _IDS | {
    "vocab_size": VOCABULARY, "hidden_size": 72, "intermediate_size": 104, "num_hidden_layers": 3,
    "num_attention_heads": 6, "max_position_embeddings": 64,
}  # fmt: skip


def small_model(name: str, dtype: torch.dtype = torch.float32, width: int = 72) -> nn.Module:
    """A three-block model: "llama" (tied head), "qwen2" (biases, sliding windows), "mistral", "opt", "gpt2", "gpt_neox";
    or the encoder "bert". It has six heads; the runtime's decoder takes those of 16, which a width of 96 gives."""
    torch.manual_seed(0)
    size = {"hidden_size": width}
    model: nn.Module = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**_LLAMA | size, tie_word_embeddings=True)),
        "qwen2": lambda: Qwen2ForCausalLM(
            Qwen2Config(
                **_LLAMA | size, tie_word_embeddings=False, use_sliding_window=True, sliding_window=4, max_window_layers=1
            )
        ),
        "mistral": lambda: MistralForCausalLM(MistralConfig(**_LLAMA | size, sliding_window=4)),
        "opt": lambda: OPTForCausalLM(
            OPTConfig(
                **_IDS, vocab_size=VOCABULARY, hidden_size=width, ffn_dim=104, num_hidden_layers=3, num_attention_heads=6,
                word_embed_proj_dim=width, max_position_embeddings=64,
            )
        ),
        "gpt2": lambda: GPT2LMHeadModel(
            GPT2Config(**_IDS, vocab_size=VOCABULARY, n_embd=width, n_layer=3, n_head=6, n_positions=64)
        ),
        "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**_PLAIN | size)),
        "bert": lambda: BertModel(BertConfig(**_PLAIN | size)),
    }[name]()  # fmt: skip
    for parameter in model.parameters():  # transformers starts biases at zero, where a lost one would not show
        if parameter.dim() == 1:
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model.to(dtype).eval()


MODELS = ("llama", "qwen2", "mistral", "opt", "gpt2")
FEEDFORWARDS = (*MODELS, "gpt_neox", "bert")  # those whose feed-forward networks can be replaced


def token_batches(count: int = 2, length: int = 16, seed: int = 0) -> list[Tensor]:
    """``count`` batches of two sequences of random ids."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (2, length), generator=generator) for _ in range(count)]


@dataclass(frozen=True, kw_only=True)
class Nearest(Recipe):
    """Symmetric rounding to nearest with the largest weights as outliers: enough to drive the compression core."""

    name: ClassVar[str] = "test-nearest"
    version: ClassVar[int] = 1

    bits: int = 8
    group_size: int = 32
    outliers: float = 0.0
    hessian: bool = False

    def check(self) -> None:
        super().check()
        expect_bits(self)
        expect_group_size(self)


@register(Nearest)
class NearestHandler(Handler):
    def statistics(self, recipe: Nearest) -> frozenset[str]:
        return frozenset({"hessian"} if recipe.hessian else ())

    def plan(self, context: Context) -> Plan:
        layers = {}
        for layer in context.layers:
            own = context.recipe.for_layer(layer.name)
            layers[layer.name] = LayerPlan(
                bits=own.bits, group_size=own.group_size, outliers=own.outliers, compute=own.compute
            )
        return Plan(context.recipe.to_json(), layers)

    def quantize(
        self, context: Context, layer: Layer, weight: Tensor, entry: LayerPlan, stats: LayerStats | None
    ) -> WqWeight:
        n, k = weight.shape
        mask = torch.zeros(n * k, dtype=torch.bool)
        mask[weight.abs().flatten().topk(int(entry.outliers * n * k + 1e-9)).indices] = True
        mask = mask.reshape(n, k)
        groups = num_groups(k, entry.group_size)
        width = entry.group_size or k
        inner = torch.nn.functional.pad(weight.masked_fill(mask, 0.0), (0, groups * width - k)).reshape(
            n, groups, width
        )
        half = 1 << (entry.bits - 1)
        scales = (inner.abs().amax(-1) / max(1, half - 1)).clamp_min(2.0**-14).half()
        codes = (inner / scales.float().unsqueeze(-1)).round().clamp(-half, half - 1) + half
        sparse = csr_from_mask(weight, mask) if entry.outliers else None
        codes = codes.to(torch.uint8).flatten(1)[:, :k]
        return WqWeight.from_codes(codes, scales, bits=entry.bits, group_size=entry.group_size, outliers=sparse)
