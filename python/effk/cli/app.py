"""The command line as a whole: its subcommands, and what an error looks like."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from .auto import auto
from .bench import bench
from .compress import compress
from .demo import demo
from .evaluate import evaluate
from .generate import generate
from .info import info
from .serve import serve

BAD_INPUT, INTERNAL, INTERRUPTED = 2, 1, 130  # exit codes
# What the library raises for input it refuses; everything else is a mistake of the program.
_REFUSALS = (ValueError, TypeError, OSError, ImportError, RuntimeError)


class OneLineErrors(TyperGroup):
    """A group of commands whose errors are one line on stderr; with ``--debug`` anywhere they are tracebacks."""

    def main(self, args: Sequence[str] | None = None, prog_name: str | None = None, **extra: Any) -> Any:
        """Run the command line and exit with 0, 1 (a mistake of the program), 2 (bad input) or 130 (interrupted)."""
        given = list(sys.argv[1:] if args is None else args)
        debug = "--debug" in given
        # The option belongs to the group, but people add it at the end of the line that failed.
        given = ["--debug"] * debug + [arg for arg in given if arg != "--debug"]
        extra["standalone_mode"] = False
        try:
            status = super().main(given, prog_name or "effk", **extra)
        except KeyboardInterrupt:
            status = INTERRUPTED
        except Exception as error:
            if debug:
                traceback.print_exc()
            status = _explain(error)
        sys.exit(status if isinstance(status, int) else 0)


def _explain(error: Exception) -> int:
    """Print one line about ``error``; returns the exit code."""
    if hasattr(error, "format_message"):  # of the command-line library: an unknown option, a missing argument
        code, text = BAD_INPUT, error.format_message()
    elif type(error).__name__ == "Abort":
        code, text = INTERRUPTED, "interrupted"
    elif isinstance(error, _REFUSALS):
        code, text = BAD_INPUT, str(error) or type(error).__name__
    else:
        code = INTERNAL
        text = f"{type(error).__name__}: {error}; this is a mistake of effk: add --debug for the details"
    print("effk: error: " + " ".join(text.split()), file=sys.stderr)
    return code


app = typer.Typer(
    cls=OneLineErrors,
    name="effk",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Make a transformer model smaller and faster on the machine at hand.",
)


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback where an error is one line.")] = False,
) -> None:
    """Options of every command; ``OneLineErrors`` reads them."""


app.command()(compress)
app.command()(auto)
app.command("eval")(evaluate)
app.command()(generate)
app.command()(serve)
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(bench)
app.command()(info)
app.command()(demo)
