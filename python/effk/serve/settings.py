"""What a server is told when it starts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Limits of a server.

    Attributes:
        name: of the model, as clients see it.
        rows: sequences that decode at once.
        context: tokens of a sequence at most, prompt and answer; None: the model's positions.
        queue: sequences that may wait for a row; more are refused with status 429.
        timeout: seconds that a request may take, waiting included.
        body: bytes of a request at most.
        api_key: what clients of ``/v1`` must show; None: nothing.
        drain: seconds that running requests get when the server is told to stop.
        interval: seconds between two events of a stream, but for the first and the last; tokens that come meanwhile share
            one. 0: none share.
    """

    name: str = "effk"
    rows: int = 16
    context: int | None = None
    queue: int = 64
    timeout: float = 600.0
    body: int = 1 << 20
    api_key: str | None = None
    drain: float = 30.0
    interval: float = 0.03

    def __post_init__(self) -> None:
        for name in ("rows", "timeout", "body"):
            if getattr(self, name) <= 0:
                raise ValueError(f"serve: {name}: expected a positive number, got {getattr(self, name)}")
        for name in ("queue", "drain", "interval"):
            if getattr(self, name) < 0:
                raise ValueError(f"serve: {name}: expected 0 or a positive number, got {getattr(self, name)}")
        if self.context is not None and self.context < 2:
            raise ValueError(f"serve: context: expected at least 2, got {self.context}")
        if self.api_key == "":
            raise ValueError("serve: api_key: expected some text or none, got an empty one")
