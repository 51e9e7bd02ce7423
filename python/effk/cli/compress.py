"""``effk compress``: from a model folder to a smaller one."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.table import Table

from .. import hub
from ..compress import NetworkPlan, Plan, Recipe, make_plan, plan_from_json, recipe_from_json
from ..compress import compress as compress_model
from ..compress.activation import ActivationHandler
from ..compress.registry import handler_for
from ..compress.solvers.knapsack import InfeasibleBudget
from ..data import calibration_text
from ..hub.atomic import publish, write_temporary
from .models import Dtype, Model, Opened, is_compressed, open_model, parse_dtype, read_config
from .recipes import make_recipe
from .terminal import Json, progress_bars, result, say
from .texts import calibration_batches, check_positions, check_windows, read_text

PLAN, REPORT = "plan.json", "report.json"


def compress(
    model: Model,
    out: Annotated[Path | None, typer.Option(help="Folder to write: model, tokenizer, plan.json, report.json.")] = None,
    recipe: Annotated[
        str | None, typer.Option(help="llm-mq (default), quik, finequant, rtn, moqe, dyad, sparse, relufy ...")
    ] = None,
    bits: Annotated[float | None, typer.Option(help="Bits per weight; for llm-mq the average, e.g. 3.4.")] = None,
    group: Annotated[int | None, typer.Option(help="Weights that share a scale: 32, 64, 128, 256; 0: the row.")] = None,
    compute: Annotated[str | None, typer.Option(help="float (exact) or int8 (faster, about 1 % error).")] = None,
    embedding_bits: Annotated[int | None, typer.Option(help="8: store embedding and tied head in 8 bits.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="Any field of the recipe.")
    ] = None,
    plan: Annotated[Path | None, typer.Option(help="Apply this plan; it carries its recipe.")] = None,
    plan_only: Annotated[
        bool, typer.Option("--plan-only", help="Stop after planning; writes to OUT or stdout.")
    ] = False,
    calib: Annotated[
        list[Path] | None, typer.Option(help="Text files to calibrate on; default: the text in effk.")
    ] = None,
    calib_sequences: Annotated[int, typer.Option(help="Sequences to calibrate on.")] = 16,
    calib_length: Annotated[int, typer.Option(help="Tokens per sequence.")] = 512,
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Compress MODEL and write it to OUT.

    Weights are read in fp32, compressed block by block, checked against the kernels and saved in one step: OUT holds
    the old model or the new one, also after a crash.
    """
    if plan is not None and plan_only:
        raise ValueError("--plan-only: expected no --plan beside it: that one is made already")
    chosen, given_plan = _recipe_and_plan(plan, recipe, bits, group, compute, embedding_bits, settings)
    wanted = parse_dtype(dtype)
    check_source(model)
    check_target(out, optional=plan_only)
    check_windows(("--calib-length", "--calib-sequences"), calib_length, calib_sequences)
    texts = [read_text("--calib", path) for path in calib or ()]

    opened = open_model(model, torch.float32)
    _check_space(out, opened)
    batches = None
    handler = handler_for(chosen)
    judged = isinstance(handler, ActivationHandler) and bool(handler.exact(chosen))  # on held-out text
    if texts or judged or handler.needs_calibration(chosen):
        check_positions("--calib-length", opened, calib_length)
        text = "\n\n".join(texts) if texts else calibration_text()
        batches = calibration_batches(opened, text, calib_sequences, calib_length)
        say(f"{chosen.name}: calibrating on {calib_sequences} sequences of {calib_length} tokens")
    try:
        with progress_bars() as progress:
            if plan_only:
                made = make_plan(opened.model, chosen, batches, progress)
            else:
                report = compress_model(opened.model, chosen, batches, given_plan, progress)
    except InfeasibleBudget as error:
        raise ValueError(
            f"--bits: expected a budget that the choices can meet, got {chosen.bits:g}: {error}"
        ) from error
    if plan_only:
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            write(out, PLAN, made.to_json())
            say(f"wrote {out / PLAN}; edit it and apply it with --plan")
        text = made.to_json()
        result({"plan": json.loads(text)}, as_json, text if out is None else plan_table(made))
        return

    opened.model.to(wanted or opened.dtype)
    hub.save(opened.model, out, opened.tokenizer)
    write(out, PLAN, report.plan.to_json())
    report.save(str(out / REPORT))
    say(f"wrote {out}")
    record = {"out": str(out), "recipe": chosen.to_json(), "report": report.to_json()}
    result(record, as_json, str(report))


