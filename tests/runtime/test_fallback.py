"""The decoder over transformers: the same logits as one forward call, whatever the pieces."""

from __future__ import annotations

import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM

from effk.runtime import UnsupportedModel
from effk.runtime.fallback import HuggingFaceDecoder
from small_models import MODELS, VOCABULARY, small_model

# Two ways of adding up 104 products at most and 3 blocks: the tests of models use the same.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.mark.parametrize("name", [*MODELS, "gpt_neox"])
def test_pieces_slots_and_truncation(name: str) -> None:
    model = small_model(name)
    decoder = HuggingFaceDecoder(model)
    cache = decoder.cache(2, 40)
    generator = torch.Generator().manual_seed(1)
    ids, other = torch.randint(3, VOCABULARY, (2, 24), generator=generator).tolist()
    with torch.inference_mode():
        expected = model(torch.tensor([ids])).logits[0]
    decoder.step([(0, other)], cache, "none")
    first = decoder.step([(1, ids[:9])], cache, "all")
    torch.testing.assert_close(first, expected[:9], **CLOSE)
    decoder.step([(1, [3, 4, 5, 6])], cache)  # guesses that turn out wrong
    cache.truncate(1, 9)
    both = decoder.step([(1, ids[9:20]), (0, [7])], cache)
    torch.testing.assert_close(both[0], expected[19], **CLOSE)
    assert cache.lengths == [25, 20] and both.shape == (2, VOCABULARY) and both.dtype == torch.float32
    cache.truncate(0, 0)
    torch.testing.assert_close(decoder.step([(0, ids)], cache)[0], expected[-1], **CLOSE)
    assert cache.bytes == sum(cache.lengths) * cache.slots[0].layers[0].keys[0, :, 0].numel() * 4 * 2 * 3


def test_bad_steps_are_refused_before_any_work() -> None:
    decoder = HuggingFaceDecoder(small_model("llama"))
    cache = decoder.cache(2, 8)
    for runs in (
        [(2, [1])],
        [(0, [1]), (0, [2])],
        [(0, [])],
        [(0, [VOCABULARY])],
        [(0, [1] * 9)],
        [(1, [1]), (0, [-1])],
    ):
        with pytest.raises(ValueError, match="step: runs"):
            decoder.step(runs, cache)
    with pytest.raises(ValueError, match="logits"):
        decoder.step([(0, [1])], cache, "some")
    assert cache.lengths == [0, 0]
    with pytest.raises(ValueError, match="length"):
        cache.truncate(0, 1)


def test_models_without_keys_and_values_are_unsupported() -> None:
    model = MambaForCausalLM(MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, state_size=4))
    with pytest.raises(UnsupportedModel, match="Mamba"):
        HuggingFaceDecoder(model)
    with pytest.raises(UnsupportedModel, match="Bert"):
        HuggingFaceDecoder(small_model("bert"))
