"""Choosing the next token from logits.

Filters apply in the order and with the meaning that transformers gives them: repetition penalty, temperature, top-k,
top-p, min-p; each acts on what the previous one left. On logits of 49152 tokens (one thread of a Zen 5) greedy takes
2.5 us, temperature 45, top-k 78, top-p 60 to 120 (250 where thousands of tokens are equally likely): numpy's ``argmax``
and ``sort`` are vectorised, PyTorch's take ten times as long. A nucleus is found without sorting the vocabulary: tokens
less likely than (1 - p) / vocabulary cannot be in it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

_LIKELY = 2.0**-7  # of the likeliest token's probability: a first guess at the last token of a nucleus
_BLOCK = 256  # entries that a draw adds up one by one; the sums of blocks are vectorised


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        temperature: 0 always takes the likeliest token (of several, the lowest id); else logits are divided by it.
        top_k: only the so many likeliest tokens, and those as likely as the last of them; 0: all.
        top_p: only the likeliest tokens that together reach this probability; 1: all.
        min_p: only tokens at least so likely, as a fraction of the likeliest; 0: all.
        repetition_penalty: divides positive and multiplies negative logits of tokens that occurred (Keskar et al. 2019,
            arXiv:1909.05858, section 4.1); 1: none.
        seed: of this sequence's own random numbers; None: another one each time.

    Raises:
        ValueError: a value out of its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, good, expected in (
            ("temperature", 0 <= self.temperature < math.inf, "0 or a positive number"),
            ("top_k", self.top_k >= 0, "0 or a positive number"),
            ("top_p", 0 < self.top_p <= 1, "a number above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "a number from 0 to 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "a positive number"),
            ("seed", self.seed is None or self.seed >= 0, "none, 0 or a positive number"),
        ):
            if not good:
                raise ValueError(f"{name}: expected {expected}, got {getattr(self, name)}")


@dataclass(frozen=True)
class Choices:
    """Tokens with weights in proportion to their probabilities.

    Attributes:
        ids: increasing; None: every token.
        weights: fp32, of each id.
    """

    ids: np.ndarray | None
    weights: np.ndarray

    def keep(self, kept: np.ndarray) -> Choices:
        """The tokens at the positions ``kept`` only."""
        return Choices(kept if self.ids is None else self.ids[kept], self.weights[kept])

    def probability(self, token: int) -> float:
        """Of one token."""
        index = self._index(token)
        return 0.0 if index is None else float(self.weights[index]) / float(self.weights.sum(dtype=np.float64))

    def without(self, token: int) -> Choices:
        """The same with one token impossible."""
        weights, index = self.weights.copy(), self._index(token)
        if index is not None:
            weights[index] = 0
        return Choices(self.ids, weights)

    def draw(self, uniform: float) -> int:
        """The token at ``uniform``, in [0, 1), of the cumulated probability."""
        index = _place(self.weights, uniform, "right")
        while self.weights[index] == 0:  # sums of blocks round differently: past the last possible token of one
            index -= 1
        return int(index if self.ids is None else self.ids[index])

    def _index(self, token: int) -> int | None:
        if self.ids is None:
            return token
        index = int(np.searchsorted(self.ids, token))
        return index if index < len(self.ids) and self.ids[index] == token else None


class Sampler:
    """Chooses the tokens of one sequence; keeps its random numbers and which tokens occurred.

    Args:
        sampling: how.
        vocab: size of the vocabulary.
        prompt: ids that count as having occurred.
    """

    def __init__(self, sampling: Sampling, vocab: int, prompt: Sequence[int] = ()) -> None:
        self.sampling = sampling
        self.greedy = sampling.temperature == 0
        self.random = np.random.Generator(np.random.PCG64(sampling.seed))
        self.seen: np.ndarray | None = None
        if sampling.repetition_penalty != 1:
            self.seen = np.zeros(vocab, dtype=bool)
            self.seen[np.asarray(prompt, dtype=np.int64)] = True

    def choose(self, logits: np.ndarray, forbidden: Sequence[int] = ()) -> int:
        """The next token, from fp32 logits ``[vocab]``, which stay as they are.

        Args:
            logits: of the model.
            forbidden: ids that must not come.

        Raises:
            ValueError: the logits have a NaN or no finite maximum.
        """
        token = self.argmax(logits, forbidden) if self.greedy else self._draw(logits, forbidden)
        self.note(token)
        return token

    def note(self, token: int) -> None:
        """A token occurred that was not chosen here."""
        if self.seen is not None:
            self.seen[token] = True

    def argmax(self, logits: np.ndarray, forbidden: Sequence[int] = ()) -> int:
        """The likeliest token after the penalty."""
        logits = self._penalised(logits, forbidden)
        token = int(logits.argmax())
        _expect_finite(logits[token])
        return token

    def choices(self, logits: np.ndarray, forbidden: Sequence[int] = ()) -> Choices:
        """What a token is drawn from."""
        logits = self._penalised(logits, forbidden)
        largest = logits.max()
        _expect_finite(largest)
        sampling = self.sampling
        weights = logits - largest
        weights *= np.float32(1 / max(sampling.temperature, 1e-30))
        np.exp(weights, out=weights)  # the likeliest token has the weight 1
        choices = Choices(None, weights)
        if 0 < sampling.top_k < len(weights):
            smallest = np.partition(weights, -sampling.top_k)[-sampling.top_k]
            choices = choices.keep(np.flatnonzero(weights >= smallest))
        if sampling.top_p < 1:
            choices = _nucleus(choices, sampling.top_p)
        if sampling.min_p > 0:
            choices = choices.keep(np.flatnonzero(choices.weights >= np.float32(sampling.min_p)))
        return choices

    def _draw(self, logits: np.ndarray, forbidden: Sequence[int]) -> int:
        return self.choices(logits, forbidden).draw(self.random.random())

    def _penalised(self, logits: np.ndarray, forbidden: Sequence[int]) -> np.ndarray:
        if self.seen is not None:
            penalty = np.float32(self.sampling.repetition_penalty)
            logits = logits.copy()
            values = logits[self.seen]
            logits[self.seen] = np.where(values > 0, values / penalty, values * penalty)
        elif forbidden:
            logits = logits.copy()
        if forbidden:
            logits[list(forbidden)] = -np.inf
        return logits


def log_probabilities(logits: np.ndarray, token: int, top: int) -> tuple[float, list[tuple[int, float]]]:
    """Natural logarithms of probabilities under the model itself, before any filter.

    Args:
        logits: fp32 ``[vocab]``.
        token: the one that was chosen.
        top: how many of the likeliest come along.

    Returns:
        The token's, and pairs of id and value from the likeliest down.
    """
    largest = logits.max()
    total = float(largest) + math.log(float(np.exp(logits - largest).sum(dtype=np.float64)))
    best: list[int] = []
    if top:
        candidates = np.argpartition(logits, -top)[-top:]
        best = candidates[np.lexsort((candidates, -logits[candidates]))].tolist()
    return float(logits[token]) - total, [(index, float(logits[index]) - total) for index in best]


def _nucleus(choices: Choices, p: float) -> Choices:
    """The fewest tokens, likeliest first and lower ids before higher ones, whose share of the weights reaches ``p``."""
    total = float(choices.weights.sum())
    # All tokens below the last floor together weigh less than 1 - p, half of it to be safe from rounding. Mostly the few
    # above the first one are enough, and quick to sort.
    for floor in (_LIKELY, (1 - p) * total / len(choices.weights) / 2):
        likely = choices.keep(np.flatnonzero(choices.weights >= np.float32(floor)))
        if float(likely.weights.sum()) >= p * total:
            break
    choices = likely
    falling = np.sort(choices.weights)[::-1]
    count = _place(falling, p * total / float(falling.sum()), "left") + 1
    smallest = falling[count - 1]
    kept = np.flatnonzero(choices.weights >= smallest)
    surplus = len(kept) - count
    if surplus > 0:  # several tokens are as likely as the last one
        kept = np.setdiff1d(kept, np.flatnonzero(choices.weights == smallest)[-surplus:], assume_unique=True)
    return choices.keep(kept)


def _place(weights: np.ndarray, share: float, side: Literal["left", "right"]) -> int:
    """Where the cumulated weights reach ("left") or exceed ("right") this share of their sum."""
    sums = np.cumsum(np.add.reduceat(weights, np.arange(0, len(weights), _BLOCK)), dtype=np.float64)
    target = share * sums[-1]
    block = min(int(np.searchsorted(sums, target, side=side)), len(sums) - 1)
    start = block * _BLOCK
    inner = np.cumsum(weights[start : start + _BLOCK], dtype=np.float64) + (sums[block - 1] if block else 0.0)
    return start + min(int(np.searchsorted(inner, target, side=side)), len(inner) - 1)


def _expect_finite(largest: np.floating) -> None:
    if not math.isfinite(largest):
        raise ValueError(f"logits: expected a finite maximum, got {largest}")
