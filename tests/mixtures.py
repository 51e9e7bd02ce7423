"""Random mixtures of experts of several architectures, small enough for every test."""

from __future__ import annotations

import torch
from torch import nn
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from small_models import VOCABULARY

_COMMON = {
    "vocab_size": VOCABULARY, "hidden_size": 72, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 2, "num_experts_per_tok": 2, "max_position_embeddings": 64, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False,
}  # fmt: skip

MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe")


def small_mixture(name: str, dtype: torch.dtype = torch.float32, **fields: object) -> PreTrainedModel:
    """Two blocks: "mixtral"; "qwen2_moe" with a dense first block and a shared expert; "qwen3_moe"."""
    torch.manual_seed(0)
    model: PreTrainedModel = {
        "mixtral": lambda: MixtralForCausalLM(
            MixtralConfig(**_COMMON | {"intermediate_size": 104, "num_local_experts": 4} | fields)
        ),
        "qwen2_moe": lambda: Qwen2MoeForCausalLM(
            Qwen2MoeConfig(
                **_COMMON | {"intermediate_size": 104, "moe_intermediate_size": 40, "num_experts": 6} | fields,
                shared_expert_intermediate_size=56, decoder_sparse_step=2,
            )
        ),
        "qwen3_moe": lambda: Qwen3MoeForCausalLM(
            Qwen3MoeConfig(
                **_COMMON | {"intermediate_size": 104, "moe_intermediate_size": 40, "num_experts": 5} | fields, head_dim=12
            )
        ),
    }[name]()  # fmt: skip
    return model.to(dtype).eval()


class ListOfExperts(nn.Module):
    """A mixture whose experts are modules of their own, as older models have them: each token by its best expert."""

    def __init__(self, width: int = 48, hidden: int = 64, experts: int = 3) -> None:
        super().__init__()
        self.gate = nn.Linear(width, experts)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width)) for _ in range(experts)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        best = self.gate(x).argmax(-1)
        return torch.stack([self.experts[int(e)](row) for e, row in zip(best, x, strict=True)])
