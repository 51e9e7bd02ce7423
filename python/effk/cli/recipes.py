"""Recipes from command-line options."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from ..compress import Recipe, recipe_types


def make_recipe(method: str, settings: Sequence[str] = (), **given: Any) -> Recipe:
    """The recipe of ``method`` with the options that were ``given`` (None: not given) and ``field=value`` settings.

    Values of settings are JSON; what is no JSON is a string. An option is refused where the method has no such field.

    Raises:
        ValueError: unknown method or field, or a value that the recipe refuses.
    """
    types = recipe_types()
    if method not in types:
        raise ValueError(f"--recipe: expected one of {', '.join(sorted(types))}, got {method!r}")
    recipe_type = types[method]
    fields = {field.name: field for field in dataclasses.fields(recipe_type)}
    values = {name: value for name, value in given.items() if value is not None}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals:
            raise ValueError(f"--set: expected field=value, got {setting!r}")
        values[name] = _parse(text)
    if unknown := sorted(set(values) - set(fields)):
        known = ", ".join(sorted(fields))
        raise ValueError(f"--recipe {method}: expected fields among {known}, got {', '.join(unknown)}")
    # --bits is a number for every method; where the field is a bit-width, 3.0 is 3 and 3.5 is for the recipe to refuse.
    bits = values.get("bits")
    if isinstance(bits, float) and bits.is_integer() and isinstance(fields["bits"].default, int):
        values["bits"] = int(bits)
    try:
        return recipe_type(**values)
    except (TypeError, AttributeError) as error:  # a value of another type than the field's
        raise ValueError(f"--recipe {method}: {error}") from None


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
