"""Bodies of answers and events, in the two forms of OpenAI's API."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable
from typing import Any

LogProbs = list[
    tuple[int, float, list[tuple[int, float]]]
]  # token, its logarithmic probability, likeliest alternatives


class Completions:
    """``/v1/completions``.

    Args:
        model: its name.
        token_text: the text of one token.
    """

    prefix, whole_object, event_object = "cmpl", "text_completion", "text_completion"

    def __init__(self, model: str, token_text: Callable[[int], str]) -> None:
        self.token_text = token_text
        self.head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, choices: list[dict[str, Any]], usage: dict[str, int]) -> dict[str, Any]:
        """The answer to a request that does not stream."""
        return self.head | {"object": self.whole_object, "choices": choices, "usage": usage}

    def choice(self, index: int, text: str, finish: str, logprobs: LogProbs | None) -> dict[str, Any]:
        """One of its choices."""
        return {"index": index, "text": text, "logprobs": self._logprobs(logprobs), "finish_reason": finish}

    def first(self, index: int) -> bytes:
        """The event before any text."""
        return b""

    def piece(self, index: int, text: str, logprobs: LogProbs | None) -> bytes:
        """The event of a piece of text."""
        choice = {"index": index, "text": text, "logprobs": self._logprobs(logprobs), "finish_reason": None}
        return self._event([choice])

    def last(self, index: int, finish: str) -> bytes:
        """The event after all text."""
        return self._event([{"index": index, "text": "", "logprobs": None, "finish_reason": finish}])

    def usage(self, usage: dict[str, int]) -> bytes:
        """The event of the numbers of tokens."""
        return self._event([], usage=usage)

    def _event(self, choices: list[dict[str, Any]], **more: Any) -> bytes:
        return event(self.head | {"object": self.event_object, "choices": choices} | more)

    def _logprobs(self, entries: LogProbs | None) -> dict[str, Any] | None:
        if entries is None:
            return None
        return {
            "tokens": [self.token_text(token) for token, _, _ in entries],
            "token_logprobs": [value for _, value, _ in entries],
            "top_logprobs": [{self.token_text(other): value for other, value in top} for _, _, top in entries],
        }


class Chat(Completions):
    """``/v1/chat/completions``."""

    prefix, whole_object, event_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def choice(self, index: int, text: str, finish: str, logprobs: LogProbs | None) -> dict[str, Any]:
        message = {"role": "assistant", "content": text}
        return {"index": index, "message": message, "logprobs": self._logprobs(logprobs), "finish_reason": finish}

    def first(self, index: int) -> bytes:
        return self._delta(index, {"role": "assistant", "content": ""})

    def piece(self, index: int, text: str, logprobs: LogProbs | None) -> bytes:
        return self._delta(index, {"content": text}, self._logprobs(logprobs))

    def last(self, index: int, finish: str) -> bytes:
        return self._delta(index, {}, None, finish)

    def _delta(self, index: int, delta: dict[str, str], logprobs: Any = None, finish: str | None = None) -> bytes:
        return self._event([{"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}])

    def _logprobs(self, entries: LogProbs | None) -> dict[str, Any] | None:
        if entries is None:
            return None

        def one(token: int, value: float) -> dict[str, Any]:
            text = self.token_text(token)
            return {"token": text, "logprob": value, "bytes": list(text.encode())}

        content = [
            one(token, value) | {"top_logprobs": [one(*other) for other in top]} for token, value, top in entries
        ]
        return {"content": content}


def event(record: dict[str, Any]) -> bytes:
    """A server-sent event."""
    return b"data: " + json.dumps(record, separators=(",", ":")).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"


def failure(message: str, kind: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """The body of an error."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
