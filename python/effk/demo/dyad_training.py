"""``python -m effk.demo.dyad_training``: a small language model trained from scratch, dense and with DYAD feed-forward.

An OPT of bytes, trained on the calibration text in the package and judged on the evaluation text: once dense, then with
DYAD layers of n = 4 and n = 8 blocks. Same seed, same steps, same rates; what is not a feed-forward matrix starts from
the same numbers. Afterwards training steps are timed, the models in turns. Figures: docs/dyad-training.md.

It also runs in several processes, each with its share of every batch, and gives the same losses up to rounding::

    python -m torch.distributed.run --standalone --nproc-per-node 2 -m effk.demo.dyad_training
"""

from __future__ import annotations

import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from torch import Tensor, distributed, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from .. import isa
from ..compress.passes.dyad import init_dyad
from ..data import calibration_text, evaluation_text

if TYPE_CHECKING:
    from transformers import OPTForCausalLM

BYTES = 256
WARM = 0.1  # share of the steps in which the rate rises; it falls to a tenth afterwards


@dataclass(frozen=True)
class Settings:
    """Sizes of model, training and measurements; the batch is that of all processes together."""

    width: int = 256
    hidden: int = 1024
    blocks: int = 4
    heads: int = 4
    length: int = 128
    batch: int = 16
    steps: int = 200
    rate: float = 2e-3
    blocks_per_component: tuple[int, ...] = (4, 8)  # DYAD's n; each gives one more model
    variant: str = "it"
    windows: int = 48  # of the evaluation text
    rounds: int = 8  # of the timing
    seed: int = 0


@dataclass
class Version:
    """One model after training.

    Attributes:
        losses: nats per byte of every training step.
        evaluation: nats per byte on the evaluation text.
        parameters, feedforward: in all, and in its feed-forward matrices.
        step_ms: median of a training step.
        forward_ms: median of a forward pass of one batch without gradients.
    """

    losses: list[float]
    evaluation: float
    parameters: int
    feedforward: int
    training_seconds: float
    step_ms: float = 0.0
    forward_ms: float = 0.0


@dataclass
class Outcome:
    """What was measured."""

    settings: Settings
    threads: int
    processes: int
    tier: str
    compiled: bool
    versions: dict[str, Version] = field(default_factory=dict)


def build(settings: Settings, n: int | None) -> OPTForCausalLM:
    """The model, dense for ``n`` None; whatever is not a feed-forward matrix has the same numbers for every n."""
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(settings.seed)
    config = OPTConfig(
        vocab_size=BYTES, hidden_size=settings.width, ffn_dim=settings.hidden, num_hidden_layers=settings.blocks,
        num_attention_heads=settings.heads, word_embed_proj_dim=settings.width, max_position_embeddings=settings.length,
        dropout=0.0, bos_token_id=0, eos_token_id=0, pad_token_id=None,
    )  # fmt: skip
    model = OPTForCausalLM(config).train()
    if n is not None:
        init_dyad(model, n, settings.variant)
    return model


def batches(ids: Tensor, settings: Settings, rank: int, processes: int) -> Iterator[Tensor]:
    """Random windows ``(share of the batch, length)``, the same for every model; each process has its rows of them."""
    generator = torch.Generator().manual_seed(settings.seed)
    while True:
        starts = torch.randint(ids.numel() - settings.length, (settings.batch,), generator=generator).tolist()
        yield torch.stack([ids[s : s + settings.length] for s in starts[rank::processes]])


class Trainer:
    """A model, its optimizer and its steps."""

    def __init__(self, model: nn.Module, settings: Settings, processes: int, compiled: bool) -> None:
        self.model, self.settings, self.processes = model, settings, processes
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=settings.rate, betas=(0.9, 0.98), weight_decay=0.1)
        self.run: Callable[..., Any] = DistributedDataParallel(model) if processes > 1 else model
        if compiled:
            self.run = torch.compile(self.run)

    def step(self, batch: Tensor, number: int) -> float:
        """One step; returns the loss over all processes."""
        warm = max(1, int(WARM * self.settings.steps))
        share = min(1.0, max(0.0, (number - warm) / max(1, self.settings.steps - warm)))
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.rate * min((number + 1) / warm, 0.55 + 0.45 * math.cos(math.pi * share))
        loss = self.loss(batch)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        mean = loss.detach().clone()
        if self.processes > 1:
            distributed.all_reduce(mean)
        return float(mean) / self.processes

    def loss(self, batch: Tensor) -> Tensor:
        """What is minimised."""
        return next_byte_loss(self.run(batch, use_cache=False).logits, batch)


