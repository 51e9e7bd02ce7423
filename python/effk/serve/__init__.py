"""An HTTP server for one model, with the completions and chats of OpenAI's API (``pip install effk[serve]``).

    effk serve MODEL --port 8000

The event loop answers requests; a thread of its own decodes all of them in one continuous batch. docs/serve.md has the
routes and limits.
"""

from __future__ import annotations

from .settings import Settings

__all__ = ["Settings", "create_app", "run"]


def create_app(generator, settings: Settings | None = None):
    """The ASGI application for a :class:`effk.runtime.Generator`, to run under any ASGI server, in one process."""
    from .app import Server

    return Server(generator, settings or Settings()).app()


def run(generator, settings: Settings, host: str = "127.0.0.1", port: int = 8000) -> None:
    """Serve until SIGINT or SIGTERM; then running requests are finished, for at most ``settings.drain`` seconds."""
    import uvicorn

    uvicorn.run(
        create_app(generator, settings),
        host=host,
        port=port,
        access_log=False,
        log_level="warning",
        timeout_graceful_shutdown=max(1, round(settings.drain)),
    )
