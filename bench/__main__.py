"""`python -m bench`: measures an op against its competitors, or judges earlier runs against the speed bars.

Nothing heavy is imported before the cores are chosen and the thread counts set: libraries read them once.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

OPS = (
    "wq_linear",
    "wq_grouped_linear",
    "fftconv",
    "dense_linear",
    "dyad_linear",
    "quik_linear",
    "relu_ffn",
    "bitmask_linear",
    "attention",
    "runtime",
)
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def integers(text: str) -> tuple[int, ...]:
    """ "1,4,32" as numbers."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"expected numbers with commas between them, got {text!r}") from None


def pin(threads: int) -> None:
    """Binds the process to the first `threads` cores and tells every library to use as many threads."""
    from . import machine

    chosen = machine.cores(threads)
    for name in THREAD_VARIABLES:
        os.environ[name] = str(threads)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, chosen)
    import torch

    torch.set_num_threads(threads)


@app.command()
def main(
    op: Annotated[str, typer.Option(help="What to measure: " + " or ".join(OPS) + ".")] = "wq_linear",
    quick: Annotated[bool, typer.Option("--quick", help="Two shapes, fewer turns: some minutes at most.")] = False,
    threads: Annotated[int, typer.Option(help="Threads, pinned to as many cores.")] = 1,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write one JSON object per row here.")] = None,
    isa: Annotated[str, typer.Option(help="Tier of ours; default: the best one, and avx2 beside it.")] = "",
    m: Annotated[str, typer.Option(help="Rows of x, e.g. 1,4,32; dense_linear, dyad_linear: tokens.")] = "",
    bits: Annotated[str, typer.Option(help="Widths of the weight, e.g. 4,3.")] = "",
    compute: Annotated[str, typer.Option(help="Forms of ours: int8,float.")] = "",
    shape: Annotated[
        str,
        typer.Option(
            help="Shapes of the standard set, e.g. 4096x4096 (NxK), 8x768x1024 (BxHxL), 768x3072 (inputs x outputs)."
        ),
    ] = "",
    kinds: Annotated[
        str,
        typer.Option(
            "--kind",
            help="fftconv: forward,forward uncached,gated,backward,decode,memory; dyad_linear: forward, training or "
            "feed-forward, each with fp32 or bf16, e.g. 'forward fp32,training bf16'; quik_linear: product,layer; "
            "relu_ffn: layer, down, batch or prompt, each with bf16, int8 or int4, e.g. 'layer bf16,down int8'; "
            "bitmask_linear: int8,float; attention: decode,prefill.",
        ),
    ] = "",
    baselines: Annotated[bool, typer.Option("--baselines/--no-baselines", help="Measure competitors too.")] = True,
    model: Annotated[list[Path] | None, typer.Option(help="runtime: folders written by `effk compress`.")] = None,
    readme: Annotated[
        list[Path] | None, typer.Option(help="Measure nothing: write results/README.md from these files.")
    ] = None,
    bars: Annotated[list[Path] | None, typer.Option(help="Measure nothing: judge the rows of these files.")] = None,
) -> None:
    """Measures OP and prints a table; every figure is of this run on this machine."""
    console = Console(width=None if Console().is_terminal else 200, log_path=False)
    if bars:
        from . import bars as judge

        raise typer.Exit(judge.report(bars, console))
    if readme:
        from . import results

        results.write(readme)
        return
    if op not in OPS:
        raise typer.BadParameter(f"--op: expected one of {', '.join(OPS)}, got {op!r}")
    try:
        pin(threads)
    except ValueError as error:
        raise typer.BadParameter(f"--{error}") from None
    if op == "runtime":
        from . import model as runtime

        rows = runtime.run(threads, quick, model or [], console)
        from .report import write_jsonl

        if json_file:
            write_jsonl(json_file, rows)
        return
    if op == "wq_grouped_linear":
        from . import wq_grouped_linear
        from .report import write_jsonl

        rows = wq_grouped_linear.run(threads, quick, integers(bits) if bits else (4,), console)
        if json_file:
            write_jsonl(json_file, rows)
        return
    if op == "fftconv":
        given = {"m": m, "bits": bits, "compute": compute}
        if names := [f"--{name}" for name, value in given.items() if value]:
            raise typer.BadParameter(f"--op fftconv: expected no {', '.join(names)}: options of wq_linear")
        convolution(quick, threads, json_file, isa, shape, kinds, baselines, console)
        return
    if op in ("dense_linear", "dyad_linear"):
        if names := [f"--{name}" for name, value in {"bits": bits, "compute": compute}.items() if value]:
            raise typer.BadParameter(f"--op {op}: expected no {', '.join(names)}: options of wq_linear")
        layers(op, quick, threads, json_file, isa, m, shape, kinds, baselines, console)
        return
    if op == "quik_linear":
        if names := [f"--{name}" for name, value in {"bits": bits, "compute": compute}.items() if value]:
            raise typer.BadParameter(f"--op {op}: expected no {', '.join(names)}: options of wq_linear")
        quantised(quick, threads, json_file, isa, m, shape, kinds, baselines, console)
        return
    if op == "bitmask_linear":
        if names := [f"--{name}" for name, value in {"bits": bits, "compute": compute}.items() if value]:
            raise typer.BadParameter(f"--op {op}: expected no {', '.join(names)}: options of wq_linear")
        sparse(quick, threads, json_file, isa, m, shape, kinds, baselines, console)
        return
    if op == "relu_ffn":
        if names := [f"--{name}" for name, value in {"m": m, "bits": bits, "compute": compute}.items() if value]:
            raise typer.BadParameter(f"--op {op}: expected no {', '.join(names)}: options of wq_linear")
        feed_forward(quick, threads, json_file, isa, shape, kinds, baselines, console)
        return
    if op == "attention":
        if names := [f"--{name}" for name, value in {"m": m, "bits": bits, "compute": compute}.items() if value]:
            raise typer.BadParameter(f"--op {op}: expected no {', '.join(names)}: options of wq_linear")
        attended(quick, threads, json_file, isa, shape, kinds, baselines, console)
        return
    linear(quick, threads, json_file, isa, m, bits, compute, shape, baselines, console)


