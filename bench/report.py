"""Rows, their JSON lines and the printed table, for every op."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

OURS = "effk"
WITH_KINDS = (
    "fftconv",
    "dense_linear",
    "dyad_linear",
    "quik_linear",
    "relu_ffn",
    "bitmask_linear",
    "attention",
)  # ops whose case starts with what is done
COLD, WARM = "cold", "warm"


@dataclass
class Row:
    """One measured case. The fields up to `match` are the JSON schema; the rest is for the printed table.

    us: median microseconds of one product; us_iqr: interquartile range. gbps: bytes of the weight over us. gflops:
    2 M N K over us. roofline: least possible time (bytes over measured bandwidth, or operations over measured peak)
    over us. vs_best: time of the fastest competitor of the same shape and bits over ours. match: largest error over its
    bound; at most 1 is right.
    """

    op: str
    case: str
    shape: dict[str, float]
    dtype: str
    isa: str
    threads: int
    backend: str
    version: str
    us: float | None
    us_iqr: float | None
    gbps: float | None
    gflops: float | None
    roofline: float | None
    vs_best: float | None
    match: float | None
    best_us: float | None = field(default=None, metadata={"json": False})
    warm_us: float | None = field(default=None, metadata={"json": False})
    disturbed: bool = field(default=False, metadata={"json": False})  # of a run beside which others used the CPU

    @property
    def ours(self) -> bool:
        """Whether it is a row of this project."""
        return self.backend.startswith(OURS)

    @property
    def kind(self) -> str:
        """What a row's call does, where ops have several: rows compete within a kind. The case says how as well."""
        return self.case.partition(",")[0] if self.op in WITH_KINDS else ""

    @property
    def valid(self) -> bool:
        """A row without a match, or with one above 1, is not a result."""
        return self.match is not None and self.match <= 1

    def to_json(self) -> dict:
        """The fields of the schema, in order; figures to five digits, what is not finite as null."""
        skip = {name for name, f in self.__dataclass_fields__.items() if f.metadata.get("json") is False}
        return {name: _rounded(value) for name, value in asdict(self).items() if name not in skip}


SCHEMA = (
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
)


def _rounded(value: object) -> object:
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    return value


def write_jsonl(path: Path, rows: Iterable[Row]) -> None:
    """One JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row.to_json()) + "\n" for row in rows))


def read_jsonl(path: Path) -> list[Row]:
    """Rows of a file written by `write_jsonl`. ValueError with the line for anything else."""
    rows = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        data = json.loads(line)
        if tuple(data) != SCHEMA:
            raise ValueError(f"{path}:{number}: expected the keys {list(SCHEMA)}, got {list(data)}")
        rows.append(Row(**data))
    return rows


def set_vs_best(rows: Sequence[Row]) -> None:
    """Fills vs_best of our cold rows from valid cold rows of competitors of the same op, threads, shape and kind."""
    best: dict[tuple, float] = {}
    for row in rows:
        if not row.ours and row.valid and row.us and not row.case.endswith(WARM):
            best[_class(row)] = min(row.us, best.get(_class(row), math.inf))
    for row in rows:
        if row.ours and row.us and not row.case.endswith(WARM) and _class(row) in best:
            row.vs_best = best[_class(row)] / row.us


def _class(row: Row) -> tuple:
    fixed = tuple((k, v) for k, v in sorted(row.shape.items()) if k not in ("group", "outliers"))
    return row.op, row.threads, row.kind, fixed


def best_competitor(rows: Sequence[Row], like: Row) -> Row | None:
    """The competitor behind vs_best of `like`."""
    field_ = [
        r for r in rows if not r.ours and r.valid and r.us and not r.case.endswith(WARM) and _class(r) == _class(like)
    ]
    return min(field_, key=lambda r: r.us, default=None)


def geomean(values: Sequence[float]) -> float:
    """Geometric mean; NaN for none."""
    return statistics.geometric_mean(values) if values else math.nan


def figure(value: float | None, digits: int = 3) -> str:
    """A number with that many significant digits, "-" for none."""
    if value is None or not math.isfinite(value):
        return "-"
    return f"{value:.{digits}g}" if abs(value) < 10**digits else f"{value:.0f}"


def time_of(row: Row | None) -> str:
    """Median microseconds of a right result, with an asterisk where the run was disturbed."""
    if row is None:
        return "-"
    return figure(row.us, 4) + "*" * row.disturbed if row.valid else "wrong result"


COLUMNS = (
    "shape",
    "backend",
    "case",
    "isa",
    "thr",
    "median us",
    "iqr",
    "min",
    "warm",
    "GB/s",
    "GFLOP/s",
    "% roof",
    "x best",
    "match",
)


def shape_name(row: Row) -> str:
    """Short name of a row's shape."""
    s = row.shape
    if row.op == "fftconv":
        return f"{s['B']}x{s['H']}x{s['L']}"
    if "bits_w" in s:
        return f"M={s['M']} {s['N']}x{s['K']} W{s['bits_w']}A{s['bits_a']}" + f" + {s['outliers']}" * (
            s["outliers"] > 0
        )
    if "density" in s:
        return f"M={s['M']} {s['d']}x{s['f']}{' gated' * s['gated']} {s['density']}"
    if "d_in" in s:
        f_in, f_out = layer_sides(row)
        return f"T={s['T']} {f_in}x{f_out}" + (f" n={s['n']}" if s["n"] > 1 else "")
    if "sparsity" in s:
        zeros = f", {s['sparsity']:.0%} zeros" if s["sparsity"] else ""
        return f"M={s['M']} {s['N']}x{s['K']} {s['bits']}b{zeros}"
    return f"M={s['M']} {s['N']}x{s['K']} {s['bits']}b" if "bits" in s else " ".join(f"{k}={v}" for k, v in s.items())


