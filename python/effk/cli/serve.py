"""``effk serve``: a model behind OpenAI's API."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Annotated

import typer

from .decoding import Cache, Speculate, Threads, check_decoding, make_generator
from .models import Dtype, Model, open_model, parse_dtype
from .terminal import say

KEY = "EFFK_API_KEY"


def serve(
    model: Model,
    host: Annotated[
        str, typer.Option(help="Address to listen on; the default is reachable from this machine only.")
    ] = ("127.0.0.1"),
    port: Annotated[int, typer.Option(help="0: any free one.")] = 8000,
    name: Annotated[str | None, typer.Option(help="Of the model, for clients; default: MODEL's last part.")] = None,
    rows: Annotated[int, typer.Option(help="Sequences that decode at once.")] = 16,
    context: Annotated[
        int | None, typer.Option(help="Tokens of prompt and answer; default: 2048 or the model's.")
    ] = None,
    queue: Annotated[int, typer.Option(help="Sequences that may wait; more get status 429.")] = 64,
    timeout: Annotated[float, typer.Option(help="Seconds that a request may take, waiting included.")] = 600.0,
    drain: Annotated[float, typer.Option(help="Seconds for running requests when the server is stopped.")] = 30.0,
    interval: Annotated[
        float, typer.Option(help="Seconds between two events of a stream; 0: one for each token.")
    ] = 0.03,
    api_key: Annotated[str | None, typer.Option(help=f"What clients must show; better given as {KEY}.")] = None,
    speculate: Speculate = "none",
    threads: Threads = None,
    cache: Cache = "fp16",
    dtype: Dtype = "auto",
) -> None:
    """Serve MODEL over HTTP with OpenAI's completions and chats, until it is stopped by Ctrl-C or SIGTERM."""
    try:
        from ..serve import Settings, run
    except ImportError as error:
        raise ImportError(f"effk serve needs its packages, pip install effk[serve], got: {error}") from None
    if not 0 <= port <= 65535:
        raise ValueError(f"--port: expected 0 to 65535, got {port}")
    check_decoding(threads, cache, speculate)
    limits = {"rows": rows, "queue": queue, "timeout": timeout, "drain": drain, "interval": interval}
    key = api_key or os.environ.get(KEY) or None
    settings = Settings(name=name or Path(model).name, context=context or 2048, api_key=key, **limits)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family)  # before the model is loaded: a port that is taken is told at once
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        raise ValueError(f"--host and --port: expected a free address, got {host} {port}: {error.strerror}") from None
    with listener:
        generator = make_generator(open_model(model, parse_dtype(dtype)), threads, cache, speculate)
        if host not in ("127.0.0.1", "::1", "localhost") and key is None:
            say(f"{host} may be reachable by others, and no key is asked for (--api-key)")
        shown = f"[{host}]" if ":" in host else host
        say(f"serving {settings.name} on http://{shown}:{listener.getsockname()[1]}/v1")
        run(generator, settings, listener)
    say("stopped")
