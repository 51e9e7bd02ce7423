"""What ends a sequence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What ends a sequence.

    Attributes:
        max_new_tokens: at most so many.
        min_new_tokens: tokens of ``stop_ids`` cannot come earlier.
        stop_ids: tokens that end it; the last token is one of them then.
    """

    max_new_tokens: int = 64
    min_new_tokens: int = 0
    stop_ids: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: expected at least 1, got {self.max_new_tokens}")
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens: expected 0 to max_new_tokens ({self.max_new_tokens}), got {self.min_new_tokens}"
            )


def stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> frozenset[int]:
    """The tokens that end a text of this model."""
    generation = getattr(model, "generation_config", None)
    own = getattr(generation, "eos_token_id", None)
    own = getattr(model.config, "eos_token_id", None) if own is None else own
    ids = set(own if isinstance(own, (list, tuple)) else [own])
    ids.add(getattr(tokenizer, "eos_token_id", None))
    return frozenset(int(token) for token in ids if token is not None)