def layer_sides(row: Row) -> tuple[int, int]:
    """f_in, f_out of a row whose shape has the sides of a block and their number."""
    s = row.shape
    return s["n"] * s["d_in"], s["n"] * s["d_out"]


def cells(row: Row) -> list[str]:
    """The table's text for a row."""
    roof = None if row.roofline is None else 100 * row.roofline
    match = figure(row.match, 2) if row.valid else f"WRONG {figure(row.match, 2)}"
    return [
        shape_name(row),
        f"{row.backend} {row.version}".strip(),
        row.case,
        row.isa,
        str(row.threads),
        figure(row.us, 4),
        figure(row.us_iqr, 2),
        figure(row.best_us, 4),
        figure(row.warm_us, 4),
        figure(row.gbps),
        figure(row.gflops, 4),
        figure(roof),
        figure(row.vs_best),
        match,
    ]


def print_table(rows: Sequence[Row], console: Console, title: str) -> None:
    """The full table, one line a row; rows whose output is wrong are marked."""
    table = Table(title=title, title_justify="left")
    for name in COLUMNS:
        table.add_column(
            name,
            justify="left" if name in ("shape", "backend", "case", "isa") else "right",
            overflow="fold",
            no_wrap=name == "shape",
        )
    previous = None
    for row in rows:
        group = _block(row)
        if previous not in (None, group):
            table.add_section()
        previous = group
        table.add_row(*cells(row), style="bold" if row.ours else None if row.valid else "red")
    console.print(table)


def print_summary(rows: Sequence[Row], console: Console) -> None:
    """Per case of ours: geometric means over the shapes with the worst shape named."""
    table = Table(title="Geometric mean over shapes (worst)", title_justify="left")
    for name in ("case", "isa", "bits or n", "M or T", "% roof", "x best competitor"):
        table.add_column(name, justify="left" if name in ("case", "isa") else "right")
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        if row.ours and row.roofline and row.valid and not row.case.endswith(WARM):
            key = row.case, row.isa, width(row), row.shape.get("M", row.shape.get("T", 0))
            groups.setdefault(key, []).append(row)
    for key, members in sorted(groups.items(), key=lambda item: (item[0][0], item[0][1], -item[0][2], item[0][3])):
        cells = [str(part) if part else "-" for part in key]
        table.add_row(*cells, _mean_and_worst(members, "roofline", 100), _mean_and_worst(members, "vs_best", 1))
    console.print(table)


def width(row: Row) -> int:
    """Bits of a weight, or blocks of a layer."""
    return row.shape.get("bits", row.shape.get("n", 0))


def _mean_and_worst(rows: Sequence[Row], name: str, factor: float) -> str:
    have = [(getattr(r, name) * factor, _place(r)) for r in rows if getattr(r, name)]
    if not have:
        return "-"
    worst, where = min(have)
    return f"{figure(geomean([v for v, _ in have]))} ({figure(worst)} at {where})"


def _place(row: Row) -> str:
    return f"{row.shape['N']}x{row.shape['K']}" if "N" in row.shape else shape_name(row)


def print_run(result: object, console: Console) -> None:
    """Table, missing baselines, summary and conditions of a `measure.Result`."""
    m = result.machine
    cold = [row for row in result.rows if not row.case.endswith(WARM)]
    order: dict[tuple, int] = {}
    for row in cold:
        order.setdefault(_block(row), len(order))
    cold.sort(key=lambda r: (order[_block(r)], width(r), not r.ours, r.us or 0.0))
    state = "cold weights" if cold and cold[0].op == "wq_linear" else "inputs in turn"
    print_table(
        cold, console, f"{cold[0].op}, {m.threads} thread{'s' * (m.threads > 1)}, {state}" if cold else "no rows"
    )
    for name, reason in result.missing.items():
        console.print(f"missing: {name}: {reason}")
    print_summary(cold, console)
    for note in result.notes:
        console.print(note)
    peaks = ", ".join(f"{what} {figure(max(by.values()), 4)}" for what, by in m.peaks.items())
    dram, foreign = result.dram or [m.dram_gbps], result.foreign or [0.0]
    console.print(
        f"{m.cpu}; {m.threads} pinned; DRAM read {figure(statistics.median(dram))} GB/s "
        f"({figure(min(dram))}-{figure(max(dram))} over the run); peaks GFLOP/s: {peaks}; "
        f"rotation {m.rotation_bytes >> 20} MiB; foreign CPU median {statistics.median(foreign):.1%}, "
        f"worst block {max(foreign):.1%} of a core"
    )


def _block(row: Row) -> tuple:
    """What rows that were timed together have in common."""
    if "d_in" in row.shape:
        return row.kind, *layer_sides(row), row.shape["T"]
    return row.kind, *(row.shape.get(key) for key in ("N", "K", "M", "B", "H", "L", "d", "f", "density"))
