"""``python -m effk.demo.long_convolution``: a small language model of gated long convolutions, trained and compressed.

Bytes in, bytes out; no attention. It is trained for a few minutes on the first nine tenths of the calibration text in
the package, compressed within budgets that are measured on the last tenth, and judged on the evaluation text. Then it
decodes, with state and by reading everything again for every byte. Figures: docs/long-convolution.md.
"""

from __future__ import annotations

import copy
import json
import math
import statistics
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from .. import isa
from ..compress import FilterReport, compress
from ..compress.passes.frequency_sparse import FrequencySparse
from ..compress.passes.partial import Partial
from ..data import calibration_text, evaluation_text
from ..nn import BandLimitedFilter, FFTConv, HyenaOperator, LongFilter

HELD_OUT = 0.1  # of the calibration text: for budgets, not for training
PROMPT = 16  # bytes before decoding starts


@dataclass(frozen=True)
class Settings:
    """Sizes of model, training and measurements."""

    width: int = 192
    blocks: int = 3
    length: int = 1024
    batch: int = 4
    steps: int = 250
    rate: float = 3e-3
    windows: int = 32  # of the evaluation text
    calib_windows: int = 16
    errors: tuple[float, ...] = (0.01, 0.03, 0.1)
    losses: tuple[float, ...] = (0.001, 0.01, 0.05)
    decode: int = 1008  # bytes
    recompute: int = 48  # of these decoded by reading everything again, evenly spread: each costs a whole forward
    seed: int = 0


class Block(nn.Module):
    """A gated long convolution and a feed-forward network, each with a norm before it and a path around it."""

    def __init__(self, width: int, length: int, conv: FFTConv) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(2))
        self.mix = HyenaOperator(width, length, conv=conv)
        self.feed = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(self.norms[0](x))
        return x + self.feed(self.norms[1](x))

    def prefill(self, x: Tensor, capacity: int) -> tuple[Tensor, Any]:
        mixed, state = self.mix.prefill(self.norms[0](x), capacity)
        x = x + mixed
        return x + self.feed(self.norms[1](x)), state

    def step(self, x: Tensor, state: Any) -> Tensor:
        x = x + self.mix.step(self.norms[0](x), state)
        return x + self.feed(self.norms[1](x))


