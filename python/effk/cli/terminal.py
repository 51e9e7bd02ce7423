"""What a command writes: results on stdout, as text or as one JSON value, and everything else on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]

# Stages that methods report (effk.compress.Progress), in words.
_STAGES = {
    "scale": "searching channel scales",
    "score": "scoring bit-widths",
    "plan": "planning",
    "apply": "compressing layers",
    "search": "trying recipes",
    "evaluate": "evaluating windows",
}


def say(text: str) -> None:
    """A line for the person who waits."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(text, markup=False)


def result(record: Any, as_json: bool, *text: RenderableType) -> None:
    """The outcome of a command: ``record`` as JSON, or ``text``."""
    if as_json:
        print(json.dumps(record, indent=1, default=str))
        return
    # A file or a pipe has no width: tables must not be cut to the 80 columns that are assumed then.
    console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 160)
    for part in text:
        console.print(part, markup=False) if isinstance(part, str) else console.print(part)


@contextmanager
def progress_bars() -> Iterator[Callable[[str, int, int], None]]:
    """A progress callback that draws one bar per stage; where stderr is no terminal, a line when a stage begins."""
    if not sys.stderr.isatty():
        seen: set[str] = set()

        def announce(stage: str, done: int, total: int) -> None:
            if stage not in seen:
                seen.add(stage)
                say(f"{_STAGES.get(stage, stage)} ({total})")

        yield announce
        return
    times = (TimeElapsedColumn(), TimeRemainingColumn())
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), *times)
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, Any] = {}

        def draw(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(_STAGES.get(stage, stage), total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield draw
