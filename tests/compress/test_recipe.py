"""Recipes as data: JSON and back, overrides, and one clear error for each mistake."""

from __future__ import annotations

import dataclasses
import json

import pytest

from effk.compress import recipe_from_json, recipe_types
from effk.compress.recipe import matches
from small_models import Nearest


def test_json_round_trip() -> None:
    recipe = Nearest(bits=3, compute="int8", ignore=("lm_head", "*.v_proj"), per_layer={"*.o_proj": {"bits": 4}})
    record = json.loads(json.dumps(recipe.to_json()))
    assert record["name"] == "test-nearest" and record["version"] == 1
    assert recipe_from_json(record) == recipe == Nearest.from_json(record)


def test_every_method_has_legal_defaults_that_round_trip() -> None:
    for name, recipe_type in recipe_types().items():
        assert recipe_type.name == name
        recipe = recipe_type()
        assert recipe_from_json(json.loads(json.dumps(recipe.to_json()))) == recipe
        with pytest.raises(dataclasses.FrozenInstanceError):
            recipe.compute = "int8"


def test_overrides_apply_in_order_and_only_where_they_match() -> None:
    recipe = Nearest(bits=3, per_layer={"*.0.*": {"bits": 8}, "*.q_proj": {"bits": 2, "group_size": 64}})
    assert recipe.for_layer("model.layers.1.mlp.up_proj").bits == 3
    assert recipe.for_layer("model.layers.0.mlp.up_proj").bits == 8
    own = recipe.for_layer("model.layers.0.self_attn.q_proj")
    assert (own.bits, own.group_size) == (2, 64)
    assert recipe.for_layer("lm_head") is None, "ignored by default"
    assert Nearest(ignore=()).for_layer("lm_head") is not None
    assert recipe.unmatched(["model.layers.0.mlp.up_proj"]) == ["*.q_proj"]
    assert matches("a.b.c", ("x", "a.*")) and not matches("a.b", ("b",))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": 5}, "bits: expected one of"),
        ({"bits": 4.0}, "bits: expected one of"),
        ({"group_size": 48}, "group_size: expected one of"),
        ({"compute": "auto"}, "compute: expected one of"),
        ({"embedding_bits": 4}, "embedding_bits: expected None or 8"),
        ({"per_layer": {"*": {"bits": 7}}}, "bits: expected one of"),
        ({"per_layer": {"*": {"bit": 3}}}, r"per_layer\['\*'\]: expected fields among .* got \['bit'\]"),
        ({"per_layer": {"*": {"ignore": ()}}}, r"got \['ignore'\]"),
    ],
)
def test_illegal_fields_are_named(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Nearest(**fields)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "magic"}, "name: expected one of"),
        ({"version": 2}, "version: expected 1, got 2"),
        ({"colour": "red"}, "expected its own fields only"),
    ],
)
def test_foreign_records_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recipe_from_json(Nearest().to_json() | change)
