"""What a compression did: sizes, bits, errors, reasons, times."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .plan import Plan


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """One compressed layer.

    Attributes:
        bits: nominal bits per weight.
        true_bits: bits per weight with scales, zeros, tables and outliers.
        group_size: columns per group, 0 for the whole row.
        outliers: sparse fp16 entries.
        outlier_columns: input columns stored in 16 bits.
        bits_a: of the activations that meet the codes; 16: as they come.
        compute: "float" or "int8".
        weights: number of weights.
        bytes_before, bytes_after: stored sizes.
        error: ``|W - W'| / |W|`` (Frobenius).
        output_error: the same of the layer's outputs on the calibration inputs, where their Hessian was collected.
        seconds: time to compress it.
        expert_errors: ``error`` of each expert, where the layer is a stack of them.
    """

    bits: int
    true_bits: float
    group_size: int
    outliers: int
    compute: str
    weights: int
    bytes_before: int
    bytes_after: int
    error: float
    output_error: float | None
    seconds: float
    outlier_columns: int = 0
    bits_a: int = 16
    expert_errors: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Report:
    """The outcome of :func:`effk.compress`.

    Attributes:
        plan: what was applied, with the recipe.
        layers: module name -> :class:`LayerReport`.
        embedding: the same of the embedding and of a head that is not tied to it, where the recipe compresses them;
            not part of the mean bits below, which papers count over the blocks.
        skipped: module name -> reason, for every linear layer left as it was.
        model_bytes_before, model_bytes_after: all parameters and stored buffers of the model, shared ones once.
        fused: input group -> names of the layers that now share one kernel call.
        seconds: stage -> wall time ("prepare", "plan", "apply").
    """

    plan: Plan
    layers: Mapping[str, LayerReport]
    embedding: Mapping[str, LayerReport]
    skipped: Mapping[str, str]
    model_bytes_before: int
    model_bytes_after: int
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def nominal_bits(self) -> float:
        """Mean bits per weight of the compressed layers, codes only: the figure that papers quote."""
        return self._mean(lambda layer: layer.bits)

    @property
    def true_bits(self) -> float:
        """Mean bits per weight of the compressed layers, everything stored for them included."""
        return self._mean(lambda layer: layer.true_bits)

    def to_json(self) -> dict[str, Any]:
        """A JSON object of everything but the plan, which has its own file format."""
        return {
            "layers": {name: dataclasses.asdict(layer) for name, layer in self.layers.items()},
            "embedding": {name: dataclasses.asdict(layer) for name, layer in self.embedding.items()},
            "skipped": dict(self.skipped),
            "model_bytes_before": self.model_bytes_before,
            "model_bytes_after": self.model_bytes_after,
            "nominal_bits": self.nominal_bits,
            "true_bits": self.true_bits,
            "fused": {group: list(names) for group, names in self.fused.items()},
            "seconds": dict(self.seconds),
        }

    def __str__(self) -> str:
        """A few lines for people; ``to_json`` has every layer."""
        lines = [
            f"{len(self.layers)} layers at {self.nominal_bits:.3f} bits ({self.true_bits:.3f} true), "
            f"model {self.model_bytes_before / 1e6:.1f} -> {self.model_bytes_after / 1e6:.1f} MB, "
            f"{sum(self.seconds.values()):.1f} s"
        ]
        worst = sorted(self.layers.items(), key=lambda item: -item[1].error)[:3]
        lines += [f"  error {layer.error:.4f}  {name} ({layer.bits} bits)" for name, layer in worst]
        kinds = Counter((e.bits, e.bits_a, e.outlier_columns) for e in self.layers.values())
        if any(bits_a < 16 or columns for _, bits_a, columns in kinds):
            lines += [f"  W{b}A{a}, {columns} outlier columns: {n} layers" for (b, a, columns), n in kinds.items()]
        if (share := self.plan.notes.get("expert_share")) is not None:
            smaller = 1 - self.model_bytes_after / self.model_bytes_before
            lines.append(f"  experts hold {share:.1%} of the parameters; the model is {smaller:.1%} smaller")
        reasons: dict[str, list[str]] = {}
        for name, reason in self.skipped.items():
            reasons.setdefault(reason, []).append(name)
        lines += [f"  kept {', '.join(names[:3])}{' ...' * (len(names) > 3)}: {why}" for why, names in reasons.items()]
        return "\n".join(lines)

    def save(self, path: str) -> None:
        """Write :meth:`to_json` to ``path``."""
        with open(path, "w", encoding="utf-8") as file:
            json.dump(self.to_json(), file, indent=1)

    def _mean(self, bits: Any) -> float:
        weights = sum(layer.weights for layer in self.layers.values())
        return sum(bits(layer) * layer.weights for layer in self.layers.values()) / max(1, weights)
