"""What the demo found: as a table, as Markdown, as JSON, always with the conditions and caveats."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table

from ..cli.info import cpu_name
from ..cli.speed import DEFINITION as SPEED
from ..compress.evaluate import DEFINITION as PERPLEXITY

if TYPE_CHECKING:
    from rich.console import RenderableType

    from .steps import Settings

SMOLLM2_CAVEAT = (
    "the file of smollm2 holds linear layers rounded to 4 bits (Q4_1, blocks of 32) and an embedding in 8: every "
    "version, bf16 too, starts from those numbers expanded, so every compression here is the second one"
)


@dataclass(frozen=True, kw_only=True)
class Version:
    """One version of the model.

    Attributes:
        megabytes: weights file on disk, or for the uncompressed model its parameters, 10^6 bytes.
        nominal_bits, true_bits: bits per weight of the linear layers, codes only, and with everything stored for them.
        perplexity: on the evaluation text.
        tokens_per_second: decoded, batch 1.
        compress_seconds: to compress, save and load.
        sample: text that it generates.
    """

    megabytes: float
    nominal_bits: float
    true_bits: float
    perplexity: float = math.nan
    tokens_per_second: float = math.nan
    compress_seconds: float | None = None
    sample: str = ""


@dataclass(frozen=True)
class Outcome:
    """The versions by name, the uncompressed one first, and the conditions they were measured under."""

    versions: Mapping[str, Version]
    settings: Settings
    isa: str
    threads: int
    seconds: float
    caveats: tuple[str, ...] = ()

    @property
    def record(self) -> dict[str, Any]:
        """A JSON object of everything."""
        return {
            "versions": {name: dataclasses.asdict(version) for name, version in self.versions.items()},
            "settings": dataclasses.asdict(self.settings),
            "cpu": cpu_name(),
            "isa": self.isa,
            "threads": self.threads,
            "torch": torch.__version__,
            "seconds": self.seconds,
            "notes": self.notes(),
        }

    def notes(self) -> list[str]:
        """Definitions, conditions and caveats: what a figure of the table is worth."""
        s = self.settings
        return [
            PERPLEXITY.format(windows=s.windows, context=s.context),
            SPEED.format(new=s.new_tokens, rounds=s.rounds),
            f"{cpu_name()}, kernels of tier {self.isa}, {self.threads} threads, torch {torch.__version__}",
            f"compressed versions: linear layers in groups of {s.group_size} with products in the {s.compute} form, "
            "embedding and head in 8 bits, the rest bf16; bits are of the linear layers, true bits count scales, zero "
            "points and outliers; MB is everything on disk",
            "RTN rounds to nearest between each group's minimum and maximum; LLM-MQ spends its average of bits where "
            "layers are sensitive (an average of 4, the most on offer, is 4 everywhere) and keeps outliers",
            "log rise: of the mean log-loss per token over that of the first version, in hundredths of a nat",
            *self.caveats,
        ]

    def rows(self) -> list[tuple[str, ...]]:
        """The cells of the table."""
        base = next(iter(self.versions.values()))
        return [
            (
                name,
                f"{v.megabytes:.1f}",
                f"{v.nominal_bits:.2f}",
                f"{v.true_bits:.2f}",
                f"{v.perplexity:.2f}",
                f"{100 * (math.log(v.perplexity) - math.log(base.perplexity)):+.1f}",
                f"{v.tokens_per_second:.1f}",
                f"{v.tokens_per_second / base.tokens_per_second:.2f}x",
            )
            for name, v in self.versions.items()
        ]

    HEADER = ("version", "MB", "bits", "true bits", "perplexity", "log rise", "tokens/s", "speed")

    def text(self) -> list[RenderableType]:
        """For a terminal: the table, the samples, the notes."""
        table = Table(box=SIMPLE_HEAD)
        for index, heading in enumerate(self.HEADER):
            table.add_column(heading, no_wrap=True, justify="right" if index else "left")
        for row in self.rows():
            table.add_row(*row)
        samples = [f"{name}: {version.sample}" for name, version in self.versions.items()]
        return [table, f"\nprompt: {self.settings.prompt}\n", *samples, "", *(f"- {note}." for note in self.notes())]

    def markdown(self) -> str:
        """The same as a Markdown page with the plot."""
        lines = ["| " + " | ".join(self.HEADER) + " |", "|---" + "|---:" * (len(self.HEADER) - 1) + "|"]
        lines += ["| " + " | ".join(row) + " |" for row in self.rows()]
        lines += ["", "![bits and sensitivity per layer](layers.png)", "", f"Prompt: {self.settings.prompt}", ""]
        lines += [f"- {name}: {version.sample}" for name, version in self.versions.items()]
        lines += ["", *(f"- {note}." for note in self.notes())]
        return "\n".join(lines) + "\n"

    def save(self, folder: Path) -> None:
        """Write ``demo.json`` and ``table.md``."""
        (folder / "demo.json").write_text(json.dumps(self.record, indent=1) + "\n", encoding="utf-8")
        (folder / "table.md").write_text(self.markdown(), encoding="utf-8")
