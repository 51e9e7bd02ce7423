"""``effk bench``: the project's benchmark where its source is at hand, else a small one of the kernels."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import typer
from rich.table import Table
from torch import Tensor

from .. import isa
from ..formats.wq import WqWeight
from ..nn import WqLinear
from .info import cpu_name
from .terminal import Json, result, say

SHAPE, GROUP = (4096, 4096), 128  # N, K of a 7B model's attention; columns that share a scale
ROTATION = 160 << 20  # bytes of weights that take turns, so that each is read from memory and not from a cache
ROUNDS = 15


def bench(context: typer.Context, as_json: Json = False) -> None:
    """Measure the kernels on this machine.

    In a source checkout this runs `python -m bench` with the options given (see its --help): all shapes, competitors,
    and the measured roofline. Without one it measures wq_linear at one shape against PyTorch's bf16 linear.
    """
    root = Path(__file__).parents[3]
    if (root / "bench" / "__main__.py").is_file() and (root / "csrc" / "formats").is_dir():
        _full(root, context.args, as_json)
        return
    if context.args:
        raise ValueError(f"bench: expected no options without a source checkout, got {' '.join(context.args)}")
    say(f"wq_linear, M = 1, N x K = {SHAPE[0]} x {SHAPE[1]}, groups of {GROUP}, about 20 s")
    say("a source checkout has the full benchmark")
    rows = kernel_rows()
    title = f"{cpu_name()}, {rows[-1]['isa']}, {rows[-1]['threads']} threads"
    table = Table("weights", "form", "us", "GB/s", "x bf16", title=title)
    for row in rows:
        table.add_row(row["weights"], row["form"], f"{row['us']:.0f}", f"{row['gbps']:.1f}", f"{row['vs_bf16']:.2f}")
    result(rows, as_json, table)


def kernel_rows() -> list[dict[str, Any]]:
    """One record per kernel: median time of one product with cold weights; bf16, the yardstick, comes first."""
    n, k = SHAPE
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, k, generator=generator)
    common = {"op": "wq_linear", "m": 1, "n": n, "k": k, "group": GROUP}
    common |= {"isa": isa.active(), "threads": torch.get_num_threads()}
    dense = torch.randn(n, k, generator=generator).bfloat16()
    x_bf16 = x.bfloat16()

    def linear(weight: Tensor) -> Tensor:
        return torch.nn.functional.linear(x_bf16, weight)

    nbytes = dense.numel() * dense.element_size()
    with torch.inference_mode():
        base = _median_us(linear, [dense.clone() for _ in range(-(-ROTATION // nbytes))])
        rows = [{**common, "weights": "bf16", "form": "torch", "us": base, "gbps": nbytes / base / 1e3, "vs_bf16": 1.0}]
        for bits in (8, 4, 3, 2):
            codes = torch.randint(0, 1 << bits, (n, k), dtype=torch.uint8, generator=generator)
            weight = WqWeight.from_codes(codes, torch.rand(n, k // GROUP).half(), bits=bits, group_size=GROUP)
            for form in ("int8", "float"):
                copies = [WqLinear.from_weight(weight, compute=form) for _ in range(-(-ROTATION // weight.nbytes()))]
                us = _median_us(lambda layer: layer(x), copies)
                figures = {"us": us, "gbps": weight.nbytes() / us / 1e3, "vs_bf16": base / us}
                rows.append({**common, "weights": f"{bits} bits", "form": form, **figures})
    return rows


def _median_us(call: Callable[[Any], Any], weights: list[Any]) -> float:
    """Median over rounds of the mean time per weight of a round over all of them."""
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for weight in weights:
            call(weight)
        times.append((time.perf_counter() - start) / len(weights) * 1e6)
    return statistics.median(times[1:])


def _full(root: Path, options: list[str], as_json: bool) -> None:
    """Run ``python -m bench`` in the checkout; its tables go to stdout, or its rows as JSON instead."""
    command = [sys.executable, "-m", "bench", *options]
    if not as_json:
        raise typer.Exit(subprocess.run(command, cwd=root).returncode)
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        status = subprocess.run([*command, "--json", str(rows)], cwd=root, stdout=sys.stderr).returncode
        if status == 0:
            result([json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()], True)
    raise typer.Exit(status)
