"""``effk auto``: find the cheapest recipe that keeps the model as good as asked, and write the result."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.table import Table

from .. import hub
from ..compress.auto import ALGORITHMS, BITS, GROUPS, Trial, algorithms_for, candidates, label
from ..compress.auto import auto as search_and_compress
from ..data import calibration_text, evaluation_text
from .compress import PLAN, REPORT, check_source, check_target, write
from .models import Dtype, Model, open_model, parse_dtype
from .terminal import Json, progress_bars, result, say
from .texts import calibration_batches, check_positions, check_windows, read_text


def auto(
    model: Model,
    out: Annotated[Path | None, typer.Option(help="Folder to write; the log of the search is OUT.auto.json.")] = None,
    target_loss: Annotated[float, typer.Option(help="Largest rise of the perplexity; 0.01 is 1 %.")] = 0.01,
    budget: Annotated[float | None, typer.Option(help="Largest size in MB (1e6 bytes) of the whole model.")] = None,
    algorithms: Annotated[
        str | None,
        typer.Option(
            help=f"Of the candidates: {','.join(ALGORITHMS)}; default: all, moqe for mixtures of experts only."
        ),
    ] = None,
    bits: Annotated[str, typer.Option(help="Of the candidates; llm-mq takes fractions.")] = ",".join(map(str, BITS)),
    groups: Annotated[str, typer.Option(help="Of the candidates; 0: the row.")] = ",".join(map(str, GROUPS)),
    compute: Annotated[str | None, typer.Option(help="float (exact) or int8 (faster, about 1 % error).")] = None,
    embedding_bits: Annotated[int | None, typer.Option(help="8: store embedding and tied head in 8 bits.")] = None,
    text: Annotated[Path | None, typer.Option(help="UTF-8 text to judge on; default: the text in effk.")] = None,
    context: Annotated[int, typer.Option(help="Tokens per window.")] = 512,
    windows: Annotated[int, typer.Option(help="Windows.")] = 4,
    calib: Annotated[list[Path] | None, typer.Option(help="Text files to calibrate on.")] = None,
    calib_sequences: Annotated[int, typer.Option(help="Sequences to calibrate on.")] = 8,
    calib_length: Annotated[int, typer.Option(help="Tokens per sequence.")] = 512,
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Try recipes on MODEL, from the smallest up, and write the first that is good enough to OUT.

    A search that was stopped goes on where it was when the same command runs again.
    """
    check_windows(("--context", "--windows"), context, windows)
    check_windows(("--calib-length", "--calib-sequences"), calib_length, calib_sequences)
    fields = {"compute": compute, "embedding_bits": embedding_bits}
    fields = {name: value for name, value in fields.items() if value is not None}
    widths = [int(b) if b.is_integer() else b for b in _numbers("--bits", bits)]
    sizes = [int(g) for g in _numbers("--groups", groups)]
    given = None if algorithms is None else [name.strip() for name in algorithms.split(",")]
    recipes = candidates(given or tuple(ALGORITHMS), widths, sizes, **fields)
    wanted = parse_dtype(dtype)
    check_source(model)
    check_target(out, optional=False)
    content = evaluation_text() if text is None else read_text("--text", text)
    texts = [read_text("--calib", path) for path in calib or ()]

    opened = open_model(model, torch.float32)
    if given is None:
        recipes = candidates(algorithms_for(opened.model), widths, sizes, **fields)
    tokenizer = opened.need_tokenizer("perplexity")
    check_positions("--context", opened, context)
    check_positions("--calib-length", opened, calib_length)
    source = "\n\n".join(texts) if texts else calibration_text()
    batches = calibration_batches(opened, source, calib_sequences, calib_length)
    out.parent.mkdir(parents=True, exist_ok=True)
    log = out.with_name(f"{out.name}.auto.json")

    def tell(trial: Trial) -> None:
        say(f"{label(trial.recipe)}: {trial.bytes / 1e6:.1f} MB, perplexity {trial.score:.4g} ({trial.loss:+.2%})")

    with progress_bars() as progress:
        found = search_and_compress(
            opened.model,
            target_loss,
            None if budget is None else int(budget * 1e6),
            tokenizer=tokenizer,
            recipes=recipes,
            calib=batches,
            text=content,
            context=context,
            windows=windows,
            log=log,
            progress=progress,
            on_trial=tell,
        )
    titles, *rows = found.table()
    table = Table(*titles)
    for row in rows:
        table.add_row(*row)
    record = found.to_json() | {"out": None if found.recipe is None else str(out), "log": str(log)}
    if found.recipe is None:
        result(record, as_json, table)
        limit = (
            f"--target-loss: expected a candidate within {target_loss:.2%}"
            if budget is None
            else "--budget: expected a candidate within it"
        )
        raise ValueError(f"{limit}, got none of {len(found.trials)} that were tried; nothing was written")
    opened.model.to(wanted or opened.dtype)
    hub.save(opened.model, out, opened.tokenizer)
    write(out, PLAN, found.report.plan.to_json())
    found.report.save(str(out / REPORT))
    say(f"wrote {out}")
    result(record, as_json, table, str(found.report))


def _numbers(option: str, text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{option}: expected numbers with commas between them, got {text!r}") from None
