"""Recipes: what to do to a model, as data.

A recipe is a frozen, versioned dataclass; each method subclasses :class:`Recipe` in ``passes/<method>.py`` and
registers a handler for it. Recipes go to JSON and back, are stored in every compressed model, and never hold tensors.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from ..formats.wq import BITS, normalize_group_size

if TYPE_CHECKING:
    from typing_extensions import Self

COMPUTE_FORMS = ("float", "int8")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Fields common to every method.

    Attributes:
        compute: "float" multiplies exact weights by floating-point activations; "int8" quantises activations in groups
            of at most 128, which is faster and changes outputs by about 1 %. It is stored with the model.
        ignore: glob patterns of module names that stay as they are.
        per_layer: glob pattern -> {field: value}, overrides of this recipe's own fields for the matching layers. Later
            patterns win.
        embedding_bits: 8 stores the token embedding and the head in 8 bits, once where they are tied, whatever
            ``ignore`` says; None leaves both alone.
        fuse: run q, k, v and gate, up of a block as one kernel call each.

    Subclasses set ``name`` (the method's name on the command line and in files) and ``version`` (raised when a field
    changes its meaning), and add their own fields with defaults.
    """

    name: ClassVar[str]
    version: ClassVar[int]
    shared_fields: ClassVar[frozenset[str]] = frozenset({"ignore", "per_layer", "embedding_bits", "fuse"})

    compute: str = "float"
    ignore: tuple[str, ...] = ("lm_head",)
    per_layer: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    embedding_bits: int | None = None
    fuse: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "ignore", tuple(self.ignore))
        object.__setattr__(self, "per_layer", {p: dict(o) for p, o in self.per_layer.items()})
        self.check()
        allowed = {f.name for f in dataclasses.fields(self)} - self.shared_fields
        for pattern, overrides in self.per_layer.items():
            if unknown := sorted(set(overrides) - allowed):
                raise ValueError(
                    f"recipe {self.name}: per_layer[{pattern!r}]: "
                    f"expected fields among {sorted(allowed)}, got {unknown}"
                )
            dataclasses.replace(self, per_layer={}, **overrides)  # the overridden recipe must be legal as well

    def check(self) -> None:
        """Raise ``ValueError`` for an illegal field; subclasses extend it."""
        self._expect("compute", self.compute in COMPUTE_FORMS, f"one of {COMPUTE_FORMS}")
        self._expect("embedding_bits", self.embedding_bits in (None, 8), "None or 8")
        self._expect("ignore", all(isinstance(p, str) for p in self.ignore), "glob patterns")

    def _expect(self, name: str, ok: bool, expected: str) -> None:
        if not ok:
            raise ValueError(f"recipe {self.name}: {name}: expected {expected}, got {getattr(self, name)!r}")

    def for_layer(self, layer: str) -> Self | None:
        """This recipe with the overrides for module ``layer`` applied, or None when the layer is ignored."""
        if matches(layer, self.ignore):
            return None
        overrides: dict[str, Any] = {}
        for pattern, fields in self.per_layer.items():
            if matches(layer, (pattern,)):
                overrides |= fields
        return dataclasses.replace(self, per_layer={}, **overrides)

    def unmatched(self, layers: list[str]) -> list[str]:
        """Patterns of ``per_layer`` that match none of ``layers``: most likely a mistake."""
        return [p for p in self.per_layer if not any(matches(layer, (p,)) for layer in layers)]

    def to_json(self) -> dict[str, Any]:
        """A JSON object with ``name``, ``version`` and every field."""
        body = {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}
        return {"name": self.name, "version": self.version, **body}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Self:
        """Inverse of :meth:`to_json` for this class; :func:`effk.compress.registry.recipe_from_json` picks the class.

        Raises:
            ValueError: another method's record, a newer version, or unknown fields.
        """
        body = dict(record)
        name, version = body.pop("name", None), body.pop("version", None)
        if name != cls.name:
            raise ValueError(f"recipe {cls.name}: name: expected {cls.name!r}, got {name!r}")
        if version != cls.version:
            raise ValueError(f"recipe {cls.name}: version: expected {cls.version}, got {version!r}")
        if unknown := sorted(set(body) - {f.name for f in dataclasses.fields(cls)}):
            raise ValueError(f"recipe {cls.name}: expected its own fields only, got {unknown}")
        return cls(**body)


def matches(layer: str, patterns: tuple[str, ...]) -> bool:
    """Whether the dotted module name ``layer`` matches one of the glob ``patterns`` (``*`` also crosses dots)."""
    return any(fnmatch.fnmatchcase(layer, p) for p in patterns)


def expect_bits(recipe: Recipe, bits: tuple[int, ...] = BITS) -> None:
    """Check a recipe's own ``bits`` field; for use in a subclass's ``check``."""
    recipe._expect("bits", type(recipe.bits) is int and recipe.bits in bits, f"one of {bits}")


def expect_group_size(recipe: Recipe) -> None:
    """Check a recipe's own ``group_size`` field (-1 and 0: one group per row); for use in a subclass's ``check``."""
    try:
        normalize_group_size(recipe.group_size)
    except ValueError as error:
        raise ValueError(f"recipe {recipe.name}: {error}") from None


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(v) for v in value]
    return value
