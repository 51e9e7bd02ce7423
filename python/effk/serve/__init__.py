"""An HTTP server for one model, with the completions and chats of OpenAI's API (``pip install effk[serve]``).

    effk serve MODEL --port 8000

The event loop answers requests; a thread of its own decodes all of them in one continuous batch. docs/serve.md has the
routes and limits.
"""

from __future__ import annotations

import signal
from contextlib import suppress
from typing import TYPE_CHECKING

from .settings import Settings

if TYPE_CHECKING:
    from socket import socket

    from starlette.applications import Starlette

    from ..runtime import Generator

__all__ = ["Settings", "create_app", "run"]


def create_app(generator: Generator, settings: Settings | None = None) -> Starlette:
    """The ASGI application, to run under any ASGI server, in one process."""
    from .app import Server

    return Server(generator, settings or Settings()).app()


def run(generator: Generator, settings: Settings, listener: socket) -> None:
    """Serve on a bound socket until SIGINT or SIGTERM.

    Then nothing new is accepted, running requests are finished, for at most ``settings.drain`` seconds, and it returns.
    """
    import uvicorn

    config = uvicorn.Config(
        create_app(generator, settings),
        access_log=False,
        log_level="warning",
        timeout_graceful_shutdown=max(1, round(settings.drain)),
    )
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with suppress(KeyboardInterrupt):  # uvicorn raises the signal again after a clean stop
            uvicorn.Server(config).run(sockets=[listener])
    finally:
        signal.signal(signal.SIGTERM, before)
