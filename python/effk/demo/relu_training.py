"""``python -m effk.demo.relu_training``: a small ReLU language model, trained with and without a density loss, then run
sparsely.

An OPT of bytes with a wide feed-forward network, trained on the calibration text in the package and judged on the
evaluation text: once by its loss alone, once with the DEFT loss beside it. Same seed, same steps, same start. Then
both decode: with PyTorch's dense layers, with the kernel reading every neuron, and with the kernel skipping inactive
ones, which gives the same logits up to rounding. Figures: docs/activation-sparsity.md.
"""

from __future__ import annotations

import copy
import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from .. import isa
from ..compress import compress
from ..compress.cost_model import decoding_bytes
from ..compress.density_losses import DensityLoss
from ..compress.passes.relufy import Relufy
from ..compress.passes.rtn import Rtn
from ..compress.passes.sparse import Sparse
from ..data import calibration_text, evaluation_text
from .dyad_training import Settings, Trainer, batches, build, evaluate, next_byte_loss
from .sparse_speed import Speed, measure_speed

RISE = 0.3  # share of the steps over which the weight of the density loss rises


@dataclass
class Version:
    """One model after training.

    Attributes:
        losses, densities: nats per byte and share of active neurons of every step.
        evaluation: nats per byte on the evaluation text.
        speed: density there, and how fast it decodes.
    """

    losses: list[float]
    densities: list[float]
    evaluation: float
    seconds: float
    speed: Speed


@dataclass
class Outcome:
    """What was measured."""

    settings: Settings
    weight: float
    eps: float
    threads: int
    tier: str
    parameters: int
    versions: dict[str, Version] = field(default_factory=dict)
    combined: dict[str, tuple[float, float]] = field(default_factory=dict)  # nats per byte, MB that a token reads


class SparseTrainer(Trainer):
    """A trainer that watches density, and with a ``weight`` minimises the DEFT loss too."""

    def __init__(self, model: nn.Module, settings: Settings, weight: float, eps: float) -> None:
        super().__init__(model, settings, 1, False)
        self.weight, self.number, self.densities = weight, 0, []
        self.plain: list[float] = []
        self.extra = DensityLoss(model, "deft", eps=eps).attach()

    def loss(self, batch: Tensor) -> Tensor:
        task = next_byte_loss(self.model(batch, use_cache=False).logits, batch)
        density = self.extra.value()
        weight = self.weight * min(1.0, self.number / (RISE * self.settings.steps))
        self.number += 1
        self.densities.append(self.extra.density)
        self.plain.append(float(task.detach()))
        return task + weight * density if weight else task


def combine(model: nn.Module, windows: Tensor, calib: list[Tensor]) -> dict[str, tuple[float, float]]:
    """Loss, and megabytes that a token reads, as skipping, quantisation and pruning come on top of each other."""
    found = {"as trained": (evaluate(model, windows), decoding_bytes(model) / 1e6)}
    for name, rows, attention in (
        ("skipping, fp32 rows", "fp32", None),
        ("skipping, int8 rows", "int8", None),
        ("skipping, int8 rows; attention in 8 bits", "int8", Rtn(bits=8, group_size=32)),
        ("skipping, int8 rows; half of attention pruned, the rest in 8 bits", "int8", Sparse(sparsity=0.5)),
        ("skipping, int4 rows; attention in 4 bits", "int4", Rtn(bits=4, group_size=32)),
    ):
        copied = copy.deepcopy(model)
        costs = compress(copied, Relufy(rows=rows, group=0 if rows == "fp32" else 32), list(windows.split(8))).costs
        saved = costs["ffn_bytes_dense"] - costs["ffn_bytes"]
        if attention is not None:
            compress(copied, attention, calib)
        found[name] = (evaluate(copied, windows), (decoding_bytes(copied) - saved) / 1e6)
    return found


