"""Many sequences through one decoder: continuous batching.

A sequence waits until one of the rows is free, reads its prompt, decodes, and gives its row to the next; nobody waits for
the longest of a batch. Every step is one run of the decoder over one token of each decoding sequence, and over the next piece
of a prompt, of bounded length, so that a long prompt does not hold up those who are decoding. Prompts take turns.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np

from .limits import Limits
from .sampling import Sampler, Sampling, log_probabilities
from .speculative import LONGEST_REST, MOST, Draft, Drafter, verify

if TYPE_CHECKING:
    from .fallback import HuggingFaceDecoder

ROWS = 32  # sequences that decode at once: the products stay bound by the weights' bytes up to about there
PIECE = 128  # prompt tokens beside decoding sequences: about 60 ms of SmolLM2 on two cores
ALONE = 4  # pieces at once when nobody is decoding

Finish = Literal["stop", "length", "cancelled", "error"]


@dataclass(eq=False)
class Sequence:
    """One prompt and what follows it.

    Attributes:
        prompt: token ids.
        sampling: how tokens are chosen.
        limits: what ends it.
        watch: called with every new token, in the thread that decodes; True ends the sequence.
        top: None, or how many likely alternatives ``logprobs`` tells at each token.
        tokens: what came, the token that ended it included.
        logprobs: if asked for, per token its logarithmic probability, and (id, value) of the likeliest.
        finish: None while it runs.
        error: what went wrong when ``finish`` is "error".
        cancelled: set to True from any thread, it ends the sequence before the next step.
        times: when it was added, had its first token, and ended (``time.perf_counter``).
        drafted, accepted: guesses of the drafter, and how many were right.
    """

    prompt: list[int]
    sampling: Sampling = field(default_factory=Sampling)
    limits: Limits = field(default_factory=Limits)
    watch: Callable[[int], bool | None] | None = None
    top: int | None = None
    tokens: list[int] = field(default_factory=list)
    logprobs: list[tuple[float, list[tuple[int, float]]]] = field(default_factory=list)
    finish: Finish | None = None
    error: Exception | None = None
    cancelled: bool = False
    times: dict[str, float] = field(default_factory=dict)
    drafted: int = 0
    accepted: int = 0

    _ids: list[int] = field(default_factory=list, repr=False)  # prompt and tokens
    _slot: int = -1
    _held: int = 0  # tokens in the cache
    _ahead: int = 2  # guesses to ask for
    _misses: int = 0  # drafts in a row of which nothing was right
    _rest: int = 0  # tokens to go without a guess
    _sampler: Sampler | None = field(default=None, repr=False)
    _draft: Draft | None = field(default=None, repr=False)

    @property
    def decoding(self) -> bool:
        """The prompt is read but for the token that the next step continues from."""
        return self._held >= len(self.prompt)


class Batch:
    """Runs sequences; :meth:`step` belongs to one thread, :meth:`add` and ``Sequence.cancelled`` to any.

    Args:
        decoder: of :func:`effk.runtime.decoder_for`.
        rows: sequences at once.
        capacity: tokens that a sequence, prompt included, can have at most; None: the model's positions.
        cache: dtype of the cache.
        piece: prompt tokens of a step beside decoding sequences.
        drafter: guesses tokens ahead, see :mod:`.speculative`.
    """

    def __init__(
        self,
        decoder: HuggingFaceDecoder,
        *,
        rows: int = ROWS,
        capacity: int | None = None,
        cache: str = "fp16",
        piece: int = PIECE,
        drafter: Drafter | None = None,
    ) -> None:
        for name, value in (("rows", rows), ("piece", piece), ("capacity", 1 if capacity is None else capacity)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        self.decoder, self.drafter, self.piece = decoder, drafter, piece
        self.capacity = min(decoder.max_positions, capacity or decoder.max_positions)
        self.cache = decoder.cache(rows, self.capacity, cache)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self._free = list(range(rows))[::-1]

    def check(self, sequence: Sequence) -> None:
        """Refuse what cannot run.

        Raises:
            ValueError: an empty prompt, an id out of the vocabulary, or no room for prompt and new tokens.
        """
        prompt, new = sequence.prompt, sequence.limits.max_new_tokens
        if not prompt:
            raise ValueError("prompt: expected at least one token, got none")
        if min(prompt) < 0 or max(prompt) >= self.decoder.vocab_size:
            wrong = next(token for token in prompt if not 0 <= token < self.decoder.vocab_size)
            raise ValueError(f"prompt: expected ids from 0 to {self.decoder.vocab_size - 1}, got {wrong}")
        if len(prompt) + new > self.capacity:
            raise ValueError(
                f"prompt: expected at most {self.capacity} tokens together with max_new_tokens, got {len(prompt)} + {new}"
            )

    def add(self, sequence: Sequence) -> Sequence:
        """Queue a sequence and return it; errors of :meth:`check`."""
        self.check(sequence)
        sequence.times["added"] = time.perf_counter()
        self.waiting.append(sequence)
        return sequence

    def run(self) -> None:
        """Step until nothing is left to do."""
        while self.waiting or self.running:
            self.step()

    def step(self) -> list[Sequence]:
        """One run of the decoder.

        Returns:
            The sequences that got tokens or ended.
        """
        changed = self._drop_cancelled()
        self._admit()
        decoding = [sequence for sequence in self.running if sequence.decoding]
        drafts = [self._guess(sequence) for sequence in decoding]
        pieces = self._pieces(self.piece if decoding else self.piece * ALONE)
        work = [([sequence._ids[-1], *draft], sequence) for sequence, draft in zip(decoding, drafts, strict=True)]
        if any(drafts):  # logits of every token, which those of prompts do not need
            self._run(work, "all")
            self._run(pieces, "last")
        else:
            self._run(work + pieces, "last")
        ran = {id(sequence) for _, sequence in (*work, *pieces) if sequence.tokens}
        changed += [sequence for sequence in self.running if sequence.finish is not None or id(sequence) in ran]
        for sequence in changed:
            if sequence.finish is not None:
                self._release(sequence)
        return changed

    def close(self) -> list[Sequence]:
        """End every sequence as cancelled and return them."""
        for sequence in (*self.waiting, *self.running):
            sequence.cancelled = True
        return self._drop_cancelled()

    def _drop_cancelled(self) -> list[Sequence]:
        dropped = [sequence for sequence in (*self.running, *tuple(self.waiting)) if sequence.cancelled]
        for sequence in dropped:
            _end(sequence, "cancelled")
            if sequence._slot < 0:
                self.waiting.remove(sequence)
            self._release(sequence)
        return dropped

    def _admit(self) -> None:
        while self._free and self.waiting:
            sequence = self.waiting.popleft()
            sequence._slot = self._free.pop()
            sequence._ids = list(sequence.prompt)
            sequence._sampler = Sampler(sequence.sampling, self.decoder.vocab_size, sequence.prompt)
            self.running.append(sequence)
            if self.drafter is not None:
                sequence._draft = self.drafter.begin(len(sequence.prompt) + sequence.limits.max_new_tokens)

    def _pieces(self, budget: int) -> list[tuple[list[int], Sequence]]:
        """The next pieces of prompts, ``budget`` tokens in all; who got one goes to the end of the line."""
        pieces = []
        for sequence in [sequence for sequence in self.running if not sequence.decoding]:
            if budget == 0:
                break
            start = sequence._held
            piece = sequence.prompt[start : start + budget]
            budget -= len(piece)
            pieces.append((piece, sequence))
        if pieces and budget == 0:
            served = {id(sequence) for _, sequence in pieces}
            self.running.sort(key=lambda sequence: id(sequence) in served)  # stable
        return pieces

    def _guess(self, sequence: Sequence) -> list[int]:
        left = sequence.limits.max_new_tokens - len(sequence.tokens) - 1
        if sequence._draft is None or left < 1 or len(sequence.tokens) < sequence.limits.min_new_tokens:
            return []
        if sequence._rest:
            sequence._rest -= 1
            return []
        return sequence._draft.propose(sequence._ids, min(sequence._ahead, left))

    def _run(self, work: list[tuple[list[int], Sequence]], logits: str) -> None:
        """Feed tokens to sequences and take what comes; an error ends those that cause it and no others."""
        if not work:
            return
        try:
            rows = self.decoder.step([(sequence._slot, ids) for ids, sequence in work], self.cache, logits).numpy()
        except Exception as error:
            for _, sequence in work:
                self.cache.truncate(sequence._slot, min(sequence._held, self.cache.lengths[sequence._slot]))
            if len(work) == 1:
                _fail(work[0][1], error)
            else:
                for one in work:
                    self._run([one], logits)
            return
        start = 0
        for ids, sequence in work:
            count = len(ids) if logits == "all" else 1
            try:
                self._take(sequence, ids, rows[start : start + count])
            except Exception as error:  # logits that are no numbers, or the watch
                _fail(sequence, error)
            start += count

    def _take(self, sequence: Sequence, ids: list[int], rows: np.ndarray) -> None:
        """Choose from the logits ``rows`` after feeding ``ids``."""
        sequence._held += len(ids)
        if not sequence.decoding:
            return
        limits, draft = sequence.limits, ids[1:] if len(rows) > 1 else []
        forbidden = tuple(limits.stop_ids) if len(sequence.tokens) < limits.min_new_tokens else ()
        if draft:
            tokens = verify(sequence._sampler, rows, draft, forbidden)
            right = len(tokens) - 1
            sequence.drafted += len(draft)
            sequence.accepted += right
            sequence._ahead = min(MOST, sequence._ahead * 2) if right == len(draft) else max(1, right + 1)
            # A wrong guess makes a step of two rows, a tenth slower than one; where they are all wrong, ever fewer are made.
            sequence._misses = 0 if right else min(sequence._misses + 1, LONGEST_REST)
            sequence._rest = 2**sequence._misses - 1
            sequence._held -= len(draft) - right
            self.cache.truncate(sequence._slot, sequence._held)
        else:
            tokens = [sequence._sampler.choose(rows[0], forbidden)]
        if not sequence.tokens:
            sequence.times["first"] = time.perf_counter()
        for row, token in zip(rows, tokens, strict=False):
            sequence.tokens.append(token)
            sequence._ids.append(token)
            if sequence.top is not None:
                sequence.logprobs.append(log_probabilities(row, token, sequence.top))
            stop = sequence.watch is not None and sequence.watch(token)
            if stop or token in limits.stop_ids:
                _end(sequence, "stop")
                return
            if len(sequence.tokens) == limits.max_new_tokens:
                _end(sequence, "length")
                return

    def _release(self, sequence: Sequence) -> None:
        """Give the row of an ended sequence back."""
        if sequence._slot < 0:
            return
        self.cache.truncate(sequence._slot, 0)
        self._free.append(sequence._slot)
        sequence._slot = -1
        self.running.remove(sequence)
        if sequence._draft is not None:
            sequence._draft.close()


def generate_all(batch: Batch, sequences: Iterable[Sequence]) -> list[Sequence]:
    """Run sequences to their ends.

    Raises:
        Exception: the error of the first sequence that failed.
    """
    added = [batch.add(sequence) for sequence in sequences]
    batch.run()
    for sequence in added:
        if sequence.error is not None:
            raise sequence.error
    return added


def _end(sequence: Sequence, finish: Finish) -> None:
    sequence.finish = finish
    sequence.times["ended"] = time.perf_counter()


def _fail(sequence: Sequence, error: Exception) -> None:
    sequence.error = error
    _end(sequence, "error")