def tiers_of(isa: str) -> tuple[str, ...]:
    """Ours to measure: the one that was asked for, or the best one with avx2 beside it."""
    import effk

    tiers = (isa,) if isa else tuple(dict.fromkeys((effk.isa.supported()[-1], "avx2")))
    for tier in tiers:
        if tier not in effk.isa.supported():
            raise typer.BadParameter(f"--isa: expected one of {', '.join(effk.isa.supported())}, got {tier!r}")
    return tiers


def some_of(option: str, text: str, known: dict[str, object], default: tuple) -> tuple:
    """The values that a text of names with commas chooses."""
    if not text:
        return default
    if unknown := [name for name in text.split(",") if name not in known]:
        raise typer.BadParameter(f"{option}: expected some of {', '.join(known)}, got {', '.join(unknown)}")
    return tuple(known[name] for name in text.split(","))


def convolution(
    quick: bool,
    threads: int,
    json_file: Path | None,
    isa: str,
    shape: str,
    kinds: str,
    baselines: bool,
    console: Console,
) -> None:
    """The fftconv table."""
    import torch

    from . import fftconv_problem as problem
    from . import fftconv_table, measure, report

    extras = [problem.DECODE, "memory"]
    every = list(problem.QUICK_KINDS if quick else problem.KINDS) + (extras if not quick and not shape else [])
    chosen = some_of("--kind", kinds, {name: name for name in (*problem.KINDS, *extras)}, tuple(every))
    default = problem.QUICK if quick else problem.SHAPES
    plan = fftconv_table.Plan(
        some_of("--shape", shape, {str(s): s for s in problem.SHAPES}, default),
        threads,
        tiers_of(isa),
        tuple(kind for kind in chosen if kind in problem.KINDS),
        wait_s=2.0 if quick else measure.QUIET_WAIT_S,
        turns=3 if quick else 5,
        baselines=baselines,
        decode=problem.DECODE in chosen,
        memory="memory" in chosen,
    )
    with console.status("measuring") as status, torch.inference_mode():
        result = fftconv_table.run(plan, lambda text: (status.update(text), console.log(text)))
    save(json_file, result, "fftconv")
    report.print_run(result, console)