class ByteModel(nn.Module):
    """``(B, L)`` bytes to ``(B, L, 256)`` logits; the embedding is the head too."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        conv = FFTConv()
        self.embedding = nn.Embedding(256, settings.width)
        self.blocks = nn.ModuleList(Block(settings.width, settings.length, conv) for _ in range(settings.blocks))
        self.norm = nn.RMSNorm(settings.width)
        nn.init.normal_(self.embedding.weight, std=settings.width**-0.5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return self._head(x)

    @torch.no_grad()
    def prefill(self, ids: Tensor, capacity: int) -> tuple[Tensor, list[Any]]:
        """Logits after a prompt, and the state from which ``capacity`` more bytes can be decoded."""
        x, states = self.embedding(ids), []
        for block in self.blocks:
            x, state = block.prefill(x, capacity)
            states.append(state)
        return self._head(x[:, -1]), states

    @torch.no_grad()
    def step(self, ids: Tensor, states: list[Any]) -> Tensor:
        """Logits after one more byte ``(B,)``; changes the states."""
        x = self.embedding(ids)
        for block, state in zip(self.blocks, states, strict=True):
            x = block.step(x, state)
        return self._head(x)

    def _head(self, x: Tensor) -> Tensor:
        return self.norm(x) @ self.embedding.weight.T


class TwoSidedFilter(LongFilter):
    """Low frequencies with all lags that they have, negative ones too: ``(channels, 2 length)``, bidirectional mode."""

    def __init__(self, source: BandLimitedFilter) -> None:
        super().__init__()
        bins = torch.view_as_complex(source.bins)
        self.register_buffer("taps", torch.fft.irfft(bins, 2 * source.length).contiguous())

    def forward(self, length: int) -> Tensor:
        if 2 * length != self.taps.shape[1]:
            raise ValueError(f"TwoSidedFilter: length: expected {self.taps.shape[1] // 2}, got {length}")
        return self.taps


def two_sided(model: ByteModel) -> ByteModel:
    """A frequency-sparse model with the negative lags that its filters dropped: what the published form computes."""
    model, conv = copy.deepcopy(model), FFTConv(mode="bidirectional")
    for block in model.blocks:
        block.mix.filter, block.mix.conv = TwoSidedFilter(block.mix.filter), conv
    return model


@dataclass
class Outcome:
    """What was measured."""

    settings: Settings
    threads: int
    tier: str
    parameters: int = 0
    training_seconds: float = 0.0
    training_loss: float = 0.0
    versions: list[dict[str, Any]] = field(default_factory=list)
    two_sided: dict[str, float] = field(default_factory=dict)  # name -> loss of a model that sees the future
    decoding: dict[str, float] = field(default_factory=dict)
    sample: str = ""


def as_bytes(text: str) -> Tensor:
    """The UTF-8 bytes of a text, int64."""
    return torch.frombuffer(bytearray(text.encode("utf-8")), dtype=torch.uint8).long()


def windows(ids: Tensor, length: int, count: int) -> Tensor:
    """``(count, length)``: windows spread evenly; ValueError where the text is shorter than one."""
    if ids.numel() < length:
        raise ValueError(f"windows: text: expected at least {length} bytes, got {ids.numel()}")
    starts = torch.linspace(0, ids.numel() - length, count).long().tolist()
    return torch.stack([ids[start : start + length] for start in starts])


def train(model: ByteModel, ids: Tensor, settings: Settings, say: Any) -> float:
    """Adam on random windows, the rate warmed up and falling to a tenth; returns the mean loss of the last tenth."""
    generator = torch.Generator().manual_seed(settings.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.rate, betas=(0.9, 0.98), weight_decay=0.05)
    warm, losses, start = max(1, settings.steps // 20), [], time.perf_counter()
    for step in range(settings.steps):
        share = max(0.0, (step - warm) / max(1, settings.steps - warm))
        rate = settings.rate * min((step + 1) / warm, 0.55 + 0.45 * math.cos(math.pi * share))
        for group in optimizer.param_groups:
            group["lr"] = rate
        starts = torch.randint(ids.numel() - settings.length - 1, (settings.batch,), generator=generator).tolist()
        batch = torch.stack([ids[s : s + settings.length + 1] for s in starts])
        loss = cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
        if step % max(1, settings.steps // 8) == 0:
            say(f"  step {step} of {settings.steps}: loss {losses[-1]:.3f}, {time.perf_counter() - start:.0f} s")
    return statistics.fmean(losses[-max(1, settings.steps // 10) :])


@torch.no_grad()
def evaluate(model: ByteModel, ids: Tensor) -> float:
    """Nats per byte over windows ``(count, length)``, the first byte of each not scored."""
    losses = [cross_entropy(model(part)[:, :-1].flatten(0, 1), part[:, 1:].flatten()) for part in ids.split(4)]
    return statistics.fmean(float(loss) for loss in losses)


@torch.no_grad()
def reading_speed(models: dict[str, ByteModel], ids: Tensor, rounds: int = 5) -> dict[str, float]:
    """Bytes per second of whole forward passes, the models in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(rounds + 1):
        for name, model in models.items():
            start = time.perf_counter()
            model(ids)
            seconds[name].append(time.perf_counter() - start)
    return {name: ids.numel() / statistics.median(taken[1:]) for name, taken in seconds.items()}


def decode(model: ByteModel, prompt: Tensor, count: int) -> tuple[Tensor, float]:
    """Greedy bytes with state, and the seconds of all steps."""
    logits, states = model.prefill(prompt, count)
    out, start = [], time.perf_counter()
    for _ in range(count):
        out.append(logits.argmax(-1))
        logits = model.step(out[-1], states)
    return torch.stack(out, 1), time.perf_counter() - start


@torch.no_grad()
def recompute(model: ByteModel, prompt: Tensor, decoded: Tensor, samples: int) -> tuple[float, float]:
    """Decoding without state: seconds a byte, estimated from some positions, and the share of bytes that agree."""
    ids, agree, taken = torch.cat([prompt, decoded], 1), 0, 0.0
    positions = torch.linspace(0, decoded.shape[1] - 1, samples).long().tolist()
    for position in positions:
        start = time.perf_counter()
        logits = model(ids[:, : prompt.shape[1] + position])[:, -1]
        taken += time.perf_counter() - start
        agree += int(logits.argmax(-1) == decoded[:, position])
    return taken / samples, agree / samples


def recipes(settings: Settings) -> dict[str, Partial | FrequencySparse]:
    """Name -> recipe of every version."""
    out: dict[str, Partial | FrequencySparse] = {}
    for name, kind in (("partial", Partial), ("frequency-sparse", FrequencySparse)):
        for budget, amounts in (("error", settings.errors), ("loss", settings.losses)):
            for amount in amounts:
                out[f"{name}, {budget} {amount:g}"] = kind(budget=budget, amount=amount)
    return out