def next_byte_loss(logits: Tensor, ids: Tensor) -> Tensor:
    """Nats per byte; the first byte of a window is not scored."""
    return cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


@torch.no_grad()
def evaluate(model: nn.Module, windows: Tensor) -> float:
    """Nats per byte over windows ``(count, length)``."""
    model.eval()
    losses = [float(next_byte_loss(model(part, use_cache=False).logits, part)) for part in windows.split(8)]
    model.train()
    return statistics.fmean(losses)


def time_in_turns(actions: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median milliseconds of every action, after one round that is not counted."""
    taken: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(rounds + 1):
        for name, action in actions.items():
            start = time.perf_counter()
            action()
            taken[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values[1:]) for name, values in taken.items()}


def run(
    settings: Settings,
    say: Callable[[str], None] = lambda text: None,
    *,
    compiled: bool = False,
    rank: int = 0,
    processes: int = 1,
) -> Outcome:
    """Train, evaluate and time every model."""
    if settings.batch % processes:
        raise ValueError(f"dyad_training: batch: expected a multiple of {processes} processes, got {settings.batch}")
    outcome = Outcome(settings, torch.get_num_threads(), processes, isa.active(), compiled)
    text, test = (
        torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()
        for text in (calibration_text(), evaluation_text())
    )
    starts = torch.linspace(0, test.numel() - settings.length, settings.windows).long().tolist()
    test = torch.stack([test[s : s + settings.length] for s in starts])
    trainers = {}
    for n in (None, *settings.blocks_per_component):
        name = "dense" if n is None else f"DYAD-{settings.variant.upper()} n = {n}"
        trainer = trainers[name] = Trainer(build(settings, n), settings, processes, compiled)
        source, losses, start = batches(text, settings, rank, processes), [], time.perf_counter()
        for number in range(settings.steps):
            losses.append(trainer.step(next(source), number))
            if number % max(1, settings.steps // 5) == 0:
                spent = time.perf_counter() - start
                say(f"  {name}, step {number} of {settings.steps}: {losses[-1]:.3f} nats, {spent:.0f} s")
        seconds = time.perf_counter() - start
        outcome.versions[name] = Version(
            losses=losses,
            evaluation=evaluate(trainer.model, test),
            parameters=sum(p.numel() for p in trainer.model.parameters()),
            feedforward=sum(p.numel() for key, p in trainer.model.named_parameters() if ".fc" in key and p.dim() > 1),
            training_seconds=seconds,
        )
        say(f"{name}: {outcome.versions[name].evaluation:.3f} nats per byte, trained in {seconds:.0f} s")
    say("timing steps, the models in turns")
    batch = next(batches(text, settings, rank, processes))
    steps = {name: lambda t=trainer: t.step(batch, settings.steps) for name, trainer in trainers.items()}
    forwards = {name: lambda t=trainer: evaluate(t.model, batch) for name, trainer in trainers.items()}
    for name, value in time_in_turns(steps, settings.rounds).items():
        outcome.versions[name].step_ms = value
    for name, value in time_in_turns(forwards, settings.rounds).items():
        outcome.versions[name].forward_ms = value
    return outcome


def table(outcome: Outcome) -> list[str]:
    """Markdown lines."""
    s, dense = outcome.settings, outcome.versions["dense"]
    lines = [
        "| model | parameters | of these feed-forward | loss, last tenth of training | loss, evaluation text | "
        "training step ms | dense / this | forward ms | dense / this |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, v in outcome.versions.items():
        last = statistics.fmean(v.losses[-max(1, len(v.losses) // 10) :])
        lines.append(
            f"| {name} | {v.parameters / 1e6:.2f} M | {v.feedforward / 1e6:.2f} M | {last:.3f} | {v.evaluation:.3f} | "
            f"{v.step_ms:.1f} | {dense.step_ms / v.step_ms:.2f} | {v.forward_ms:.1f} | "
            f"{dense.forward_ms / v.forward_ms:.2f} |"
        )
    seconds = sum(v.training_seconds for v in outcome.versions.values())
    return [
        *lines,
        "",
        f"OPT of bytes, hidden {s.width}, feed-forward {s.hidden}, {s.blocks} blocks; {s.steps} steps of "
        f"{s.batch} x {s.length} bytes; fp32, {outcome.processes} process{'es' * (outcome.processes > 1)}, "
        f"{outcome.threads} threads each, {outcome.tier}{', torch.compile' * outcome.compiled}; {seconds:.0f} s of "
        f"training. The dense matrices run in PyTorch {torch.__version__}.",
    ]


def plot(outcome: Outcome, path: Path) -> None:
    """Write a PNG: smoothed losses, and step times beside them."""
    import matplotlib

    matplotlib.use("Agg")  # no display is needed
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained", width_ratios=(2, 1))
    for name, version in outcome.versions.items():
        value, smooth = version.losses[0], []
        for loss in version.losses:
            value += 0.1 * (loss - value)
            smooth.append(value)
        left.plot(smooth, label=f"{name}, evaluation {version.evaluation:.2f}")
    left.set_xlabel("step")
    left.set_ylabel("nats per byte, smoothed over ten steps")
    left.legend(fontsize=8)
    right.bar(list(outcome.versions), [version.step_ms for version in outcome.versions.values()])
    right.set_ylabel("ms per training step")
    right.tick_params(axis="x", labelsize=7)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


@contextmanager
def process_group() -> Iterator[tuple[int, int]]:
    """Rank and number of processes: those of torchrun where it started this one, else 0 and 1."""
    if "WORLD_SIZE" not in os.environ:
        yield 0, 1
        return
    distributed.init_process_group("gloo")
    try:
        yield distributed.get_rank(), distributed.get_world_size()
    finally:
        distributed.destroy_process_group()


def main(
    steps: Annotated[int, typer.Option(help="Training steps of each model.")] = Settings.steps,
    width: Annotated[int, typer.Option(help="Hidden size; the feed-forward is four times as wide.")] = Settings.width,
    blocks: Annotated[int, typer.Option(help="Transformer blocks.")] = Settings.blocks,
    length: Annotated[int, typer.Option(help="Bytes per window.")] = Settings.length,
    batch: Annotated[int, typer.Option(help="Windows per step, of all processes together.")] = Settings.batch,
    threads: Annotated[int, typer.Option(help="Threads; 0: PyTorch's default.")] = 0,
    compiled: Annotated[bool, typer.Option("--compile", help="Through torch.compile.")] = False,
    out: Annotated[Path | None, typer.Option(help="Folder for training.json, training.png and table.md.")] = None,
) -> None:
    """Train a small OPT from scratch, dense and with DYAD layers (a few minutes)."""
    for name, value in (
        ("steps", steps),
        ("width", width),
        ("blocks", blocks),
        ("length", length - 1),
        ("batch", batch),
    ):
        if value < 1:
            raise typer.BadParameter(f"--{name}: expected a larger number")
    if threads:
        torch.set_num_threads(threads)
    settings = Settings(steps=steps, width=width, hidden=4 * width, blocks=blocks, length=length, batch=batch)
    with process_group() as (rank, processes):
        say = (lambda text: print(text, flush=True)) if rank == 0 else (lambda text: None)
        outcome = run(settings, say, compiled=compiled, rank=rank, processes=processes)
        say("\n".join(["", *table(outcome)]))
        if out is not None and rank == 0:
            out.mkdir(parents=True, exist_ok=True)
            (out / "training.json").write_text(json.dumps(asdict(outcome), indent=1) + "\n", encoding="utf-8")
            (out / "table.md").write_text("\n".join(table(outcome)) + "\n", encoding="utf-8")
            plot(outcome, out / "training.png")


if __name__ == "__main__":
    typer.run(main)
