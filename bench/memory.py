"""`python -m bench.memory DIR`: the memory that decoding takes, beside what `effk.runtime.memory` predicts before loading.

A fresh process first loads and runs a tiny model, so that Python, its libraries and their pools are there; then its
resident memory (VmRSS) is read before the model is loaded, after that, after the decoder and cache are made, and when every
sequence of the cache is full. Linux only.
"""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers import LlamaConfig, LlamaForCausalLM

import effk
from effk.compress.passes.rtn import Rtn
from effk.runtime.decoder import Decoder
from effk.runtime.memory import predict

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    directory: str,
    sequences: int = 8,
    capacity: int = 1024,
    cache: str = "fp16",
    here: Annotated[bool, typer.Option(help="Measure in this process instead of a fresh one.")] = False,
) -> None:
    """Print one JSON object, in bytes."""
    print(
        json.dumps(
            grown(directory, sequences, capacity, cache) if here else measure(directory, sequences, capacity, cache)
        )
    )


def measure(directory: str | Path, sequences: int, capacity: int, cache: str = "fp16") -> dict[str, float]:
    """:func:`grown` in a fresh process, and the prediction."""
    command = [sys.executable, "-m", "bench.memory", str(directory), "--sequences", str(sequences)]
    command += ["--capacity", str(capacity), "--cache", cache, "--here"]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    record = json.loads(done.stdout.splitlines()[-1])
    expected = predict(directory, sequences, capacity, cache)
    predicted = {"weights": expected.weights, "cache": expected.cache, "work": expected.work, "total": expected.total}
    return {"predicted": predicted, "measured": record, "ratio": record["full"] / expected.total}


def grown(directory: str | Path, sequences: int, capacity: int, cache: str) -> dict[str, int]:
    """What resident memory has grown by after each step, and at most (its peak while loading)."""
    with tempfile.TemporaryDirectory() as folder:
        config = LlamaConfig(
            vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, head_dim=16
        )
        tiny = LlamaForCausalLM(config)
        effk.compress(tiny, Rtn(bits=4, group_size=32))
        decode(effk.load(effk.save(tiny, Path(folder) / "tiny")), 1, 32, cache)
        del tiny
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = resident("VmRSS")
    model = effk.load(directory)
    record = {"loaded": resident("VmRSS") - before}
    record |= {name: size - before for name, size in decode(model, sequences, capacity, cache).items()}
    return record | {"peak": resident("VmHWM") - before}


def decode(model: torch.nn.Module, sequences: int, capacity: int, cache: str) -> dict[str, int]:
    """Fill a cache; resident memory before and after."""
    decoder = Decoder.from_model(model)
    room = decoder.cache(sequences, capacity, cache)
    made = resident("VmRSS")
    last = min(capacity - 1, 4)  # tokens that come one by one, all sequences at once
    ids = [token % decoder.vocab_size for token in range(capacity - last)]
    decoder.step([(slot, ids) for slot in range(sequences)], room)  # in steps of the most rows that there are
    for _ in range(last):
        decoder.step([(slot, ids[:1]) for slot in range(sequences)], room)
    return {"made": made, "full": resident("VmRSS")}


def resident(field: str) -> int:
    """Bytes of a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":")) * 1024


if __name__ == "__main__":
    app()
