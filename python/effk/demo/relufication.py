"""``python -m effk.demo.relufication``: SmolLM2-135M with ReLU in the place of SiLU, fine-tuned for a while on a CPU,
then run sparsely.

Stage 1 of Mirzadeh et al. (2310.04564) on the calibration text in the package, with a DEFT loss if asked for:
perplexity on the evaluation text against tokens seen, density of every layer, and decoding with and without skipping.
The published recovery saw 30 B tokens; a few ten thousand show its direction and no more. Figures:
docs/activation-sparsity.md.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from ..compress.convert import perplexity
from ..compress.density_losses import DensityLoss
from ..compress.evaluate import token_windows
from ..compress.passes.relufy import Relufy, swap_activations
from ..data import calibration_text, evaluation_text
from ..hub.models import smollm2
from .sparse_speed import Speed, measure_speed

WARM = 0.1  # share of the steps in which the rate rises


@dataclass
class Outcome:
    """What was measured; ``points`` are (tokens seen, perplexity, share of active neurons in training)."""

    rate: float
    weight: float
    original: float
    points: list[tuple[int, float, float]] = field(default_factory=list)
    seconds: float = 0.0
    density: dict[str, float] = field(default_factory=dict)
    speed: Speed | None = None


def fine_tune(
    model: nn.Module, batches: Tensor, held: Tensor, rate: float, weight: float, every: int, outcome: Outcome, say: Any
) -> None:
    """One step for each of ``batches`` ``[steps, length]``; the model's activations are its own."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    start, tokens, density = time.perf_counter(), 0, float("nan")
    for number, ids in enumerate(batches):
        if number % every == 0:
            outcome.points.append((tokens, perplexity(model.eval(), [held]), density))
            say(f"  {tokens} tokens: perplexity {outcome.points[-1][1]:.2f}, density {density:.3f}")
            model.train()
        share = max(0.0, number / len(batches) - WARM) / (1 - WARM)
        for group in optimizer.param_groups:
            group["lr"] = rate * min(
                (number + 1) / max(1, WARM * len(batches)), 0.55 + 0.45 * math.cos(math.pi * share)
            )
        with DensityLoss(model, "deft", weight) as loss:
            model(ids[None], labels=ids[None]).loss.backward()
            density = loss.density
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        tokens += len(ids)
    outcome.points.append((tokens, perplexity(model.eval(), [held]), density))
    outcome.seconds = time.perf_counter() - start
    say(f"  {tokens} tokens: perplexity {outcome.points[-1][1]:.2f}, density {density:.3f}, {outcome.seconds:.0f} s")


def run(
    model: nn.Module,
    tokenizer: Any,
    steps: int,
    length: int,
    rate: float,
    weight: float,
    windows: int,
    say: Any = print,
) -> Outcome:
    """Swap, train and measure; the model is compressed at the end."""
    held = token_windows(tokenizer, evaluation_text(), length, windows, spread=True)
    batches = token_windows(tokenizer, calibration_text(), length, steps, spread=True)
    outcome = Outcome(rate, weight, perplexity(model, [held]))
    say(f"original: perplexity {outcome.original:.2f}")
    swap_activations(model)
    order = torch.randperm(steps, generator=torch.Generator().manual_seed(0))
    fine_tune(model, batches[order], held, rate, weight, max(1, steps // 6), outcome, say)
    report, outcome.speed = measure_speed(model, Relufy(), held[:1, : length // 4], min(48, length // 2), held)
    outcome.density = {name: found.density.mean for name, found in report.measured.items()}
    return outcome


def table(outcome: Outcome) -> list[str]:
    """Markdown lines."""
    lines = [
        "| tokens seen | perplexity | density |",
        "|---|---|---|",
        f"| the model as it came, SiLU | {outcome.original:.2f} | 1 |",
    ]
    lines += [
        f"| {tokens} | {value:.2f} | {'' if math.isnan(rho) else f'{rho:.3f}'} |"
        for tokens, value, rho in outcome.points
    ]
    if (s := outcome.speed) is not None:
        lines += [
            "",
            "| decoding | " + " | ".join(s.tokens_per_second) + " |",
            "|---" * (1 + len(s.tokens_per_second)) + "|",
        ]
        lines.append("| tokens/s | " + " | ".join(f"{v:.1f}" for v in s.tokens_per_second.values()) + " |")
        lines.append("| one network, us |  | " + " | ".join(f"{v:.0f}" for v in s.ffn_us.values()) + " |")
    return lines


def main(
    steps: Annotated[int, typer.Option(help="Training steps, one window each.")] = 120,
    length: Annotated[int, typer.Option(help="Tokens per window.")] = 256,
    rate: Annotated[float, typer.Option(help="Of AdamW.")] = 2e-4,
    weight: Annotated[float, typer.Option(help="Of the DEFT loss.")] = 0.0,
    windows: Annotated[int, typer.Option(help="Windows of the evaluation text.")] = 8,
    threads: Annotated[int, typer.Option(help="Threads; 0: PyTorch's default.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder for relufication.json and table.md.")] = None,
) -> None:
    """Relufy SmolLM2-135M and fine-tune it (about fifteen minutes, 4 GB)."""
    if threads:
        torch.set_num_threads(threads)
    model, tokenizer = smollm2()
    outcome = run(model, tokenizer, steps, length, rate, weight, windows, lambda text: print(text, flush=True))
    print("\n".join(["", *table(outcome)]))
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "relufication.json").write_text(json.dumps(asdict(outcome), indent=1) + "\n", encoding="utf-8")
        (out / "table.md").write_text("\n".join(table(outcome)) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
