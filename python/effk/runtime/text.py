"""Text from tokens, piece by piece, and the strings that end it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_REPLACEMENT = "\ufffd"  # what an incomplete character decodes to
_CONTEXT = 4  # tokens decoded again before the new ones: spaces depend on what precedes
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
        self._read = 0  # tokens whose text was given or is held back
        self._held = ""

    def add(self, token: int) -> str:
        """The text that a token completes, possibly none."""
        if self.stopped:
            return ""
        self._ids.append(token)
        start, known, grown = self._window()
        if not grown.endswith(_REPLACEMENT):
            self._read = len(self._ids)
            return self._give(grown[len(known) :])
        sure = max(self._read, len(self._ids) - _INCOMPLETE)  # what precedes is not going to be a character any more
        text = self._decode(start, sure)
        if len(text) <= len(known) or not grown.startswith(text):
            return ""
        self._read = sure
        return self._give(text[len(known) :])

    def watch(self, token: int) -> bool:
        """:meth:`add`, telling whether a stop string came."""
        self.add(token)
        return self.stopped

    def finish(self) -> str:
        """No token follows: what waits comes too. Returns the whole text."""
        if not self.stopped:
            _, known, grown = self._window()
            self._read = len(self._ids)
            self._give(grown[len(known) :])
        if not self.stopped:
            self.text += self._held
            self._held = ""
        return self.text

    def _window(self) -> tuple[int, str, str]:
        start = max(0, self._read - _CONTEXT)
        return start, self._decode(start, self._read), self._decode(start, len(self._ids))

    def _decode(self, start: int, end: int) -> str:
        return self.tokenizer.decode(self._ids[start:end], skip_special_tokens=True) if end > start else ""

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
