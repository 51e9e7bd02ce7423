"""Plans: what will become of every layer, as JSON that a person can read, compare, edit and apply.

``effk.compress(model, recipe, calib)`` makes a plan and applies it; given ``plan=`` it applies that one instead. An
edit changes ``bits``, ``group_size``, ``outliers`` or ``options`` of a layer, or moves a layer to ``skipped``; sizes
are computed again when the plan is applied.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..formats import bitmask, quik
from ..formats.wq import BITS, CODEBOOKS, normalize_group_size, weight_bytes
from .layers import Layer

VERSION = 1


@dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """One layer's fate.

    Attributes:
        bits: 2, 3, 4 or 8 bits per code.
        group_size: 32, 64, 128, 256, or 0 for one group per row.
        format: "sym" (zero point 2**(bits-1)), "asym" (stored zero points), a fixed codebook ("nf2", "nf3", "nf4",
            "fp4"), "rows" (one learned table per row), "quik" (rounded activations and outlier columns; ``options``
            say how), or "bitmask" (sparse values of 8, 16 or 32 bits; ``options`` say how many).
        outliers: fraction of the weights kept as sparse fp16, in [0, 0.1].
        compute: "float" or "int8".
        scale_bytes: 2 (fp16) or 4 (fp32).
        bytes_before, bytes_after: stored size; ``bytes_after`` follows from the other fields.
        score: the method's estimate of the harm done, or None. Comparable within one plan only.
        options: the method's own per-layer settings (JSON values), such as a range mode.
    """

    bits: int
    group_size: int
    format: str = "sym"
    outliers: float = 0.0
    compute: str = "float"
    scale_bytes: int = 2
    bytes_before: int = 0
    bytes_after: int = 0
    score: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def sized(self, layer: Layer) -> LayerPlan:
        """This entry with both byte counts computed for ``layer``."""
        if self.format == "bitmask":
            return dataclasses.replace(self, bytes_before=layer.nbytes, bytes_after=self._bitmask_bytes(layer))
        if self.format == "quik":
            return dataclasses.replace(self, bytes_before=layer.nbytes, bytes_after=self._quik_bytes(layer))
        codebook = None if self.format in ("sym", "asym") else "row" if self.format == "rows" else "shared"
        after = weight_bytes(
            layer.n,
            layer.k,
            self.bits,
            self.group_size,
            zeros=self.format == "asym",
            scale_bytes=self.scale_bytes,
            codebook=codebook,
            outliers=outlier_count(layer.n, layer.k, self.outliers),
        )
        return dataclasses.replace(self, bytes_before=layer.nbytes, bytes_after=after)

    def check(self, name: str) -> None:
        """Raise ``ValueError`` naming the layer and field of the first illegal value."""

        def expect(field_name: str, ok: bool, expected: str) -> None:
            if not ok:
                raise ValueError(f"plan: {name}: {field_name}: expected {expected}, got {getattr(self, field_name)!r}")

        formats = ("sym", "asym", "rows", "quik", "bitmask", *CODEBOOKS)
        bits = tuple(bitmask.DTYPES) if self.format == "bitmask" else BITS
        expect("bits", type(self.bits) is int and self.bits in bits, f"one of {bits}")
        try:
            expect("group_size", normalize_group_size(self.group_size) == self.group_size, "0 for one group per row")
        except ValueError as error:
            raise ValueError(f"plan: {name}: {error}") from None
        expect("format", self.format in formats, f"one of {formats}")
        if self.format in CODEBOOKS:
            expect("bits", CODEBOOKS[self.format].numel() == 1 << self.bits, f"the bits of {self.format}")
        expect(
            "outliers", isinstance(self.outliers, (int, float)) and 0 <= self.outliers <= 0.1, "a fraction in [0, 0.1]"
        )
        expect("compute", self.compute in ("float", "int8"), "'float' or 'int8'")
        if self.format == "rows":
            expect("compute", self.compute == "float", "'float', since a table per row has no int8 form")
        expect("scale_bytes", self.scale_bytes in (2, 4), "2 or 4")
        if self.format == "quik":
            for field_name, legal in (
                ("bits", quik.BITS), ("group_size", (0,)), ("outliers", (0,)), ("compute", ("float",)), ("scale_bytes", (4,)),
            ):  # fmt: skip
                expect(field_name, getattr(self, field_name) in legal, f"{' or '.join(map(str, legal))} for 'quik'")
        if self.format == "bitmask":
            expect(
                "group_size", self.group_size % 64 == 0 and (self.bits == 8 or not self.group_size), "0 or 64, 128, 256"
            )
            expect("outliers", self.outliers == 0, "0 for 'bitmask'")
            expect("compute", self.compute == "float" or self.bits == 8, "'float' unless bits are 8")
            share = self.options.get("sparsity")
            expect("options", isinstance(share, float) and 0 < share < 1, "a sparsity between 0 and 1")
        expect("score", self.score is None or math.isfinite(self.score), "a finite number or null")
        expect("options", isinstance(self.options, Mapping), "an object")

    def _bitmask_bytes(self, layer: Layer) -> int:
        stored = layer.n * layer.k - int(layer.n * layer.k * self.options["sparsity"])
        return bitmask.weight_bytes(layer.n, layer.k, self.bits, stored, self.group_size)

    def _quik_bytes(self, layer: Layer) -> int:
        columns = self.options.get("outlier_columns")
        if type(columns) is not int:
            raise ValueError(f"plan: {layer.name}: options: expected a number of outlier_columns, got {columns!r}")
        pattern = self.options.get("pattern")
        try:
            quik.check_columns(layer.k, columns, self.bits)
            quik.check_pattern(pattern, layer.k - columns)
        except ValueError as error:
            raise ValueError(f"plan: {layer.name}: {error}") from None
        return quik.weight_bytes(layer.n, layer.k, self.bits, columns, pattern)


def outlier_count(n: int, k: int, fraction: float) -> int:
    """Entries in the sparse part: ``floor(fraction * n * k)`` (the epsilon undoes binary rounding of the fraction)."""
    return int(fraction * n * k + 1e-9)


@dataclass(frozen=True)
class Plan:
    """The fate of every layer of a model.

    Attributes:
        recipe: the recipe's JSON record (name, version, fields).
        layers: module name -> :class:`LayerPlan`, in model order.
        skipped: module name -> why the layer stays as it is.
        notes: the method's model-wide results (JSON values), such as the budget reached or scaling exponents.
    """

    recipe: Mapping[str, Any]
    layers: Mapping[str, LayerPlan]
    skipped: Mapping[str, str] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def bytes_before(self) -> int:
        """Stored bytes of the planned layers before."""
        return sum(entry.bytes_before for entry in self.layers.values())

    @property
    def bytes_after(self) -> int:
        """Stored bytes of the planned layers after."""
        return sum(entry.bytes_after for entry in self.layers.values())

    def nominal_bits(self, layers: Iterable[Layer]) -> float:
        """Bits per weight counting codes only, the way papers do; :class:`Report` prints it beside the true figure."""
        sizes = {layer.name: layer.n * layer.k for layer in layers if layer.name in self.layers}
        return sum(self.layers[name].bits * size for name, size in sizes.items()) / max(1, sum(sizes.values()))

    def edit(self, layer: str, **changes: Any) -> Plan:
        """A copy with fields of one layer changed.

        Raises:
            ValueError: the plan has no such layer, or a value is not legal.
        """
        if layer not in self.layers:
            raise ValueError(f"plan: expected one of its {len(self.layers)} layers, got {layer!r}")
        if unknown := sorted(set(changes) - {f.name for f in dataclasses.fields(LayerPlan)}):
            raise ValueError(f"plan: {layer}: expected fields of LayerPlan, got {unknown}")
        entry = dataclasses.replace(self.layers[layer], **changes)
        entry.check(layer)
        return dataclasses.replace(self, layers={**self.layers, layer: entry})

    def bind(self, layers: Iterable[Layer]) -> Plan:
        """Check this plan against a model's layers and compute the sizes anew.

        Raises:
            ValueError: a layer that the model lacks, one both planned and skipped, or an illegal value.
        """
        by_name = {layer.name: layer for layer in layers}
        for name in (*self.layers, *self.skipped):
            if name in self.layers and name in self.skipped:
                raise ValueError(f"plan: {name}: expected either a planned or a skipped layer, got both")
        for name, entry in self.layers.items():
            if name not in by_name:
                raise ValueError(f"plan: expected layers of the model, got {name!r}; it has e.g. {list(by_name)[:3]}")
            entry.check(name)
        sized = {name: entry.sized(by_name[name]) for name, entry in self.layers.items()}
        unnamed = {name: "not in the plan" for name in by_name if name not in self.layers and name not in self.skipped}
        return dataclasses.replace(self, layers=sized, skipped={**self.skipped, **unnamed})

    def diff(self, other: Plan) -> dict[str, dict[str, tuple[Any, Any]]]:
        """Layer -> field -> (here, there) for everything that differs; None stands for an absent layer's fields."""
        result: dict[str, dict[str, tuple[Any, Any]]] = {}
        for name in dict.fromkeys((*self.layers, *other.layers)):
            here = dataclasses.asdict(self.layers[name]) if name in self.layers else {}
            there = dataclasses.asdict(other.layers[name]) if name in other.layers else {}
            if changed := {f: (here.get(f), there.get(f)) for f in {**here, **there} if here.get(f) != there.get(f)}:
                result[name] = changed
        return result

    def to_json(self) -> str:
        """JSON text with one line per layer, so that line-based tools show a useful difference."""
        sections = {
            "effk_plan": VERSION,
            "recipe": dict(self.recipe),
            "layers": {name: dataclasses.asdict(entry) for name, entry in self.layers.items()},
            "skipped": dict(self.skipped),
            "notes": dict(self.notes),
        }
        return "{\n" + ",\n".join(f"{json.dumps(key)}: {_lines(value)}" for key, value in sections.items()) + "\n}\n"

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Inverse of :meth:`to_json`.

        Raises:
            ValueError: not JSON, another version, or missing or unknown fields.
        """
        try:
            record = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"plan: expected JSON, got an error at line {error.lineno}: {error.msg}") from None
        fields = {"effk_plan", "recipe", "layers", "skipped", "notes"}
        if not isinstance(record, dict) or set(record) != fields:
            got = sorted(record) if isinstance(record, dict) else type(record).__name__
            raise ValueError(f"plan: expected an object with {sorted(fields)}, got {got}")
        if record["effk_plan"] != VERSION:
            raise ValueError(f"plan: effk_plan: expected version {VERSION}, got {record['effk_plan']!r}")
        for key in sorted(fields - {"effk_plan"}):
            if not isinstance(record[key], dict):
                raise ValueError(f"plan: {key}: expected an object, got {type(record[key]).__name__}")
        known = {f.name for f in dataclasses.fields(LayerPlan)}
        layers = {}
        for name, entry in record["layers"].items():
            if not isinstance(entry, dict) or not {"bits", "group_size"} <= set(entry) <= known:
                got = sorted(entry) if isinstance(entry, dict) else type(entry).__name__
                raise ValueError(f"plan: {name}: expected bits, group_size and fields among {sorted(known)}, got {got}")
            layers[name] = LayerPlan(**entry)
            layers[name].check(name)
        return cls(record["recipe"], layers, record["skipped"], record["notes"])

    def save(self, path: str | Path) -> None:
        """Write :meth:`to_json` to ``path``."""
        Path(path).write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan that :meth:`save` wrote or a person edited; errors as :meth:`from_json`."""
        return cls.from_json(Path(path).read_text(encoding="utf-8"))


def _lines(value: Any) -> str:
    if not isinstance(value, dict) or not value:
        return json.dumps(value)
    return "{\n" + ",\n".join(f"  {json.dumps(key)}: {json.dumps(entry)}" for key, entry in value.items()) + "\n}"