def layers(
    op: str,
    quick: bool,
    threads: int,
    json_file: Path | None,
    isa: str,
    m: str,
    shape: str,
    kinds: str,
    baselines: bool,
    console: Console,
) -> None:
    """The dense_linear and dyad_linear tables."""
    from . import dyad_problem as problem
    from . import dyad_table, measure, report

    known = problem.DENSE_KINDS if op == dyad_table.DENSE else problem.KINDS
    plan = dyad_table.Plan(
        op,
        some_of("--shape", shape, {str(s): s for s in problem.LAYERS}, problem.QUICK if quick else problem.LAYERS),
        threads,
        tiers_of(isa),
        integers(m) if m else problem.TOKENS[:2] if quick else problem.TOKENS,
        some_of("--kind", kinds, {name: name for name in known}, known),
        wait_s=2.0 if quick else measure.QUIET_WAIT_S,
        turns=3 if quick else 5,
        baselines=baselines,
    )
    with console.status("measuring") as status:
        result = dyad_table.run(plan, lambda text: (status.update(text), console.log(text)))
    save(json_file, result, op)
    report.print_run(result, console)


def quantised(
    quick: bool,
    threads: int,
    json_file: Path | None,
    isa: str,
    m: str,
    shape: str,
    kinds: str,
    baselines: bool,
    console: Console,
) -> None:
    """The quik_linear table."""
    import torch

    from . import measure, quik_table, report
    from . import quik_problem as problem

    plan = quik_table.Plan(
        some_of("--shape", shape, {str(s): s for s in problem.LAYERS}, problem.LAYERS[: 1 if quick else None]),
        threads,
        tiers_of(isa),
        integers(m) if m else (1, 128) if quick else problem.ROWS,
        some_of("--kind", kinds, {name: name for name in problem.KINDS}, problem.KINDS),
        wait_s=2.0 if quick else measure.QUIET_WAIT_S,
        turns=3 if quick else 5,
        baselines=baselines,
    )
    with console.status("measuring") as status, torch.inference_mode():
        result = quik_table.run(plan, lambda text: (status.update(text), console.log(text)))
    save(json_file, result, "quik_linear")
    report.print_run(result, console)


def feed_forward(
    quick: bool,
    threads: int,
    json_file: Path | None,
    isa: str,
    shape: str,
    kinds: str,
    baselines: bool,
    console: Console,
) -> None:
    """The relu_ffn table."""
    import torch

    from . import measure, relu_table, report
    from . import relu_problem as problem

    layers = {str(s): s for s in problem.LAYERS}
    plan = relu_table.Plan(
        some_of("--shape", shape, layers, problem.LAYERS[2:3] if quick else problem.LAYERS),
        threads,
        tiers_of(isa),
        some_of("--kind", kinds, {name: name for name in problem.KINDS}, problem.KINDS),
        densities=(0.1, 0.5) if quick else problem.DENSITIES,
        wait_s=2.0 if quick else measure.QUIET_WAIT_S,
        turns=3 if quick else 5,
        baselines=baselines,
    )
    with console.status("measuring") as status, torch.inference_mode():
        result = relu_table.run(plan, lambda text: (status.update(text), console.log(text)))
    save(json_file, result, "relu_ffn")
    report.print_run(result, console)


