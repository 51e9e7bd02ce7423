"""Guessing tokens ahead: a drafter proposes some, one run of the model over all of them says which were right.

A run of 2 to 8 tokens reads the weights once, as a run of one does. The result is that of decoding token by token: the
same tokens when greedy, the same distribution when sampling. Drafters here propose single tokens, not distributions, with
which the rejection rule of Leviathan et al. 2022 (arXiv:2211.17192, section 2.3) becomes: accept token x with the
probability p(x) that the model gives it; else draw from p without x.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
from torch import nn

from .sampling import Sampler

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .fallback import HuggingFaceDecoder

MOST = 7  # proposals: with the token that is certain, a run of 8
LONGEST_REST = 5  # after so many drafts of which nothing was right, 2^5 - 1 tokens pass before the next


class Draft(Protocol):
    """Proposals for one sequence."""

    def propose(self, ids: Sequence[int], count: int) -> list[int]:
        """At most ``count`` tokens that may follow ``ids``, all tokens of the sequence, which only ever grow."""

    def close(self) -> None:
        """The sequence ended."""


class Drafter(Protocol):
    """Makes a :class:`Draft` for each sequence."""

    def begin(self, capacity: int) -> Draft:
        """For a sequence that becomes at most ``capacity`` tokens long."""


class NGramDrafter:
    """Proposes what followed the last occurrence of the latest tokens (prompt lookup): no model, no memory to speak of.

    It pays off where text repeats its prompt: summaries, edits, code.

    Args:
        longest: tokens that have to agree, at best.
        shortest: at least.
    """

    def __init__(self, longest: int = 3, shortest: int = 2) -> None:
        if not 1 <= shortest <= longest:
            raise ValueError(f"NGramDrafter: expected 1 <= shortest <= longest, got {shortest} and {longest}")
        self.longest, self.shortest = longest, shortest

    def begin(self, capacity: int) -> Draft:
        return _NGramDraft(self.longest, self.shortest)


class _NGramDraft:
    def __init__(self, longest: int, shortest: int) -> None:
        # For each length, where the tokens after an n-gram begin. An n-gram is noted once a token follows it.
        self.after: dict[int, dict[tuple[int, ...], int]] = {n: {} for n in range(longest, shortest - 1, -1)}
        self.noted = 0

    def propose(self, ids: Sequence[int], count: int) -> list[int]:
        for end in range(max(1, self.noted), len(ids)):
            for n, places in self.after.items():
                if end >= n:
                    places[tuple(ids[end - n : end])] = end
        self.noted = len(ids)
        for n, places in self.after.items():
            if len(ids) >= n and (start := places.get(tuple(ids[len(ids) - n :]))) is not None:
                period = len(ids) - start  # a proposal longer than what is known goes round
                return [ids[start + index % period] for index in range(count)]
        return []

    def close(self) -> None:
        self.after.clear()


class ModelDrafter:
    """Proposes what a smaller model with the same tokens finds likeliest; it has a cache of its own.

    Args:
        decoder: of the smaller model, e.g. of :func:`early_exit`.
        cache: dtype of its cache.
    """

    def __init__(self, decoder: HuggingFaceDecoder, cache: str = "fp16") -> None:
        self.decoder, self.cache = decoder, cache

    def begin(self, capacity: int) -> Draft:
        return _ModelDraft(self.decoder, self.cache, min(capacity, self.decoder.max_positions))


class _ModelDraft:
    def __init__(self, decoder: HuggingFaceDecoder, dtype: str, capacity: int) -> None:
        self.decoder, self.cache = decoder, decoder.cache(1, capacity, dtype)
        self.held: list[int] = []  # what the cache holds
        self.sure = 0  # how much of it was no proposal

    def propose(self, ids: Sequence[int], count: int) -> list[int]:
        same, most = self.sure, min(len(self.held), len(ids) - 1)
        while same < most and self.held[same] == ids[same]:
            same += 1
        self.cache.truncate(0, same)
        self.sure = len(ids)
        del self.held[same:]
        fresh, drafted = list(ids[same:]), []
        for _ in range(min(count, self.cache.capacity - len(ids) + 1)):
            drafted.append(int(self.decoder.step([(0, fresh)], self.cache).numpy()[0].argmax()))
            self.held += fresh
            fresh = drafted[-1:]
        self.sure = min(self.sure, len(self.held))
        return drafted

    def close(self) -> None:
        self.cache.truncate(0, 0)


def early_exit(model: PreTrainedModel, blocks: int) -> PreTrainedModel:
    """A model of the first ``blocks`` blocks of ``model``, its final norm and its head; weights are shared.

    Raises:
        ValueError: no such number of blocks, or a model whose blocks are not found.
    """
    total = model.config.num_hidden_layers
    if not 1 <= blocks < total:
        raise ValueError(f"early_exit: blocks: expected 1 to {total - 1}, got {blocks}")
    found = [name for name, part in model.named_modules() if isinstance(part, nn.ModuleList) and len(part) == total]
    if len(found) != 1:
        raise ValueError(f"early_exit: model: expected one list of {total} blocks, got {found}")
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = blocks
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:blocks]
    *path, last = found[0].split(".")
    owner = shallow = _shell(model)
    vars(shallow).pop("generate", None)  # of the whole model, if it was loaded with a runtime
    owner.config = config
    for name in path:
        owner._modules[name] = _shell(owner._modules[name])
        owner = owner._modules[name]
        owner.config = config
    owner._modules[last] = owner._modules[last][:blocks]
    return shallow


def _shell(module: nn.Module) -> nn.Module:
    """The same module with a table of parts of its own: exchanging one does not touch the original."""
    shell = copy.copy(module)
    shell._modules = dict(module._modules)
    return shell


def verify(sampler: Sampler, logits: np.ndarray, draft: Sequence[int], forbidden: Sequence[int] = ()) -> list[int]:
    """The tokens that a run over ``draft`` yields: those accepted, and one of the model's own.

    Args:
        sampler: of the sequence.
        logits: fp32 ``[len(draft) + 1, vocab]``: before the first token of the draft, ..., after the last.
        draft: the tokens proposed.
        forbidden: ids that must not come.
    """
    tokens: list[int] = []
    for row, guess in zip(logits, draft, strict=False):
        if sampler.greedy:
            token = sampler.argmax(row, forbidden)
        else:
            choices = sampler.choices(row, forbidden)
            if sampler.random.random() < choices.probability(guess):
                token = guess
            else:
                token = choices.without(guess).draw(sampler.random.random())
        sampler.note(token)
        tokens.append(token)
        if token != guess:
            return tokens
    tokens.append(sampler.choose(logits[len(draft)], forbidden))
    return tokens
