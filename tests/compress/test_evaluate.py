"""Perplexity by its definition, and the fixed texts."""

from __future__ import annotations

import math

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from effk import data
from effk.compress.evaluate import perplexity, token_windows
from small_models import VOCABULARY, small_model


class Characters:
    """A tokenizer: one id per character."""

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [ord(c) % VOCABULARY for c in text]}


def words() -> PreTrainedTokenizerFast:
    """Bytes and four merges, so that the tokens of a word depend on the space before it and on where the text was cut."""
    merges = [("a", "t"), ("t", "h"), ("th", "e"), ("Ġ", "the")]
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, merges)]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


class Fixed(nn.Module):
    """Predicts the same distribution everywhere, so that perplexity is a count."""

    def __init__(self, log_probabilities: Tensor) -> None:
        super().__init__()
        self.log_probabilities = nn.Parameter(log_probabilities)

    def forward(self, input_ids: Tensor, use_cache: bool):
        logits = self.log_probabilities.expand(*input_ids.shape, -1)
        return type("Output", (), {"logits": logits})


def test_definition_on_a_fixed_distribution() -> None:
    text = "abcabdabe" * 20
    probabilities = torch.rand(VOCABULARY, generator=torch.Generator().manual_seed(0)) + 0.1
    probabilities /= probabilities.sum()
    ids = [ord(c) % VOCABULARY for c in text[:40]]
    scored = [ids[w * 10 + t] for w in range(4) for t in range(1, 10)]  # the first token of each window is not
    expected = math.exp(-sum(math.log(float(probabilities[i])) for i in scored) / len(scored))
    model = Fixed(probabilities.log())
    assert perplexity(model, Characters(), text, context=10, windows=4) == pytest.approx(expected, rel=1e-6)


def test_windows_stand_alone_and_batches_change_nothing() -> None:
    model, text = small_model("llama"), data.evaluation_text()
    ids = token_windows(Characters(), text, 12, 5)
    with torch.no_grad():
        nll = 0.0
        for window in ids:
            logp = model(window[None]).logits[0, :-1].double().log_softmax(-1)
            nll -= float(logp.gather(1, window[1:, None]).sum())
    expected = math.exp(nll / (5 * 11))
    for batch in (1, 2, 5):
        assert perplexity(model, Characters(), text, 12, 5, batch=batch) == pytest.approx(expected, rel=1e-5)


def test_the_model_keeps_its_mode() -> None:
    model = small_model("llama").train()
    perplexity(model, Characters(), data.evaluation_text(), 8, 2)
    assert model.training


def test_token_windows() -> None:
    text = "".join(chr(i) for i in range(97)) * 2
    assert token_windows(Characters(), text, 4, 3).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    spread = token_windows(Characters(), text[:97], 4, 4, spread=True)
    assert spread[:, 0].tolist() == [0, 31, 62, 93], "the last window ends with the text"
    assert token_windows(Characters(), text, 4, 1, spread=True).tolist() == [[0, 1, 2, 3]]


def test_windows_are_of_one_tokenization_of_the_text_as_it_is() -> None:
    """From its first space on, nothing lost between windows or in words that lie in two of them, and cut nowhere: an odd
    length of line, so that pieces of any even size would end in the midst of tokens."""
    tokenizer, text = words(), "  the cat, the hat\n" * 400
    line = ["Ġ", "Ġthe", "Ġ", "c", "at", ",", "Ġthe", "Ġ", "h", "at", "Ċ"]
    windows = token_windows(tokenizer, text, 5, 880)
    assert tokenizer.convert_ids_to_tokens(windows.flatten().tolist()) == line * 400
    assert tokenizer.decode(windows.flatten()) == text
    spread = token_windows(tokenizer, text[: 3 * 19], 5, 4, spread=True)
    assert [tokenizer.decode(w) for w in spread] == ["  the cat", "at\n  the ", " hat\n ", ", the hat"]

    class Recorder(Fixed):
        def forward(self, input_ids: Tensor, use_cache: bool):
            seen.extend(input_ids.tolist())
            return super().forward(input_ids, use_cache)

    seen: list[list[int]] = []
    perplexity(Recorder(torch.zeros(300)), tokenizer, text, context=5, windows=880, batch=64)
    assert seen == windows.tolist()


@pytest.mark.parametrize(
    ("length", "count", "message"),
    [(1, 4, "length >= 2"), (4, 0, "count >= 1"), (64, 100, "at least 6400 tokens, got 50")],
)
def test_too_little_text(length: int, count: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        token_windows(Characters(), "x" * 50, length, count)


def test_texts_are_what_they_were_and_disjoint() -> None:
    evaluation, calibration = data.evaluation_text(), data.calibration_text()
    assert (len(evaluation), len(calibration)) == (199_373, 259_757)
    paragraphs = [{p for p in text.split("\n\n") if len(p) > 80} for text in (evaluation, calibration)]
    assert not paragraphs[0] & paragraphs[1]


def test_a_changed_text_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(data.SHA256, "evaluation", "0" * 64)
    with pytest.raises(ValueError, match=r"evaluation\.txt: expected SHA-256 0{64}, got"):
        data.evaluation_text()