def run(
    settings: Settings, weight: float = 1.0, eps: float = 1e-7, out: Path | None = None, say: Any = print
) -> Outcome:
    """Train both models and measure them; reports and plots of sparsity go to ``out``."""
    text, test = (
        torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()
        for text in (calibration_text(), evaluation_text())
    )
    starts = torch.linspace(0, test.numel() - settings.length, settings.windows).long().tolist()
    windows = torch.stack([test[s : s + settings.length] for s in starts])
    outcome = Outcome(settings, weight, eps, torch.get_num_threads(), isa.active(), 0)
    for name, own in (("ReLU", 0.0), ("ReLU with DEFT", weight)):
        trainer = SparseTrainer(build(settings, None), settings, own, eps)
        outcome.parameters = sum(p.numel() for p in trainer.model.parameters())
        source, start = batches(text, settings, 0, 1), time.perf_counter()
        for number in range(settings.steps):
            trainer.step(next(source), number)
            if number % max(1, settings.steps // 5) == 0:
                say(f"  {name}, step {number}: {trainer.plain[-1]:.3f} nats, density {trainer.densities[-1]:.3f}")
        trainer.extra.detach()
        seconds, evaluation = time.perf_counter() - start, evaluate(trainer.model, windows)
        prompt = windows[:1, : settings.length // 4]
        count = settings.length - prompt.shape[1] - 1
        if own:
            outcome.combined = combine(trainer.model.eval(), windows, [next(source) for _ in range(8)])
        report, speed = measure_speed(trainer.model.eval(), Relufy(), prompt, count, windows)
        outcome.versions[name] = Version(trainer.plain, trainer.densities, evaluation, seconds, speed)
        say(f"{name}: {evaluation:.3f} nats per byte, density {speed.density:.3f}, {speed.tokens_per_second}")
        if out is not None:
            report.save(str(out / f"{'deft' if own else 'relu'}.json"))
    return outcome


def table(outcome: Outcome) -> list[str]:
    """Markdown lines."""
    s = outcome.settings
    ways = list(next(iter(outcome.versions.values())).speed.tokens_per_second)
    lines = [
        "| trained | loss, evaluation text | density, mean | p95 of the worst layer | "
        + " | ".join(f"tokens/s, {way}" for way in ways)
        + " | one network, every neuron / skipping |",
        "|---" * (5 + len(ways)) + "|",
    ]
    for name, v in outcome.versions.items():
        every, skipping = v.speed.ffn_us.values()
        speeds = " | ".join(f"{v.speed.tokens_per_second[way]:.0f}" for way in ways)
        lines.append(
            f"| {name} | {v.evaluation:.3f} | {v.speed.density:.3f} | {v.speed.p95:.3f} | {speeds} | "
            f"{every:.0f} / {skipping:.0f} us ({every / skipping:.2f} ×) |"
        )
    lines += ["", "| ReLU with DEFT | loss, evaluation text | MB a token reads |", "|---|---|---|"]
    lines += [f"| {name} | {loss:.3f} | {size:.2f} |" for name, (loss, size) in outcome.combined.items()]
    return [
        *lines,
        "",
        f"OPT of bytes, {outcome.parameters / 1e6:.1f} M parameters, hidden {s.width}, feed-forward {s.hidden}, "
        f"{s.blocks} blocks; "
        f"{s.steps} steps of {s.batch} x {s.length} bytes, fp32; DEFT weight {outcome.weight:g}, eps {outcome.eps:g}; "
        f"{outcome.threads} threads, {outcome.tier}.",
    ]


def main(
    steps: Annotated[int, typer.Option(help="Training steps of each model.")] = Settings.steps,
    width: Annotated[int, typer.Option(help="Hidden size; the feed-forward is 8 times as wide.")] = Settings.width,
    blocks: Annotated[int, typer.Option(help="Transformer blocks.")] = Settings.blocks,
    length: Annotated[int, typer.Option(help="Bytes per window.")] = Settings.length,
    batch: Annotated[int, typer.Option(help="Windows per step.")] = Settings.batch,
    weight: Annotated[float, typer.Option(help="Of the DEFT loss.")] = 1.0,
    eps: Annotated[float, typer.Option(help="Of the DEFT loss.")] = 1e-7,
    threads: Annotated[int, typer.Option(help="Threads; 0: PyTorch's default.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder for training.json, table.md and the reports.")] = None,
) -> None:
    """Train a small ReLU model with and without DEFT and decode with both (about ten minutes)."""
    for name, value, least in (("steps", steps, 1), ("width", width, 4), ("blocks", blocks, 1), ("length", length, 16)):
        if value < least:
            raise typer.BadParameter(f"--{name}: expected at least {least}")
    if threads:
        torch.set_num_threads(threads)
    settings = Settings(steps=steps, width=width, hidden=8 * width, blocks=blocks, length=length, batch=batch)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    outcome = run(settings, weight, eps, out, lambda text: print(text, flush=True))
    print("\n".join(["", *table(outcome)]))
    if out is not None:
        (out / "training.json").write_text(json.dumps(asdict(outcome), indent=1) + "\n", encoding="utf-8")
        (out / "table.md").write_text("\n".join(table(outcome)) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
