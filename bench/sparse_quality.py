"""`python -m bench.sparse_quality`: perplexity of SmolLM2-135M pruned one-shot in several ways, a row at a time.

Short windows, so that a run takes minutes: what counts is the order of the methods, not the last digit. The compressed
modules are measured, float activations unless a row says int8. Every row is written at once; a run that was cut off goes on.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import typer

import effk
from effk.compress.evaluate import perplexity, token_windows
from effk.compress.passes.sparse import Sparse
from effk.data import calibration_text, evaluation_text
from effk.hub.models import smollm2

RESULTS = Path(__file__).parent / "results" / "sparse_quality_smollm2.json"
CONTEXT, WINDOWS = 512, 8
CALIBRATION = (16, 512, 4)  # sequences, length, batch
ROWS: dict[str, Sparse | None] = {
    "dense, fp32": None,
    "50 %, sparsegpt, fp32": Sparse(values="fp32"),
    "50 %, wanda, fp32": Sparse(method="wanda", values="fp32"),
    "50 %, magnitude, fp32": Sparse(method="magnitude", values="fp32"),
    "50 %, sparsegpt, int8": Sparse(),
    "50 %, sparsegpt, int8 activations": Sparse(compute="int8"),
    "2:4, sparsegpt, fp32": Sparse(pattern="2:4", values="fp32"),
    "30 %, sparsegpt, int8": Sparse(sparsity=0.3),
    "75 %, sparsegpt, int8": Sparse(sparsity=0.75),
}


def main(
    rows: Annotated[str, typer.Option(help="Measure rows whose name contains this.")] = "",
    output: Annotated[Path, typer.Option(help="File of the results.")] = RESULTS,
) -> None:
    """Measure what is missing in the file of results."""
    done = json.loads(output.read_text()) if output.exists() else {}
    for name, recipe in ROWS.items():
        if name in done or rows not in name:
            continue
        model, tokenizer = smollm2()
        model = model.float()
        start, bits = time.perf_counter(), 32.0
        if recipe is not None:
            count, length, batch = CALIBRATION
            calib = token_windows(tokenizer, calibration_text(), length, count, spread=True).split(batch)
            bits = effk.compress(model, recipe, list(calib)).true_bits
        seconds = time.perf_counter() - start
        done[name] = {
            "perplexity": perplexity(model, tokenizer, evaluation_text(), CONTEXT, WINDOWS),
            "bits_per_weight": bits,
            "seconds": seconds,
            "windows": WINDOWS,
            "context": CONTEXT,
        }
        output.write_text(json.dumps(done, indent=1) + "\n")
        print(f"{name}: {done[name]['perplexity']:.2f}, {bits:.2f} bits a weight, {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    typer.run(main)
