"""``python -m effk.demo.sparse_runtime DIR``: a ReLU model decoded by ``effk.runtime``, dense, skipping, and in few bits.

DIR is a model of transformers with ReLU networks that the runtime knows, such as what :mod:`.relufication` saves. Every
form is compressed once, saved below ``--work`` with its perplexity, and then all decode in turns in one process. Figures:
docs/activation-sparsity.md.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from .. import isa
from ..compress import compress
from ..compress.convert import perplexity
from ..compress.evaluate import token_windows
from ..compress.passes.relufy import Relufy
from ..compress.passes.rtn import Rtn
from ..data import evaluation_text
from ..hub import load, save
from ..runtime.decoder import Decoder

_FEW = {"compute": "int8", "embedding_bits": 8}
FORMS: dict[str, tuple[Any, ...]] = {
    "bf16": (),
    "skipping, bf16 rows; the rest in bf16": (Relufy(rows="bf16"),),
    "4 bits (rtn, groups of 64)": (Rtn(bits=4, group_size=64, **_FEW),),
    "skipping, int8 rows; the rest in 4 bits": (Relufy(rows="int8"), Rtn(bits=4, group_size=64, **_FEW)),
    "skipping, int4 rows; the rest in 4 bits": (Relufy(rows="int4", group=64), Rtn(bits=4, group_size=64, **_FEW)),
}
PROMPT, STEP = 32, 24  # tokens read, and of each turn


def prepare(folder: Path, work: Path, windows: int = 8, length: int = 256) -> dict[str, float]:
    """Compress and save every form that is not there yet; form -> perplexity."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    held = token_windows(tokenizer, evaluation_text(), length, windows, spread=True)
    notes = work / "perplexity.json"
    found: dict[str, float] = json.loads(notes.read_text()) if notes.exists() else {}
    for number, (name, recipes) in enumerate(FORMS.items()):
        if name in found:
            continue
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
        for recipe in recipes:
            compress(model, recipe)
        found[name] = perplexity(model, [held])
        (save if recipes else _save_plain)(model, work / str(number), tokenizer)
        notes.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return found


def _save_plain(model: PreTrainedModel, folder: Path, tokenizer: Any) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def steps(decoder: Decoder, prompt: list[int]) -> Callable[[], float]:
    """A turn: ``STEP`` greedy tokens after the prompt; returns seconds a token, the median."""
    cache = decoder.cache(1, len(prompt) + STEP)

    def turn() -> float:
        cache.lengths[0] = 0
        logits, taken = decoder.step([(0, prompt)], cache), []
        for _ in range(STEP):
            token = int(logits[0].argmax())
            start = time.perf_counter()
            logits = decoder.step([(0, [token])], cache)
            taken.append(time.perf_counter() - start)
        return statistics.median(taken)

    return turn


def measure(work: Path, prompt: Tensor, rounds: int) -> dict[str, float]:
    """form -> tokens/s, the median of ``rounds`` turns, forms taking turns."""
    turns = {}
    for number, (name, recipes) in enumerate(FORMS.items()):
        if recipes:
            model = load(work / str(number))
        else:
            model = AutoModelForCausalLM.from_pretrained(work / str(number), dtype=torch.bfloat16).eval()
        turns[name] = steps(Decoder.from_model(model), prompt.tolist())
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    for _ in range(rounds):
        for name, turn in turns.items():
            seconds[name].append(turn())
    return {name: 1 / statistics.median(taken) for name, taken in seconds.items()}


def table(speeds: dict[str, float], quality: dict[str, float]) -> list[str]:
    """Markdown lines."""
    first = next(iter(speeds.values()))
    lines = ["| weights | perplexity | tokens/s | over bf16 |", "|---|---|---|---|"]
    lines += [f"| {n} | {quality[n]:.2f} | {v:.1f} | {v / first:.2f} × |" for n, v in speeds.items()]
    return [*lines, "", f"{torch.get_num_threads()} threads, {isa.active()}."]


def main(
    folder: Annotated[Path, typer.Argument(help="A model with ReLU networks.")],
    work: Annotated[Path, typer.Option(help="Folder for the compressed forms.")],
    rounds: Annotated[int, typer.Option(help="Turns of every form; 0: only prepare.")] = 5,
    threads: Annotated[int, typer.Option(help="Threads; 0: PyTorch's default.")] = 0,
) -> None:
    """Decode with a ReLU model in several forms (a minute, after a minute of compression)."""
    if threads:
        torch.set_num_threads(threads)
    work.mkdir(parents=True, exist_ok=True)
    quality = prepare(folder, work)
    if rounds:
        prompt = token_windows(AutoTokenizer.from_pretrained(folder), evaluation_text(), PROMPT, 1)[0]
        print("\n".join(table(measure(work, prompt, rounds), quality)))


if __name__ == "__main__":
    typer.run(main)
