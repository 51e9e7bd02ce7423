"""Continuous batching: every sequence gets what it would get alone, and nobody suffers from another."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from effk.runtime.batch import Batch, Sequence
from effk.runtime.decoder import Decoder
from effk.runtime.fallback import HuggingFaceDecoder
from effk.runtime.limits import Limits
from effk.runtime.sampling import Sampling
from effk.runtime.speculative import NGramDrafter
from small_models import VOCABULARY, small_model

MODEL = small_model("llama", width=96)
DECODER, FALLBACK = Decoder.from_model(MODEL), HuggingFaceDecoder(MODEL)


def alone(prompt: list[int], new: int) -> list[int]:
    """What transformers generates."""
    ids = torch.tensor([prompt])
    out = MODEL.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    return out[0, len(prompt) :].tolist()


def prompts(count: int, seed: int = 0, longest: int = 30) -> list[list[int]]:
    source = random.Random(seed)
    return [[source.randrange(3, VOCABULARY) for _ in range(source.randrange(1, longest))] for _ in range(count)]


@settings(max_examples=12, deadline=None)
@given(st.sampled_from([DECODER, FALLBACK]), st.integers(0, 1000), st.integers(1, 5), st.integers(1, 40), st.booleans())
def test_batched_sequences_are_those_decoded_alone(decoder, seed: int, rows: int, piece: int, draft: bool) -> None:
    drafter = NGramDrafter(2, 1) if draft else None
    batch = Batch(decoder, cache="fp32", rows=rows, capacity=60, piece=piece, drafter=drafter)
    source = random.Random(seed)
    sequences = []
    for prompt in prompts(7, seed):
        limits = Limits(max_new_tokens=source.randrange(1, 20))
        sequences.append(batch.add(Sequence(prompt, limits=limits)))
        for _ in range(source.randrange(3)):  # arrive while others decode
            batch.step()
    batch.run()
    for sequence in sequences:
        assert sequence.tokens == alone(sequence.prompt, sequence.limits.max_new_tokens)
        assert sequence.finish == "length"
    assert batch.cache.lengths == [0] * rows and sorted(batch._free) == list(range(rows))


def test_samples_do_not_depend_on_company() -> None:
    def run(others: int) -> list[int]:
        batch = Batch(DECODER, cache="fp32", rows=4, capacity=60)
        for prompt in prompts(others, seed=3):
            batch.add(Sequence(prompt, Sampling(temperature=1.0, seed=5), Limits(max_new_tokens=9)))
        sampling = Sampling(temperature=1.5, top_k=40, top_p=0.95, seed=9)
        own = batch.add(Sequence([5, 6, 7], sampling, Limits(max_new_tokens=25)))
        batch.run()
        return own.tokens

    assert run(0) == run(6)


def test_a_long_prompt_does_not_hold_up_those_who_decode() -> None:
    batch = Batch(DECODER, cache="fp32", rows=3, capacity=60, piece=4)
    first = batch.add(Sequence([5], limits=Limits(max_new_tokens=30)))
    batch.step()
    long = batch.add(Sequence([9] * 32, limits=Limits(max_new_tokens=1)))
    short = batch.add(Sequence([7, 8], limits=Limits(max_new_tokens=1)))
    for count in range(2, 12):
        batch.step()
        assert len(first.tokens) == count  # one token per step throughout
    assert long.finish == "length"  # 32 tokens in 8 pieces, and one step for the short prompt
    assert short.times["ended"] < long.times["ended"]  # prompts take turns


def test_waiting_sequences_get_the_rows_in_order() -> None:
    batch = Batch(DECODER, cache="fp32", rows=2, capacity=20)
    sequences = [batch.add(Sequence([3 + n], limits=Limits(max_new_tokens=1 + n % 3))) for n in range(9)]
    ended: list[int] = []
    while len(ended) < 9:
        ended += [sequences.index(sequence) for sequence in batch.step() if sequence.finish]
        assert len(batch.running) <= 2
    assert all(abs(place - number) <= 2 for place, number in enumerate(ended))


def test_cancelling_frees_the_row_at_once() -> None:
    batch = Batch(DECODER, cache="fp32", rows=1, capacity=60)
    running = batch.add(Sequence([5], limits=Limits(max_new_tokens=50)))
    waiting = batch.add(Sequence([6], limits=Limits(max_new_tokens=50)))
    third = batch.add(Sequence([7], limits=Limits(max_new_tokens=4)))
    batch.step()
    running.cancelled = waiting.cancelled = True
    changed = batch.step()
    assert {running, waiting} <= set(changed) and running.finish == waiting.finish == "cancelled"
    assert len(running.tokens) == 1 and waiting.tokens == []
    batch.run()
    assert third.tokens == alone([7], 4)
    assert batch.close() == [] and not batch.running


def test_stop_tokens_and_least_lengths() -> None:
    expected = alone([5, 9], 20)
    stop = expected[6]
    early = expected.index(stop)
    batch = Batch(DECODER, cache="fp32", rows=2, capacity=60)
    first = batch.add(Sequence([5, 9], limits=Limits(max_new_tokens=20, stop_ids=frozenset({stop}))))
    limits = Limits(max_new_tokens=20, min_new_tokens=early + 3, stop_ids=frozenset({stop}))
    second = batch.add(Sequence([5, 9], limits=limits))
    batch.run()
    assert first.tokens == expected[: early + 1] and first.finish == "stop"
    assert second.tokens[:early] == expected[:early] and stop not in second.tokens[: early + 3]


class Faulty:
    """A decoder that fails whenever a token is fed, and has no numbers for another."""

    def __init__(self, fails_at: int, nan_at: int) -> None:
        self.fails_at, self.nan_at = fails_at, nan_at
        self.vocab_size, self.max_positions, self.cache = DECODER.vocab_size, DECODER.max_positions, DECODER.cache

    def step(self, runs, cache, logits="last"):
        out = DECODER.step(runs, cache, logits).clone()  # the cache has grown when the error comes
        if any(self.fails_at in ids for _, ids in runs):
            raise RuntimeError("broken")
        for row, (_, ids) in zip(out, runs, strict=True):
            if self.nan_at in ids:
                row.fill_(float("nan"))
        return out


def test_errors_end_the_sequence_that_causes_them_only() -> None:
    batch = Batch(Faulty(3, 4), cache="fp32", rows=6, capacity=60)

    def explode(token: int) -> bool:
        raise KeyError("watch")

    limits = Limits(max_new_tokens=6)
    good = [batch.add(Sequence(prompt, limits=limits)) for prompt in ([10, 11], [12])]
    bad = [
        batch.add(Sequence([9, 3], limits=limits)),
        batch.add(Sequence([9, 4], limits=limits)),
        batch.add(Sequence([9, 10], limits=limits, watch=explode)),
    ]
    batch.run()
    assert [type(sequence.error) for sequence in bad] == [RuntimeError, ValueError, KeyError]
    assert all(sequence.finish == "error" for sequence in bad)
    for sequence in good:  # greedy continuations that never feed 3 or 4
        expected = alone(sequence.prompt, 6)
        assert not {3, 4} & set(expected) and sequence.tokens == expected
    assert batch.cache.lengths == [0] * 6


@pytest.mark.parametrize(
    "sequence, message",
    [
        (Sequence([]), "at least one token"),
        (Sequence([VOCABULARY]), "ids from 0"),
        (Sequence([-1]), "ids from 0"),
        (Sequence([5] * 15, limits=Limits(max_new_tokens=6)), "at most 20 tokens"),
    ],
)
def test_prompts_that_cannot_run_are_refused(sequence: Sequence, message: str) -> None:
    batch = Batch(DECODER, cache="fp32", rows=1, capacity=20)
    with pytest.raises(ValueError, match=message):
        batch.add(sequence)
    assert not batch.waiting


def test_limits_are_checked() -> None:
    with pytest.raises(ValueError, match="max_new_tokens"):
        Limits(max_new_tokens=0)
    with pytest.raises(ValueError, match="min_new_tokens"):
        Limits(max_new_tokens=3, min_new_tokens=4)
