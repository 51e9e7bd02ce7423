"""Text from tokens, piece by piece, and the strings that end it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_REPLACEMENT = "\ufffd"  # what an incomplete character decodes to
_CONTEXT = 4  # tokens decoded again before the new ones: spaces depend on what precedes
_WINDOW = 16  # at most, before it shrinks to _CONTEXT: its text is known until then, and a call costs more than tokens
_INCOMPLETE = 3  # tokens, of a byte each at least, of a character that is not complete


class TextStream:
    """Turns the tokens of one sequence into text as they come; special tokens have none.

    The pieces together are ``tokenizer.decode(tokens)``: an incomplete character waits for the rest of its bytes, and text
    that may be the beginning of a stop string waits until it is not. A stop string and what follows it are dropped.

    Attributes:
        text: all pieces so far.
        stopped: a stop string came.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()) -> None:
        if not all(isinstance(text, str) and text for text in stop):
            raise ValueError(f"stop: expected strings that are not empty, got {list(stop)!r}")
        self.tokenizer, self.stop = tokenizer, tuple(stop)
        self.text, self.stopped = "", False
        self._ids: list[int] = []
        self._start, self._read = 0, 0  # tokens before _read had their text given or held back
        self._known = ""  # text of the window, from _start to _read
        self._held = ""

    def add(self, token: int) -> str:
        """The text that a token completes, possibly none."""
        if self.stopped:
            return ""
        self._ids.append(token)
        return self._advance()

    def follow(self, tokens: Sequence[int]) -> None:
        """Catch up with ``tokens``, all of the sequence, at the cost of one; with stop strings :meth:`watch` has to see each."""
        if not self.stop and len(tokens) > len(self._ids):
            self._ids += tokens[len(self._ids) :]
            self._advance()

    def watch(self, token: int) -> bool:
        """:meth:`add`, telling whether a stop string came."""
        self.add(token)
        return self.stopped

    def finish(self, tokens: Sequence[int] = ()) -> str:
        """Catch up with ``tokens``; none comes after them, so what waits comes too. Returns the whole text."""
        self.follow(tokens)
        if not self.stopped:
            self._read_to(len(self._ids), self._decode(len(self._ids)))
        if not self.stopped:
            self.text += self._held
            self._held = ""
        return self.text

    def _advance(self) -> str:
        grown = self._decode(len(self._ids))
        if not grown.endswith(_REPLACEMENT):
            return self._read_to(len(self._ids), grown)
        sure = max(self._read, len(self._ids) - _INCOMPLETE)
        for end in range(len(self._ids) - 1, sure, -1):  # of several tokens, only the last few wait
            text = self._decode(end)
            if not text.endswith(_REPLACEMENT):
                return self._read_to(end, text)
        text = self._decode(sure)  # what precedes is not going to be a character any more
        return self._read_to(sure, text) if len(text) > len(self._known) and grown.startswith(text) else ""

    def _read_to(self, end: int, grown: str) -> str:
        """``grown`` is the text of the window up to ``end``."""
        piece, self._read, self._known = grown[len(self._known) :], end, grown
        if end - self._start > _WINDOW:
            self._start = end - _CONTEXT
            self._known = self._decode(end)
        return self._give(piece)

    def _decode(self, end: int) -> str:
        """The text of the window up to ``end``."""
        return (
            self.tokenizer.decode(self._ids[self._start : end], skip_special_tokens=True) if end > self._start else ""
        )

    def _give(self, piece: str) -> str:
        """``piece`` and what was held back, less what has to wait."""
        if self.stop:
            piece = self._held + piece
            found = [at for at in (piece.find(text) for text in self.stop) if at >= 0]
            if found:
                self.stopped, self._held = True, ""
                piece = piece[: min(found)]
            else:
                end = len(piece) - max(_overlap(piece, text) for text in self.stop)
                piece, self._held = piece[:end], piece[end:]
        self.text += piece
        return piece


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of ``text`` with which ``stop`` begins."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
