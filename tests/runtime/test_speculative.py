"""Guessing ahead changes nothing but the time: equal tokens when greedy, equal frequencies when sampling."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from effk.runtime.batch import Batch, Sequence
from effk.runtime.decoder import Decoder
from effk.runtime.fallback import HuggingFaceDecoder
from effk.runtime.limits import Limits
from effk.runtime.sampling import Sampler, Sampling
from effk.runtime.speculative import ModelDrafter, NGramDrafter, early_exit, verify
from small_models import MODELS, VOCABULARY, small_model


def decode(decoder, drafter, prompt: list[int], **options) -> Sequence:
    batch = Batch(decoder, cache="fp32", rows=1, capacity=64, drafter=drafter)
    limits = Limits(max_new_tokens=40, stop_ids=options.pop("stop_ids", frozenset()))
    sequence = batch.add(Sequence(prompt, Sampling(**options), limits))
    batch.run()
    return sequence


class Oracle:
    """Knows the tokens that are to come, but for some."""

    def __init__(self, tokens: list[int], wrong: set[int]) -> None:
        self.tokens = [VOCABULARY - 1 if place in wrong else token for place, token in enumerate(tokens)]

    def begin(self, capacity: int) -> Oracle:
        return self

    def propose(self, ids: list[int], count: int) -> list[int]:
        assert 1 <= count <= 7
        return self.tokens[len(ids) : len(ids) + count]

    def close(self) -> None:
        pass


def runs(name: str) -> tuple[nn.Module, Callable]:
    """A model, and what makes decoders of it and of its first blocks: transformers' forward for "qwen2", whose layers differ in
    their windows."""
    return small_model(name, width=96), HuggingFaceDecoder if name == "qwen2" else Decoder.from_model


@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens_are_the_same(name: str) -> None:
    model, make = runs(name)
    decoder = make(model)
    prompt = [5, 6, 7, 5, 6]
    plain = decode(decoder, None, prompt).tokens
    for drafter in (NGramDrafter(3, 1), ModelDrafter(make(early_exit(model, 2)), "fp32")):
        assert decode(decoder, drafter, prompt).tokens == plain
    guessed = decode(decoder, Oracle(prompt + plain, {9, 10, 22}), prompt)
    assert guessed.tokens == plain
    assert guessed.accepted > 25 and guessed.drafted > guessed.accepted  # both ways were taken
    stop = frozenset({plain[11]})
    for drafter in (None, Oracle(prompt + plain, set())):
        stopped = decode(decoder, drafter, prompt, stop_ids=stop)
        assert stopped.tokens == plain[: plain.index(plain[11]) + 1] and stopped.finish == "stop"


def test_greedy_with_a_repetition_penalty_is_the_same() -> None:
    decoder = Decoder.from_model(small_model("llama", width=96))
    plain = decode(decoder, None, [5, 6], repetition_penalty=1.4).tokens
    guessed = decode(decoder, Oracle([5, 6, *plain], {8, 20}), [5, 6], repetition_penalty=1.4)
    assert guessed.tokens == plain


@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"top_p": 0.7, "temperature": 0.8}], ids=str)
def test_sampled_tokens_have_the_same_distribution(options: dict) -> None:
    vocab, runs = 12, 6000
    rows = np.random.default_rng(0).normal(scale=1.5, size=(3, vocab)).astype(np.float32)
    sampling = Sampling(**{"temperature": 1.0, "seed": 3} | options)
    sampler = Sampler(sampling, vocab)
    single = np.zeros((3, vocab))
    for place, row in enumerate(rows):
        choices = sampler.choices(row)
        single[place, slice(None) if choices.ids is None else choices.ids] = choices.weights
    single /= single.sum(1, keepdims=True)
    best, rare = int(single[0].argmax()), int(single[1].argmin())  # a guess that is likely, and one that is not
    draft = [best, rare]
    firsts, seconds, lengths = np.zeros(vocab), np.zeros(vocab), np.zeros(4)
    for _ in range(runs):
        tokens = verify(sampler, rows, draft)
        lengths[len(tokens)] += 1
        firsts[tokens[0]] += 1
        if len(tokens) > 1:
            assert tokens[0] == best
            seconds[tokens[1]] += 1
    for counts, expected in ((firsts, single[0]), (seconds, single[1])):
        total = counts.sum()
        assert counts[expected == 0].sum() == 0
        # 24 counts, each beyond 4.5 standard deviations with probability 7e-6
        assert (np.abs(counts - total * expected) <= 4.5 * np.sqrt(total * expected * (1 - expected)) + 1e-9).all()
    assert lengths[1] == runs - firsts[best]


def test_prompt_lookup_proposes_what_followed_and_goes_round() -> None:
    draft = NGramDrafter(3, 2).begin(100)
    assert draft.propose([1, 2, 3], 4) == []
    assert draft.propose([1, 2, 3, 9, 1, 2], 2) == [3, 9]
    assert draft.propose([1, 2, 3, 9, 1, 2], 6) == [3, 9, 1, 2, 3, 9]
    assert draft.propose([1, 2, 3, 9, 1, 2, 8, 2, 3, 7, 1, 2], 1) == [8]  # the latest of several


def test_drafts_of_a_model_are_what_it_would_generate() -> None:
    model = small_model("llama", width=96)
    shallow = early_exit(model, 1)
    assert len(shallow.model.layers) == 1 and len(model.model.layers) == 3 and model.config.num_hidden_layers == 3
    assert shallow.lm_head.weight is model.lm_head.weight
    draft = ModelDrafter(Decoder.from_model(shallow), "fp32").begin(40)
    for ids in ([5, 6, 7], [5, 6, 7, 8, 9], [5, 6, 7, 8, 9, 10, 11, 12]):
        inputs = torch.tensor([ids])
        out = shallow.generate(inputs, max_new_tokens=4, do_sample=False, eos_token_id=-1, pad_token_id=0)
        assert draft.propose(ids, 4) == out[0, len(ids) :].tolist()


def test_early_exit_refuses_depths_that_are_not_there() -> None:
    for blocks in (0, 3):
        with pytest.raises(ValueError, match="blocks"):
            early_exit(small_model("llama"), blocks)


def test_guesses_that_are_all_wrong_become_few() -> None:
    decoder = Decoder.from_model(small_model("llama", width=96))
    plain = decode(decoder, None, [5, 6, 7]).tokens
    wrong = decode(decoder, Oracle([5, 6, 7, *plain], set(range(64))), [5, 6, 7])
    assert VOCABULARY - 1 not in plain and wrong.tokens == plain
    assert wrong.accepted == 0 and 2 <= wrong.drafted <= 7  # 2 tokens at once, then 1 after 1, 3, 7, 15 others
