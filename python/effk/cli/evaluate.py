"""``effk eval``: perplexity by the project's one definition."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from ..compress.evaluate import DEFINITION, perplexity
from ..data import evaluation_text
from .models import Dtype, Model, open_model, parse_dtype
from .terminal import Json, progress_bars, result
from .texts import check_positions, check_windows, read_text


def evaluate(
    model: Model,
    text: Annotated[Path | None, typer.Option(help="UTF-8 text file; default: the evaluation text in effk.")] = None,
    context: Annotated[int, typer.Option(help="Tokens per window.")] = 1024,
    windows: Annotated[int, typer.Option(help="Windows.")] = 8,
    batch: Annotated[int, typer.Option(help="Windows that run at once.")] = 1,
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Measure the perplexity of MODEL and print its definition."""
    check_windows(("--context", "--windows"), context, windows)
    if batch < 1:
        raise ValueError(f"--batch: expected at least 1, got {batch}")
    wanted = parse_dtype(dtype)
    content = evaluation_text() if text is None else read_text("--text", text)
    opened = open_model(model, wanted)
    tokenizer = opened.need_tokenizer("perplexity")
    check_positions("--context", opened, context)
    start = time.perf_counter()
    with progress_bars() as progress:
        value = perplexity(opened.model, tokenizer, content, context, windows, batch=batch, progress=progress)
    definition = DEFINITION.format(windows=windows, context=context)
    record = {
        "model": model,
        "perplexity": value,
        "context": context,
        "windows": windows,
        "scored_tokens": windows * (context - 1),
        "text": "effk evaluation text (Jargon File)" if text is None else str(text),
        "dtype": str(opened.model.dtype).removeprefix("torch."),
        "definition": definition,
        "seconds": time.perf_counter() - start,
    }
    result(record, as_json, f"perplexity {value:.3f}", definition)
