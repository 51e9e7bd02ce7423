"""Methods that replace whole feed-forward networks: their recipes, handlers, plans and reports.

Methods differ in what they put in a network's place (:class:`NetworkHandler`); the rest is in :mod:`.convert`.
"""

from __future__ import annotations

import dataclasses
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from .feedforward import FeedForward
from .recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class NetworkRecipe(Recipe):
    """Fields common to methods that replace feed-forward networks; patterns match names of networks.

    Attributes:
        model_steps: of recovery of the whole model by distillation after all networks are converted: towards the
            original's next-token distribution, or its last hidden states where it is no decoder.
        model_rate: of Adam in these steps.
        seed: of everything random.

    ``embedding_bits`` stays None and ``fuse`` has no effect.
    """

    model_steps: int = 0
    model_rate: float = 3e-4
    seed: int = 0

    def check(self) -> None:
        super().check()
        self._expect("embedding_bits", self.embedding_bits is None, "None for a method of feed-forward networks")
        self._expect("model_steps", type(self.model_steps) is int and self.model_steps >= 0, "0 or more")
        self._expect("model_rate", is_positive(self.model_rate), "a positive number")
        self._expect("seed", type(self.seed) is int, "an integer")


def is_positive(value: Any) -> bool:
    """Whether a field is a positive finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf


@dataclass(frozen=True, kw_only=True)
class NetworkReportEntry:
    """One network.

    Attributes:
        layers: layer name -> error of its output on its own inputs, over the output's variation about its mean; empty
            without calibration, like the next two.
        error: the same of the network's output, before recovery.
        recovered_error: after the network's own recovery.
        parameters_before, parameters_after: biases included.
        bytes_before, bytes_after: of these.
        seconds: to convert it.
    """

    layers: Mapping[str, float] = field(default_factory=dict)
    error: float | None = None
    recovered_error: float | None = None
    parameters_before: int = 0
    parameters_after: int = 0
    bytes_before: int = 0
    bytes_after: int = 0
    seconds: float = 0.0


class NetworkHandler(ABC):
    """One method."""

    @abstractmethod
    def needs_calibration(self, recipe: NetworkRecipe) -> bool:
        """Whether ``calib`` must be given."""

    @abstractmethod
    def options(self, network: FeedForward, recipe: NetworkRecipe) -> dict[str, Any]:
        """The plan's entry for a network, JSON values, from the recipe that applies to it."""

    @abstractmethod
    def check(self, network: FeedForward, options: Mapping[str, Any]) -> None:
        """Raise ``ValueError`` unless ``options``, perhaps edited, are legal for ``network``."""

    @abstractmethod
    def build(
        self,
        network: FeedForward,
        options: Mapping[str, Any],
        recipe: NetworkRecipe,
        xs: list[Tensor],
        held: list[Tensor],
    ) -> tuple[list[nn.Module], NetworkReportEntry]:
        """Modules for ``network.layers``, and their errors.

        ``xs`` are the network's inputs ``[tokens, features]`` to fit to, ``held`` those to measure on; both are empty
        without calibration.
        """

    def finish(self, module: nn.Module, options: Mapping[str, Any], recipe: NetworkRecipe) -> nn.Module:
        """The module that stays, made from one of :meth:`build` after all training."""
        return module


