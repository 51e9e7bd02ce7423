"""``effk demo``: the whole way, from a model to a table of what its compressed versions are like."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from ..demo import SMOLLM2_CAVEAT, STEPS, Settings, run
from .models import Model, open_model
from .terminal import Json, progress_bars, result, say


def demo(
    model: Model = "smollm2",
    out: Annotated[Path, typer.Option(help="Folder for models, table, plot and figures.")] = Path("effk-demo"),
    as_json: Json = False,
) -> None:
    """Compress MODEL with LLM-MQ and with plain rounding, run all versions, and compare them."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out: expected a folder, got the file {str(out)!r}")
    out.mkdir(parents=True, exist_ok=True)
    say(f"step 1 of {STEPS}: {model}, the model that everything starts from")
    opened = open_model(model, torch.float32)
    if opened.compressed:
        raise ValueError(f"MODEL: expected a model that is not compressed yet, got {model!r}, which effk wrote")
    tokenizer, settings = opened.need_tokenizer("the demo"), Settings.for_model(opened.model)
    caveats = (SMOLLM2_CAVEAT,) if model == "smollm2" else ()
    outcome = run(opened.model, tokenizer, out, settings, say, progress_bars, caveats)
    result(outcome.record, as_json, *outcome.text())