def sparse(
    quick: bool,
    threads: int,
    json_file: Path | None,
    isa: str,
    m: str,
    shape: str,
    kinds: str,
    baselines: bool,
    console: Console,
) -> None:
    """The bitmask_linear table."""
    import torch

    from . import bitmask_linear as problem
    from . import bitmask_table, measure, report

    plan = bitmask_table.Plan(
        some_of("--shape", shape, {str(s): s for s in problem.LAYERS}, problem.LAYERS[: 1 if quick else None]),
        threads,
        tiers_of(isa),
        integers(m) if m else (1, 128) if quick else problem.ROWS,
        some_of("--kind", kinds, {name: name for name in bitmask_table.KINDS}, bitmask_table.KINDS),
        wait_s=2.0 if quick else measure.QUIET_WAIT_S,
        turns=3 if quick else 5,
        baselines=baselines,
    )
    with console.status("measuring") as status, torch.inference_mode():
        result = bitmask_table.run(plan, lambda text: (status.update(text), console.log(text)))
    save(json_file, result, "bitmask_linear")
    report.print_run(result, console)


def attended(
    quick: bool,
    threads: int,
    json_file: Path | None,
    isa: str,
    shape: str,
    kinds: str,
    baselines: bool,
    console: Console,
) -> None:
    """The attention table."""
    from . import attention_problem as problem
    from . import attention_table, measure, report

    plan = attention_table.Plan(
        some_of("--shape", shape, {str(s): s for s in problem.SHAPES}, problem.SHAPES[: 1 if quick else None]),
        threads,
        tiers_of(isa),
        some_of("--kind", kinds, {name: name for name in attention_table.KINDS}, attention_table.KINDS),
        sequences=problem.SEQUENCES[: 1 if quick else None],
        prompts=problem.PROMPTS[: 1 if quick else None],
        wait_s=2.0 if quick else measure.QUIET_WAIT_S,
        turns=3 if quick else 5,
        baselines=baselines,
    )
    with console.status("measuring") as status:
        result = attention_table.run(plan, lambda text: (status.update(text), console.log(text)))
    save(json_file, result, "attention")
    report.print_run(result, console)


def save(json_file: Path | None, result: object, op: str) -> None:
    """Writes the rows of a `measure.Result`, with the machine's limits before and what was missing after them."""
    from . import measure, report

    if json_file:
        rows = [*measure.machine_rows(result), *result.rows, *measure.missing_rows(result, op)]
        report.write_jsonl(json_file, rows)


def linear(
    quick: bool,
    threads: int,
    json_file: Path | None,
    isa: str,
    m: str,
    bits: str,
    compute: str,
    shape: str,
    baselines: bool,
    console: Console,
) -> None:
    """The wq_linear table."""
    import torch

    from . import measure, report, shapes, wq_linear_table

    tiers = tiers_of(isa)
    default = shapes.LINEAR_QUICK if quick else shapes.LINEAR
    chosen = some_of("--shape", shape, {str(s): s for s in shapes.LINEAR}, default)
    widths = integers(bits) if bits else shapes.BITS
    forms = tuple(compute.split(",")) if compute else shapes.FORMS
    for name, given, legal in (("bits", widths, shapes.BITS), ("compute", forms, shapes.FORMS)):
        if not set(given) <= set(legal):
            raise typer.BadParameter(f"--{name}: expected some of {legal}, got {given}")
    ms = integers(m) if m else shapes.MS_QUICK if quick else shapes.MS
    plan = wq_linear_table.Plan(
        chosen,
        ms,
        threads,
        tiers,
        widths,
        forms,
        wait_s=2.0 if quick else measure.QUIET_WAIT_S,
        turns=3 if quick else 5,
        baselines=baselines,
    )
    with (
        console.status("measuring") as status,
        torch.inference_mode(),
    ):  # as deployed: autograd alone costs microseconds a call
        result = wq_linear_table.run(plan, lambda text: (status.update(text), console.log(text)))
    save(json_file, result, "wq_linear")
    report.print_run(result, console)


if __name__ == "__main__":
    app(prog_name="python -m bench")