def plan_table(plan: Plan | NetworkPlan) -> Table:
    """A plan for people: one line a layer or network."""
    if isinstance(plan, NetworkPlan):
        titles, *rows = plan.table()
        table = Table(*titles)
        for row in rows:
            table.add_row(*row)
        return table
    table = Table("layer", "bits", "group", "format", "outliers", "MB before", "MB after", "score")
    for name, entry in plan.layers.items():
        score = "" if entry.score is None else f"{entry.score:.3g}"
        group = str(entry.group_size or "row")
        sizes = (f"{entry.bytes_before / 1e6:.3f}", f"{entry.bytes_after / 1e6:.3f}")
        columns = entry.options.get("outlier_columns")
        outliers = f"{entry.outliers:g}" if columns is None else f"{columns} columns"
        bits = str(entry.bits) if columns is None else f"{entry.bits}, x {entry.options['bits_a']}"
        table.add_row(name, bits, group, entry.format, outliers, *sizes, score)
    for name, why in plan.skipped.items():
        table.add_row(name, "-", "", "", "", "", "", why)
    return table


def _recipe_and_plan(
    plan: Path | None,
    method: str | None,
    bits: float | None,
    group: int | None,
    compute: str | None,
    embedding_bits: int | None,
    settings: list[str] | None,
) -> tuple[Recipe, Plan | NetworkPlan | None]:
    options = {"bits": bits, "group_size": group, "compute": compute, "embedding_bits": embedding_bits}
    if plan is None:
        return make_recipe(method or "llm-mq", settings or (), **options), None
    names = {"--recipe": method, "--bits": bits, "--group": group, "--compute": compute}
    names |= {"--embedding-bits": embedding_bits, "--set": settings}
    if clash := [name for name, value in names.items() if value is not None and value != []]:
        raise ValueError(f"--plan: expected no {', '.join(clash)} beside it: the plan carries its recipe")
    loaded = plan_from_json(read_text("--plan", plan))
    return recipe_from_json(loaded.recipe), loaded


def check_source(model: str) -> None:
    """Refuse a model that effk wrote."""
    if (model != "smollm2" or Path(model).exists()) and is_compressed(read_config(Path(model))):
        raise ValueError(f"MODEL: expected a model that is not compressed yet, got {model!r}, which effk wrote")


def check_target(out: Path | None, *, optional: bool) -> None:
    """Refuse, before any work, a folder that cannot be written or that holds something else."""
    if out is None:
        if not optional:
            raise ValueError("--out: expected a folder to write the compressed model to, got none")
        return
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out: expected a folder, got the file {str(out)!r}")
    if (out / "config.json").exists() and not is_compressed(read_config(out)):
        raise ValueError(f"--out: expected a folder that is new or effk's, got {str(out)!r}, which holds another model")
    try:
        with tempfile.TemporaryFile(dir=_existing(out)):
            pass
    except OSError as error:
        raise ValueError(f"--out: expected a folder that can be written, got {str(out)!r}: {error.strerror}") from None


def _existing(path: Path) -> Path:
    """The folder itself or the nearest one above it that exists: nothing is made before there is something to write."""
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.is_dir())


def _check_space(out: Path | None, opened: Opened) -> None:
    """Refuse, before the long part, a disk that cannot hold even the smallest result: two bits a weight."""
    if out is None:
        return
    least = sum(parameter.numel() for parameter in opened.model.parameters()) // 4
    free = shutil.disk_usage(_existing(out)).free
    if free < least:
        raise ValueError(f"--out: expected at least {least / 1e6:.0f} MB free, got {free / 1e6:.0f} MB at {str(out)!r}")


def write(folder: Path, name: str, text: str) -> None:
    """Replace a file in one step."""
    publish(write_temporary(folder, lambda path: path.write_text(text, encoding="utf-8")), folder / name)
