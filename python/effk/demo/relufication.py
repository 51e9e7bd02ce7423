"""``python -m effk.demo.relufication``: SmolLM2-135M with ReLU in the place of SiLU, fine-tuned for a while on a CPU,
then run sparsely.

Stage 1 of Mirzadeh et al. (2310.04564) on the calibration text in the package, with a DEFT loss if asked for:
perplexity on the evaluation text against tokens seen, density of every layer, and decoding with and without skipping.
The loss is the text's own ("text"), or the original is the teacher ("distil"): the divergence of its next-token
distribution plus SquareHead on its hidden states (2310.06927). The published recovery saw 30 B tokens; a hundred
thousand show its direction and no more. With ``--out`` the model is saved, as any ReLU model of transformers. Figures:
docs/activation-sparsity.md.
"""

from __future__ import annotations

import copy
import json
import math
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from ..compress.convert import perplexity
from ..compress.density_losses import DensityLoss
from ..compress.evaluate import token_windows
from ..compress.passes.relufy import Relufy, swap_activations
from ..compress.sparse_training import squarehead_loss
from ..data import calibration_text, evaluation_text
from ..hub.models import smollm2
from .sparse_speed import Speed, measure_speed

WARM = 0.1  # share of the steps in which the rate rises
SQUAREHEAD = 0.1  # weight: a sum over 30 layers, it would drown the divergence at the start
LOSSES = ("text", "distil")


@dataclass
class Training:
    """How it is trained: ``steps`` of ``batch`` windows of ``length`` tokens, at ``rate`` of AdamW with ``weight`` of the
    DEFT loss; ``narrow``: products in bf16 (PyTorch's autocast), weights and sums in fp32."""

    steps: int = 120
    length: int = 256
    batch: int = 1
    rate: float = 2e-4
    weight: float = 0.0
    loss: str = "text"
    narrow: bool = False


@dataclass
class Outcome:
    """What was measured; ``points`` are (tokens seen, perplexity, share of active neurons in training)."""

    training: Training
    original: float
    points: list[tuple[int, float, float]] = field(default_factory=list)
    seconds: float = 0.0
    density: dict[str, float] = field(default_factory=dict)
    speed: Speed | None = None


def objective(model: nn.Module, teacher: nn.Module | None, ids: Tensor, narrow: bool) -> Tensor:
    """The loss of a batch ``[windows, length]``."""
    with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
        out = model(ids, output_hidden_states=teacher is not None, use_cache=False)
    if teacher is None:
        return cross_entropy(out.logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())
    with torch.no_grad():
        wanted = teacher(ids, output_hidden_states=True, use_cache=False)
        target = log_softmax(wanted.logits.float(), -1).flatten(0, 1)
    got = log_softmax(out.logits.float(), -1).flatten(0, 1)
    divergence = kl_div(got, target, reduction="batchmean", log_target=True)
    return divergence + SQUAREHEAD * squarehead_loss(out.hidden_states, wanted.hidden_states)


