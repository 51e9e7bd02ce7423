"""Choosing tokens: the same candidates as transformers' warpers, and draws in proportion."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from effk.runtime.sampling import Choices, Sampler, Sampling, log_probabilities

VOCAB = 311


def logits(seed: int, scale: float = 3.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(scale=scale, size=VOCAB).astype(np.float32)


def probabilities(choices: Choices) -> np.ndarray:
    dense = np.zeros(VOCAB)
    dense[slice(None) if choices.ids is None else choices.ids] = choices.weights
    return dense / dense.sum()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.3},
        {"top_k": 1},
        {"top_k": 17, "temperature": 2.0},
        {"top_p": 0.05},
        {"top_p": 0.9},
        {"top_p": 0.999, "temperature": 3.0},
        {"min_p": 0.1},
        {"repetition_penalty": 1.7},
        {"repetition_penalty": 1.3, "temperature": 0.8, "top_k": 40, "top_p": 0.8, "min_p": 0.05},
    ],
    ids=str,
)
@pytest.mark.parametrize("scale", [0.1, 3.0])
def test_probabilities_are_those_of_transformers(options: dict, scale: float) -> None:
    options = {"temperature": 1.0} | options
    prompt, row = [5, 9, 9, 300], logits(1, scale)
    warpers = LogitsProcessorList()
    if "repetition_penalty" in options:
        warpers.append(RepetitionPenaltyLogitsProcessor(options["repetition_penalty"]))
    warpers.append(TemperatureLogitsWarper(options["temperature"]))
    if "top_k" in options:
        warpers.append(TopKLogitsWarper(options["top_k"]))
    if "top_p" in options:
        warpers.append(TopPLogitsWarper(options["top_p"]))
    if "min_p" in options:
        warpers.append(MinPLogitsWarper(options["min_p"]))
    expected = warpers(torch.tensor([prompt]), torch.tensor(row)[None].clone()).double().softmax(-1)[0].numpy()
    got = probabilities(Sampler(Sampling(**options), VOCAB, prompt).choices(row))
    assert np.array_equal(got > 0, expected > 0)
    # Logits below 2^4 are rounded to 2^-20 in both, then exp, then a division: relative errors of a few 2^-20.
    np.testing.assert_allclose(got, expected, rtol=2.0**-17 / options["temperature"])


def test_a_nucleus_takes_as_few_of_equally_likely_tokens_as_it_needs() -> None:
    row = np.zeros(VOCAB, dtype=np.float32)
    row[[3, 8]] = 2.0
    kept = Sampler(Sampling(temperature=1.0, top_p=0.5), VOCAB).choices(row)
    e2 = np.exp(2.0)
    needed = int(np.ceil(0.5 * (2 * e2 + VOCAB - 2) - 2 * e2))  # tokens of weight 1 beside the two
    others = [token for token in range(VOCAB) if token not in (3, 8)][:needed]
    assert kept.ids.tolist() == sorted([3, 8, *others])


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 2000), st.floats(0, 1, exclude_max=True))
def test_a_draw_is_the_quantile_of_the_cumulated_weights(seed: int, count: int, uniform: float) -> None:
    weights = np.random.default_rng(seed).integers(0, 4, count).astype(np.float32)  # sums without rounding
    weights[seed % count] = 1
    cumulated = np.cumsum(weights, dtype=np.float64)
    token = Choices(None, weights).draw(uniform)
    below = cumulated[token - 1] if token else 0.0
    assert weights[token] > 0 and below <= uniform * cumulated[-1] <= cumulated[token]


def test_frequencies_match_probabilities() -> None:
    sampler = Sampler(Sampling(temperature=1.5, top_k=8, seed=11), VOCAB)
    row, draws = logits(2), 4000
    expected = probabilities(sampler.choices(row))
    counts = np.bincount([sampler.choose(row) for _ in range(draws)], minlength=VOCAB)
    assert counts[expected == 0].sum() == 0
    spread = np.sqrt(draws * expected * (1 - expected))
    assert (np.abs(counts - draws * expected) <= 4 * spread + 1e-9).all()  # 8 counts, each beyond with p = 6e-5


def test_greedy_takes_the_first_of_equals_and_leaves_the_logits_alone() -> None:
    row = logits(3)
    row[[40, 200]] = 50.0
    before = row.copy()
    sampler = Sampler(Sampling(repetition_penalty=2.0), VOCAB)
    assert [sampler.choose(row), sampler.choose(row), sampler.choose(row, [200])] == [40, 200, 40]
    assert np.array_equal(row, before)


def test_seeds_repeat_and_differ() -> None:
    row = logits(4, 0.5)

    def run(seed: int | None) -> list[int]:
        sampler = Sampler(Sampling(temperature=1.0, seed=seed), VOCAB)
        return [sampler.choose(row) for _ in range(20)]

    assert run(7) == run(7) != run(8)
    assert run(None) != run(None)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_no_numbers_are_refused(temperature: float, bad: float) -> None:
    row = logits(5)
    row[7] = bad
    with pytest.raises(ValueError, match="finite"):
        Sampler(Sampling(temperature=temperature), VOCAB).choose(row)


def test_tiny_temperatures_are_greedy() -> None:
    row = logits(6)
    assert Sampler(Sampling(temperature=1e-30, top_p=0.9), VOCAB).choose(row) == int(row.argmax())


@pytest.mark.parametrize(
    "name, value",
    [("temperature", -1), ("temperature", float("nan")), ("top_k", -1), ("top_p", 0), ("top_p", 1.1), ("min_p", 2),
     ("repetition_penalty", 0), ("seed", -1)],
)  # fmt: skip
def test_values_out_of_range_are_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        Sampling(**{name: value})


def test_log_probabilities() -> None:
    row = logits(7)
    expected = torch.tensor(row).double().log_softmax(-1)
    value, best = log_probabilities(row, 12, 5)
    assert value == pytest.approx(expected[12].item(), rel=1e-6)
    top = expected.topk(5)
    assert [token for token, _ in best] == top.indices.tolist()
    assert [entry for _, entry in best] == pytest.approx(top.values.tolist(), rel=1e-6)
