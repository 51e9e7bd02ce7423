"""Memory is what was predicted before loading, and the cache is all of it that grows."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import effk
from bench.memory import measure
from effk.compress.passes.rtn import Rtn
from effk.runtime.memory import predict


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_as_predicted(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=512, intermediate_size=2048, num_hidden_layers=4, num_attention_heads=8,
        max_position_embeddings=1024, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    effk.compress(model, Rtn(bits=8, group_size=64, embedding_bits=8))
    found = measure(effk.save(model, tmp_path / "model"), sequences=4, capacity=1024, cache="fp32")
    predicted, measured = found["predicted"], found["measured"]
    assert predicted["cache"] == 4 * 2 * 4 * 1024 * 512 * 4  # layers, k and v, sequences, positions, width, bytes
    assert 0.95 <= found["ratio"] <= 1.05, found
    # An empty cache is not there yet; the weights are, once: twice they would be 20 MB more.
    assert abs(measured["made"] - predicted["weights"]) < 8e6


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="weights"):
        predict(tmp_path, 1, 16)
