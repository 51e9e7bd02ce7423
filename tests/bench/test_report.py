"""Rows, their JSON schema, and the choice of the best competitor."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from bench.report import SCHEMA, Row, geomean, read_jsonl, set_vs_best, write_jsonl

# Written out, not imported: other tools read these files by these names.
KEYS = [
    "op",
    "case",
    "shape",
    "dtype",
    "isa",
    "threads",
    "backend",
    "version",
    "us",
    "us_iqr",
    "gbps",
    "gflops",
    "roofline",
    "vs_best",
    "match",
]


def row(
    backend: str = "effk",
    us: float = 10.0,
    match: float | None = 0.5,
    case: str = "int8, cold",
    bits: int = 4,
    m: int = 1,
    group: int = 128,
    threads: int = 1,
) -> Row:
    """A row of a 64x64 weight."""
    shape = {"M": m, "N": 64, "K": 64, "bits": bits, "group": group, "outliers": 0.0}
    return Row("wq_linear", case, shape, "float32", "avx2", threads, backend, "1", us, 0.1, 1.0, 2.0, 0.5, None, match)


def test_json_keys_and_order(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.json", [row()])
    (line,) = (tmp_path / "rows.json").read_text().splitlines()
    assert list(json.loads(line)) == KEYS == list(SCHEMA)


def test_json_round_trip_and_figures_that_are_not_finite(tmp_path: Path) -> None:
    bad = row(us=12.345678)
    bad.gbps, bad.match = math.nan, math.inf
    write_jsonl(tmp_path / "rows.json", [bad])
    (back,) = read_jsonl(tmp_path / "rows.json")
    assert (back.us, back.gbps, back.match) == (12.346, None, None)
    assert not back.valid


def test_a_file_of_something_else_is_refused_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    write_jsonl(file, [row()])
    file.write_text(file.read_text() + '{"op": "wq_linear"}\n')
    with pytest.raises(ValueError, match=r"rows\.json:2: expected the keys .*'match'.* got \['op'\]"):
        read_jsonl(file)


def test_vs_best_is_the_fastest_right_cold_competitor_of_the_same_shape_bits_and_threads() -> None:
    ours = row()
    rows = [
        ours,
        row("slow", 30.0, group=32),
        row("best", 20.0, group=32),
        row("wrong", 1.0, match=1.5),
        row("unchecked", 1.0, match=None),
        row("warm", 1.0, case="int8, warm"),
        row("other bits", 1.0, bits=8),
        row("other batch", 1.0, m=2),
        row("other threads", 1.0, threads=2),
        row("effk other", 1.0, case="float, cold"),
    ]
    set_vs_best(rows)
    assert ours.vs_best == 2.0
    assert all(r.vs_best is None for r in rows if not r.ours)


def test_vs_best_is_none_without_competitor() -> None:
    ours = row()
    set_vs_best([ours, row("other", bits=8)])
    assert ours.vs_best is None


def test_geomean() -> None:
    assert geomean([1.0, 4.0]) == pytest.approx(2.0)
    assert math.isnan(geomean([]))