@dataclass(frozen=True)
class NetworkPlan:
    """The fate of every network, as JSON that can be edited and applied.

    Attributes:
        recipe: the recipe's JSON record.
        networks: network name -> the method's options.
        skipped: network name -> reason.
    """

    recipe: Mapping[str, Any]
    networks: Mapping[str, Mapping[str, Any]]
    skipped: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        """As text, one line a network."""
        networks = ",\n".join(f"  {json.dumps(name)}: {json.dumps(dict(o))}" for name, o in self.networks.items())
        head = {"version": 1, "recipe": dict(self.recipe), "skipped": dict(self.skipped)}
        return json.dumps(head)[:-1] + f',\n "networks": {{\n{networks}\n }}}}\n'

    @classmethod
    def from_json(cls, text: str) -> NetworkPlan:
        """Inverse of :meth:`to_json`; ValueError for anything else."""
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"plan: expected JSON, got an error at line {error.lineno}: {error.msg}") from None
        expected = {"recipe", "networks", "skipped"}
        legal = isinstance(data, dict) and data.pop("version", None) == 1 and set(data) == expected
        if not legal or not all(isinstance(data[name], dict) for name in expected):
            raise ValueError(f"plan: expected a plan of feed-forward networks, version 1, got {str(data)[:80]}")
        return cls(**data)

    def table(self) -> list[tuple[str, ...]]:
        """Rows for people, the first with the titles."""
        names = sorted({key for options in self.networks.values() for key in options})
        rows = [("network", *names)]
        rows += [(name, *(str(o.get(key, "")) for key in names)) for name, o in self.networks.items()]
        return rows + [(name, *([""] * (len(names) - 1)), why) for name, why in self.skipped.items()]


@dataclass(frozen=True, kw_only=True)
class NetworkReport:
    """The outcome of :func:`effk.compress` with a recipe for feed-forward networks.

    Attributes:
        plan: what was applied.
        networks: network name -> :class:`NetworkReportEntry`.
        perplexity_before, perplexity_after: per token, on the held-out sequences; None for a model that is no decoder
            or without calibration. ``perplexity_converted`` is the one before the recovery of the whole model.
        output_error: of the last hidden states, ``|y - y'| / |y|``, there too; None without calibration.
        held_out: sequences that the figures were measured on; 0: too few were given, and they are those of calibration.
        skipped: network name -> reason.
        model_bytes_before, model_bytes_after: all parameters and stored buffers.
        seconds: in all.
    """

    plan: NetworkPlan
    networks: Mapping[str, NetworkReportEntry]
    perplexity_before: float | None
    perplexity_converted: float | None
    perplexity_after: float | None
    output_error: float | None
    held_out: int
    skipped: Mapping[str, str]
    model_bytes_before: int
    model_bytes_after: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """A JSON object of everything but the plan."""
        body = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "plan"}
        entries = {name: dataclasses.asdict(entry) for name, entry in self.networks.items()}
        return body | {"networks": entries, "skipped": dict(self.skipped)}

    def save(self, path: str) -> None:
        """Write :meth:`to_json` to ``path``."""
        with open(path, "w", encoding="utf-8") as file:
            json.dump(self.to_json(), file, indent=1)

    def __str__(self) -> str:
        """One line a network."""
        lines = [
            f"{len(self.networks)} networks, model {self.model_bytes_before / 1e6:.1f} -> "
            f"{self.model_bytes_after / 1e6:.1f} MB, {self.seconds:.1f} s"
        ]
        for name, e in self.networks.items():
            errors = ", ".join(f"{layer.rpartition('.')[2]} {error:.3f}" for layer, error in e.layers.items())
            told = "" if e.error is None else f", error {e.error:.3f}"
            told += "" if e.recovered_error is None else f", recovered {e.recovered_error:.3f}"
            size = f"{e.parameters_before / 1e6:.3f} -> {e.parameters_after / 1e6:.3f} M parameters"
            lines.append(f"  {name}: {size}{told}{f' ({errors})' if errors else ''}")
        if self.perplexity_before is not None:
            text = "held-out" if self.held_out else "calibration"
            lines.append(
                f"  perplexity on {text} text {self.perplexity_before:.2f} -> {self.perplexity_converted:.2f}, "
                f"after recovery of the whole model {self.perplexity_after:.2f}"
            )
        if self.output_error is not None:
            lines.append(f"  error of the last hidden states {self.output_error:.3f}")
        return "\n".join(lines + [f"  kept {name}: {why}" for name, why in self.skipped.items()])