def run(settings: Settings, say: Any = lambda text: None) -> Outcome:
    """Everything: train, compress, evaluate, decode."""
    torch.manual_seed(settings.seed)
    outcome = Outcome(settings, torch.get_num_threads(), isa.active())
    text = as_bytes(calibration_text())
    held = int(len(text) * (1 - HELD_OUT))
    calib = list(windows(text[held:], settings.length, settings.calib_windows).split(4))
    test = windows(as_bytes(evaluation_text()), settings.length, settings.windows)

    model = ByteModel(settings)
    outcome.parameters = sum(p.numel() for p in model.parameters())
    say(f"training {outcome.parameters / 1e6:.2f} M parameters on {held} bytes, {settings.steps} steps")
    start = time.perf_counter()
    outcome.training_loss = train(model, text[:held], settings, say)
    outcome.training_seconds = time.perf_counter() - start
    model.eval().requires_grad_(False)

    models = {"dense": model}
    reports: dict[str, FilterReport] = {}
    for name, recipe in recipes(settings).items():
        say(f"compressing: {name}")
        models[name] = copy.deepcopy(model)
        reports[name] = compress(models[name], recipe, calib)
    speeds = reading_speed(models, test[:4])
    for name, version in models.items():
        report = reports.get(name)
        entries = [] if report is None else list(report.filters.values())
        outcome.versions.append(
            {
                "name": name,
                "loss": evaluate(version, test),
                "calibration_loss": None if report is None else report.loss_after,
                "bytes_per_second": speeds[name],
                "sizes": [e.size for e in entries] or [settings.length] * settings.blocks,
                "errors": [e.error for e in entries],
                "filter_bytes": sum(e.bytes_after for e in entries)
                or settings.length * settings.width * 4 * settings.blocks,
                "estimated_speed": [e.estimated_speed for e in entries],
                "measured_speed": [e.measured_speed for e in entries],
            }
        )

    for name, version in models.items():
        if name.startswith("frequency-sparse, error"):
            outcome.two_sided[name] = evaluate(two_sided(version), test)

    say("decoding")
    prompt = test[:1, :PROMPT]
    decode(model, prompt, min(settings.decode, 64))
    ids, seconds = decode(model, prompt, settings.decode)
    again, agree = recompute(model, prompt, ids, settings.recompute)
    outcome.decoding = {
        "bytes": settings.decode,
        "with_state_per_second": settings.decode / seconds,
        "recomputed_per_second": 1 / again,
        "agreement": agree,
    }
    outcome.sample = bytes(torch.cat([prompt, ids[:, :200]], 1)[0].tolist()).decode("utf-8", "replace")
    return outcome


def table(outcome: Outcome) -> list[str]:
    """Markdown lines."""
    lines = [
        "| model | taps or bins per filter | filters kB | loss | rise | conv. speed est. | measured | bytes/s read |"
    ]
    lines.append("|---|---|---|---|---|---|---|---|")
    dense = outcome.versions[0]
    for v in outcome.versions:
        sizes = " ".join(map(str, v["sizes"]))
        ratios = [" ".join(f"{value:.2f}" for value in v[key]) or "-" for key in ("estimated_speed", "measured_speed")]
        lines.append(
            f"| {v['name']} | {sizes} | {v['filter_bytes'] / 1e3:.0f} | {v['loss']:.4f} | "
            f"{v['loss'] - dense['loss']:+.4f} | {ratios[0]} | {ratios[1]} | {v['bytes_per_second']:.0f} |"
        )
    d = outcome.decoding
    leaks = "; ".join(f"{name}: {loss:.4f}" for name, loss in outcome.two_sided.items())
    lines += [
        "",
        f"Loss with the negative lags left in, which let the model see the future: {leaks}.",
        f"{outcome.parameters / 1e6:.2f} M parameters, trained in {outcome.training_seconds:.0f} s to "
        f"{outcome.training_loss:.3f} nats per byte on its own text; {outcome.threads} threads, {outcome.tier}.",
        f"Decoding {d['bytes']} bytes: {d['with_state_per_second']:.0f} bytes/s with state, "
        f"{d['recomputed_per_second']:.0f} reading everything again; {d['agreement']:.0%} of the bytes agree.",
    ]
    return lines


def main(
    steps: Annotated[int, typer.Option(help="Training steps.")] = Settings.steps,
    threads: Annotated[int, typer.Option(help="Threads; 0: PyTorch's default.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Write all figures here, as JSON.")] = None,
) -> None:
    """Train a small long-convolution language model, compress its filters, and decode with it (about three minutes)."""
    if steps < 1:
        raise typer.BadParameter(f"--steps: expected at least 1, got {steps}")
    if threads:
        torch.set_num_threads(threads)
    outcome = run(Settings(steps=steps), lambda text: print(text, flush=True))
    print("\n".join(["", *table(outcome), "", "Sample: " + repr(outcome.sample)]))
    if out is not None:
        out.write_text(json.dumps(asdict(outcome), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