def fine_tune(
    model: nn.Module, teacher: nn.Module | None, batches: list[Tensor], held: Tensor, outcome: Outcome, say: Any
) -> None:
    """One step for each of ``batches`` ``[windows, length]``; the model's activations are its own."""
    how, tokens, density = outcome.training, 0, float("nan")
    optimizer = torch.optim.AdamW(model.parameters(), lr=how.rate, weight_decay=0.0)
    start, every = time.perf_counter(), max(1, len(batches) // 6)

    def judge() -> None:
        outcome.points.append((tokens, perplexity(model.eval(), [held]), density))
        seconds = time.perf_counter() - start
        say(f"  {tokens} tokens: perplexity {outcome.points[-1][1]:.2f}, density {density:.3f}, {seconds:.0f} s")
        model.train()

    for number, ids in enumerate(batches):
        if number % every == 0:
            judge()
        share = max(0.0, number / len(batches) - WARM) / (1 - WARM)
        for group in optimizer.param_groups:
            group["lr"] = how.rate * min(
                (number + 1) / max(1, WARM * len(batches)), 0.55 + 0.45 * math.cos(math.pi * share)
            )
        with DensityLoss(model, "deft") as extra:
            loss = objective(model, teacher, ids, how.narrow)
            with torch.set_grad_enabled(how.weight > 0):
                pull = extra.value()
            (loss + how.weight * pull if how.weight else loss).backward()
            density = extra.density
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        tokens += ids.numel()
    judge()
    model.eval()
    outcome.seconds = time.perf_counter() - start


def windows_of(tokenizer: Any, how: Training) -> list[Tensor]:
    """Batches of windows of the calibration text in random order; where it has too few tokens for all, it is read
    several times, each time cut elsewhere."""
    ids = torch.tensor(tokenizer(calibration_text(), add_special_tokens=False)["input_ids"], dtype=torch.int64)
    generator, starts = torch.Generator().manual_seed(0), []
    while len(starts) < how.steps * how.batch:
        shift = int(torch.randint(how.length, (1,), generator=generator))
        places = torch.arange(shift, len(ids) - how.length + 1, how.length)
        starts += places[torch.randperm(len(places), generator=generator)].tolist()
    windows = torch.stack([ids[start : start + how.length] for start in starts[: how.steps * how.batch]])
    return list(windows.split(how.batch))


def run(
    model: nn.Module,
    tokenizer: Any,
    how: Training,
    windows: int,
    out: Path | None = None,
    say: Any = print,
    decoded: int = 48,
) -> Outcome:
    """Swap, train, save to ``out``, and measure; the model is compressed at the end."""
    held = token_windows(tokenizer, evaluation_text(), how.length, windows, spread=True)
    outcome = Outcome(how, perplexity(model, [held]))
    say(f"original: perplexity {outcome.original:.2f}")
    teacher = None
    if how.loss == "distil":
        teacher = copy.deepcopy(model).requires_grad_(False)
        teacher = teacher.to(torch.bfloat16) if how.narrow else teacher
    swap_activations(model)
    fine_tune(model, teacher, windows_of(tokenizer, how), held, outcome, say)
    if out is not None:
        model.config.hidden_act = "relu"  # what the swapped modules compute: transformers alone loads the model
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
    report, outcome.speed = measure_speed(model, Relufy(), held[:1, : how.length // 4], decoded, held)
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
        lines += ["", f"Largest difference of a logit, skipping: {s.largest_error:.1e} of the largest."]
    return lines


def main(
    steps: Annotated[int, typer.Option(help="Training steps.")] = 120,
    batch: Annotated[int, typer.Option(help="Windows of a step.")] = 1,
    length: Annotated[int, typer.Option(help="Tokens per window.")] = 256,
    rate: Annotated[float, typer.Option(help="Of AdamW.")] = 2e-4,
    weight: Annotated[float, typer.Option(help="Of the DEFT loss.")] = 0.0,
    loss: Annotated[str, typer.Option(help="'text', or 'distil': towards the original.")] = "text",
    narrow: Annotated[bool, typer.Option("--bf16", help="Products of the training in bf16.")] = False,
    windows: Annotated[int, typer.Option(help="Windows of the evaluation text.")] = 8,
    threads: Annotated[int, typer.Option(help="Threads; 0: PyTorch's default.")] = 0,
    decoded: Annotated[int, typer.Option(help="Tokens to decode and compare, skipping and not.")] = 48,
    out: Annotated[Path | None, typer.Option(help="Folder for the model, relufication.json and table.md.")] = None,
) -> None:
    """Relufy SmolLM2-135M and fine-tune it (about fifteen minutes, 4 GB)."""
    if loss not in LOSSES:
        raise typer.BadParameter(f"--loss: expected one of {', '.join(LOSSES)}, got {loss!r}")
    if threads:
        torch.set_num_threads(threads)
    torch.set_flush_denormal(True)  # squares of the smallest gradients may be denormal, which is slow arithmetic
    model, tokenizer = smollm2()
    how = Training(steps, length, batch, rate, weight, loss, narrow)
    outcome = run(model, tokenizer, how, windows, out, lambda text: print(text, flush=True), decoded)
    print("\n".join(["", *table(outcome)]))
    if out is not None:
        (out / "relufication.json").write_text(json.dumps(asdict(outcome), indent=1) + "\n", encoding="utf-8")
        (out / "table.md").write_text("\n".join(table(outcome)) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
