"""Bodies of requests, as OpenAI's API has them, with the filters of effk's sampling beside."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

# Fields that would change the answer and that the server does not know; their neutral values are let pass.
_UNSUPPORTED: dict[str, Any] = {
    "presence_penalty": 0, "frequency_penalty": 0, "logit_bias": {}, "tools": [], "functions": [], "suffix": "",
    "echo": False, "best_of": 1, "response_format": {"type": "text"},
}  # fmt: skip


class StreamOptions(BaseModel):
    """``include_usage``: a last event tells the numbers of tokens."""

    include_usage: bool = False


class _Request(BaseModel):
    model_config = ConfigDict(extra="allow")

    model: str | None = None
    n: int = Field(1, ge=1, le=128)
    stream: bool = False
    stream_options: StreamOptions | None = None
    stop: str | list[str] | None = None
    seed: int | None = Field(None, ge=0)
    temperature: float | None = Field(1.0, ge=0, le=100)
    top_p: float | None = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, gt=0, le=100)
    ignore_eos: bool = False

    def options(self) -> dict[str, Any]:
        """Arguments of ``Generator.sequence`` but for lengths and seed."""
        options: dict[str, Any] = {
            "temperature": 1.0 if self.temperature is None else self.temperature,
            "top_p": 1.0 if self.top_p is None else self.top_p,
            "top_k": self.top_k,
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "stop": [self.stop] if isinstance(self.stop, str) else self.stop or [],
        }
        if self.ignore_eos:
            options["stop_ids"] = frozenset()
        return options

    def unsupported(self) -> str | None:
        """The first field with a value that cannot be honoured."""
        extra = self.model_extra or {}
        for name, neutral in _UNSUPPORTED.items():
            if extra.get(name) is not None and extra[name] != neutral:
                return name
        return None


class CompletionRequest(_Request):
    """``POST /v1/completions``."""

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: int = Field(16, ge=1)
    logprobs: int | None = Field(None, ge=0, le=20)

    def prompts(self) -> list[str | list[int]]:
        """Each prompt, as text or ids."""
        several = isinstance(self.prompt, list) and not all(isinstance(entry, int) for entry in self.prompt)
        return self.prompt if several else [self.prompt]  # type: ignore[list-item, return-value]

    @property
    def length(self) -> int | None:
        """New tokens at most."""
        return self.max_tokens

    @property
    def top(self) -> int | None:
        """Alternatives beside each token's logarithmic probability; None: neither."""
        return self.logprobs


class TextPart(BaseModel):
    """A part of a message; only text is known."""

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One message of a chat."""

    role: str = Field(min_length=1)
    content: str | list[TextPart] | None = None

    def plain(self) -> dict[str, str]:
        """As chat templates take it."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content or [])
        return {"role": self.role, "content": content}


class ChatRequest(_Request):
    """``POST /v1/chat/completions``."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)

    def prompts(self) -> list[list[dict[str, str]]]:
        """The one chat."""
        return [[message.plain() for message in self.messages]]

    @property
    def length(self) -> int | None:
        """New tokens at most; None: what the context leaves."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def top(self) -> int | None:
        """As :attr:`CompletionRequest.top`."""
        return (self.top_logprobs or 0) if self.logprobs else None
