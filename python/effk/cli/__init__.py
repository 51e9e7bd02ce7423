"""The ``effk`` command. Each subcommand is one module with a function of its name; :mod:`.app` puts them together."""


def main() -> None:
    """Entry point of the ``effk`` program."""
    from .app import app  # here, so that one module can be imported without all commands

    app()
