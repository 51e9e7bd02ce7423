"""`python -m bench`: measures an op against its competitors, or judges earlier runs against the speed bars.

Nothing heavy is imported before the cores are chosen and the thread counts set: libraries read them once.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
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
    append: Annotated[
        bool, typer.Option("--append", help="Keep the rows of other shapes that the file of --json holds.")
    ] = False,
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
    if op in ("runtime", "wq_grouped_linear"):
        from .report import write_jsonl

        if op == "runtime":
            from . import model as runtime

            rows = runtime.run(threads, quick, model or [], console)
        else:
            from . import wq_grouped_linear

            rows = wq_grouped_linear.run(threads, quick, integers(bits) if bits else (4,), console)
        if json_file:
            write_jsonl(json_file, rows)
        return
    given = {"m": m, "bits": bits, "compute": compute}
    if names := [f"--{name}" for name, value in given.items() if value and name not in TAKES.get(op, ())]:
        raise typer.BadParameter(f"--op {op}: expected no {', '.join(names)}: options of wq_linear")
    table(Options(op, quick, threads, isa, m, bits, compute, shape, kinds, baselines), json_file, append, console)


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


@dataclass(frozen=True)
class Options:
    """What the command line says about a table."""

    op: str
    quick: bool
    threads: int
    isa: str
    m: str
    bits: str
    compute: str
    shape: str
    kinds: str
    baselines: bool

    def shapes(self, every: Sequence, quick: Sequence) -> tuple:
        """Those that were asked for; else a few, or all."""
        return some_of("--shape", self.shape, {str(s): s for s in every}, tuple(quick if self.quick else every))

    def some_kinds(self, every: Sequence[str], default: Sequence[str] | None = None) -> tuple[str, ...]:
        """Those that were asked for."""
        return some_of(
            "--kind", self.kinds, {name: name for name in every}, tuple(every if default is None else default)
        )

    def rows(self, every: tuple[int, ...], quick: tuple[int, ...]) -> tuple[int, ...]:
        """Numbers of rows of x."""
        return integers(self.m) if self.m else quick if self.quick else every


def fftconv(o: Options) -> tuple[ModuleType, dict]:
    from . import fftconv_problem as problem
    from . import fftconv_table

    extras = [problem.DECODE, "memory"]
    every = list(problem.QUICK_KINDS if o.quick else problem.KINDS) + extras * (not o.quick and not o.shape)
    chosen = o.some_kinds((*problem.KINDS, *extras), every)
    return fftconv_table, {
        "shapes": o.shapes(problem.SHAPES, problem.QUICK),
        "kinds": tuple(kind for kind in chosen if kind in problem.KINDS),
        "decode": problem.DECODE in chosen,
        "memory": "memory" in chosen,
    }


def layers(o: Options) -> tuple[ModuleType, dict]:
    from . import dyad_problem as problem
    from . import dyad_table

    return dyad_table, {
        "op": o.op,
        "layers": o.shapes(problem.LAYERS, problem.QUICK),
        "tokens": o.rows(problem.TOKENS, problem.TOKENS[:2]),
        "kinds": o.some_kinds(problem.DENSE_KINDS if o.op == dyad_table.DENSE else problem.KINDS),
    }


def quik_linear(o: Options) -> tuple[ModuleType, dict]:
    from . import quik_problem as problem
    from . import quik_table

    return quik_table, {
        "layers": o.shapes(problem.LAYERS, problem.LAYERS[:1]),
        "rows": o.rows(problem.ROWS, (1, 128)),
        "kinds": o.some_kinds(problem.KINDS),
    }


def relu_ffn(o: Options) -> tuple[ModuleType, dict]:
    from . import relu_problem as problem
    from . import relu_table

    return relu_table, {
        "layers": o.shapes(problem.LAYERS, problem.LAYERS[2:3]),
        "kinds": o.some_kinds(problem.KINDS),
        "densities": (0.1, 0.5) if o.quick else problem.DENSITIES,
    }


def bitmask_linear(o: Options) -> tuple[ModuleType, dict]:
    from . import bitmask_linear as problem
    from . import bitmask_table

    return bitmask_table, {
        "layers": o.shapes(problem.LAYERS, problem.LAYERS[:1]),
        "rows": o.rows(problem.ROWS, (1, 128)),
        "kinds": o.some_kinds(bitmask_table.KINDS),
    }


def attention(o: Options) -> tuple[ModuleType, dict]:
    from . import attention_problem as problem
    from . import attention_table

    few = 1 if o.quick else None
    return attention_table, {
        "shapes": o.shapes(problem.SHAPES, problem.SHAPES[:1]),
        "kinds": o.some_kinds(attention_table.KINDS),
        "sequences": problem.SEQUENCES[:few],
        "prompts": problem.PROMPTS[:few],
    }


def wq_linear(o: Options) -> tuple[ModuleType, dict]:
    from . import shapes, wq_linear_table

    widths = integers(o.bits) if o.bits else shapes.BITS
    forms = tuple(o.compute.split(",")) if o.compute else shapes.FORMS
    for name, given, legal in (("bits", widths, shapes.BITS), ("compute", forms, shapes.FORMS)):
        if not set(given) <= set(legal):
            raise typer.BadParameter(f"--{name}: expected some of {legal}, got {given}")
    return wq_linear_table, {
        "shapes": o.shapes(shapes.LINEAR, shapes.LINEAR_QUICK),
        "ms": o.rows(shapes.MS, shapes.MS_QUICK),
        "bits": widths,
        "forms": forms,
    }


# What makes the module of an op's table and what of its plan the options say.
PLANS = {
    "wq_linear": wq_linear,
    "fftconv": fftconv,
    "dense_linear": layers,
    "dyad_linear": layers,
    "quik_linear": quik_linear,
    "relu_ffn": relu_ffn,
    "bitmask_linear": bitmask_linear,
    "attention": attention,
}
TAKES = {  # which of the options of wq_linear others have too
    "wq_linear": ("m", "bits", "compute"),
    "dense_linear": ("m",),
    "dyad_linear": ("m",),
    "quik_linear": ("m",),
    "bitmask_linear": ("m",),
}


def table(o: Options, json_file: Path | None, append: bool, console: Console) -> None:
    """Runs the table of an op, prints it and keeps its rows.

    append: beside the rows of other shapes that the file holds: a table in pieces. The machine's limits are those of the last.
    """
    import torch

    from . import measure, report

    module, what = PLANS[o.op](o)
    plan = module.Plan(
        threads=o.threads,
        tiers=tiers_of(o.isa),
        wait_s=2.0 if o.quick else measure.QUIET_WAIT_S,
        turns=3 if o.quick else 5,
        baselines=o.baselines,
        **what,
    )
    # As deployed: autograd alone costs microseconds a call. Tables of training steps switch it on again.
    with console.status("measuring") as status, torch.inference_mode():
        result = module.run(plan, lambda text: (status.update(text), console.log(text)))
    if json_file:
        rows = [*measure.machine_rows(result), *result.rows, *measure.missing_rows(result, o.op)]
        if append and json_file.exists():
            shapes = [row.shape for row in result.rows]
            rows += [r for r in report.read_jsonl(json_file) if r.op == o.op and r.shape and r.shape not in shapes]
        report.write_jsonl(json_file, rows)
    report.print_run(result, console)


if __name__ == "__main__":
    app(prog_name="python -m bench")
