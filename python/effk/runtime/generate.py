"""From text to text: a model and its tokenizer as one object.

generator = effk.runtime.Generator(effk.load("dir"), tokenizer)
for piece in generator.stream("Why is the sky blue?", max_new_tokens=100):
    print(piece, end="", flush=True)
answers = generator.complete(["First prompt", "Second prompt"], temperature=0.7, seed=1)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from .attached import attached_decoder
from .batch import ROWS, Batch, generate_all
from .batch import Sequence as Running
from .limits import Limits, stop_ids
from .sampling import Sampling
from .speculative import Drafter
from .text import TextStream

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .fallback import HuggingFaceDecoder

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]  # text, token ids, or messages of a chat


@dataclass(frozen=True)
class Completion:
    """What followed a prompt.

    Attributes:
        text: without the stop string or special tokens.
        tokens: ids, the one that ended the text included.
        finish: "stop" (a stop token or string came) or "length".
        logprobs: see :class:`effk.runtime.batch.Sequence`.
    """

    text: str
    tokens: list[int]
    finish: str
    logprobs: list[tuple[float, list[tuple[int, float]]]]


class Stream:
    """One sequence being decoded; iterating gives its text, leaving the loop ends it.

    Attributes:
        sequence: tokens, times and reason of ending.
        text: what has come so far.
    """

    def __init__(self, batch: Batch, sequence: Running, stream: TextStream) -> None:
        self._batch, self.sequence, self._stream = batch, sequence, stream
        batch.add(sequence)

    @property
    def text(self) -> str:
        return self._stream.text

    def __iter__(self) -> Iterator[str]:
        given = 0
        try:
            while self.sequence.finish is None:
                self._batch.step()
                if self.sequence.finish is None:
                    self._stream.follow(self.sequence.tokens)
                else:
                    self._stream.finish(self.sequence.tokens)
                if len(self.text) > given:
                    piece = self.text[given:]
                    given = len(self.text)
                    yield piece
        finally:
            self._batch.close()
        if self.sequence.error is not None:
            raise self.sequence.error


class Generator:
    """Generates with a model.

    Args:
        model: of transformers, compressed or plain.
        tokenizer: needed for texts; not for token ids without stop strings.
        cache: dtype of keys and values: "fp16", "int8" or "fp32".
        drafter: guesses tokens ahead, see :mod:`effk.runtime.speculative`.
        decoder: None: the one of ``model.generate``, or a new one.

    Raises:
        UnsupportedModel: no decoder of text.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        cache: str = "fp16",
        drafter: Drafter | None = None,
        decoder: HuggingFaceDecoder | None = None,
    ) -> None:
        self.model, self.tokenizer, self.cache, self.drafter = model, tokenizer, cache, drafter
        self.decoder = decoder or attached_decoder(model)
        self.stop_ids = stop_ids(model, tokenizer)

    def stream(self, prompt: Prompt, **options: Any) -> Stream:
        """The text after one prompt, piece by piece; ``options`` as for :meth:`complete`."""
        sequence, text = self.sequence(prompt, **options)
        if text is None:
            raise ValueError("stream: expected a tokenizer, got none")
        return Stream(self._batch([sequence]), sequence, text)

    def complete(self, prompts: Sequence[Prompt], *, rows: int = ROWS, **options: Any) -> list[Completion]:
        """What follows each of several prompts, in their order.

        Args:
            prompts: texts, lists of token ids, or chats.
            rows: at most so many run at once.
            options: those of :class:`Sampling` (``temperature``, ``top_k``, ``top_p``, ``min_p``, ``repetition_penalty``,
                ``seed``: prompt number i gets ``seed + i``) and :class:`Limits` (``max_new_tokens``, ``min_new_tokens``,
                ``stop_ids``: the model's own unless given); ``stop``, strings; ``top``, how many ``logprobs`` come along.

        Raises:
            ValueError: an option out of range, or a prompt that is empty or too long.
        """
        if isinstance(prompts, str):
            raise ValueError("complete: prompts: expected a list of prompts, got one text")
        seed = options.pop("seed", None)
        pairs = [
            self.sequence(prompt, seed=None if seed is None else seed + number, **options)
            for number, prompt in enumerate(prompts)
        ]
        sequences = [sequence for sequence, _ in pairs]
        if sequences:
            generate_all(self._batch(sequences, rows), sequences)
        return [
            Completion(
                text.finish(sequence.tokens) if text else "", sequence.tokens, sequence.finish, sequence.logprobs
            )
            for sequence, text in pairs
        ]

    def sequence(
        self, prompt: Prompt, *, stop: str | Sequence[str] = (), top: int | None = None, **options: Any
    ) -> tuple[Running, TextStream | None]:
        """A sequence that is not running yet, and what turns its tokens into text and ends it at a stop string.

        The text follows the tokens when it is told to: :meth:`TextStream.follow`, :meth:`TextStream.finish`.
        """
        options = {"stop_ids": self.stop_ids} | options
        parts = []
        for kind in (Sampling, Limits):
            names = {entry.name for entry in fields(kind)}
            parts.append(kind(**{name: options.pop(name) for name in names & options.keys()}))
        if options:
            raise TypeError(f"generate: expected known options, got {', '.join(sorted(options))}")
        if stop and self.tokenizer is None:
            raise ValueError("stop: expected a tokenizer, which strings need, got none")
        sequence = Running(self.encode(prompt), *parts, top=top)
        if self.tokenizer is None:
            return sequence, None
        text = TextStream(self.tokenizer, (stop,) if isinstance(stop, str) else stop)
        if stop:
            sequence.watch = text.watch
        return sequence, text

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a text, or of a chat in the model's template with an answer begun."""
        if not isinstance(prompt, str) and all(isinstance(entry, int) for entry in prompt):
            return list(prompt)
        if self.tokenizer is None:
            raise ValueError("prompt: expected token ids, as there is no tokenizer, got text")
        return encode(self.tokenizer, prompt)

    def _batch(self, sequences: Sequence[Running], rows: int = 1) -> Batch:
        longest = max(len(sequence.prompt) + sequence.limits.max_new_tokens for sequence in sequences)
        limit = self.decoder.max_positions
        if longest > limit:
            raise ValueError(
                f"prompt and max_new_tokens: expected at most the model's {limit} positions, got {longest}"
            )
        rows = min(rows, len(sequences))
        return Batch(self.decoder, rows=rows, capacity=longest, cache=self.cache, drafter=self.drafter)


def encode(tokenizer: PreTrainedTokenizerBase, prompt: str | Sequence[Mapping[str, Any]]) -> list[int]:
    """Token ids of a text, or of messages in the chat template.

    Raises:
        ValueError: messages, and the tokenizer has no template, or it refuses them.
    """
    if isinstance(prompt, str):
        return tokenizer(prompt)["input_ids"]
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("prompt: expected text, as the tokenizer has no chat template, got messages")
    from jinja2 import TemplateError

    try:
        text = tokenizer.apply_chat_template(list(prompt), tokenize=False, add_generation_prompt=True)
    except (TemplateError, TypeError, KeyError) as error:
        raise ValueError(f"messages: expected a chat that the model's template takes, got: {error}") from error
    return tokenizer(text, add_special_tokens=False)["input_ids"]  # the template has written them
