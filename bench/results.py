"""Turns the JSON lines of finished runs into `results/README.md`: conditions, bars, our rows and the field."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from . import bars, dyad_page, quik_page, relu_page
from .fftconv_problem import KINDS
from .report import COLD, Row, best_competitor, figure, geomean, read_jsonl, set_vs_best, shape_name

LEGEND = (
    "Cold: weights rotate over at least four times the last-level cache. Medians. Ours: one call per product; "
    "competitors whose settings say so run all copies in one graph. % roof: least possible time (bytes over the DRAM "
    "bandwidth read between the rows, or operations over the measured peak) over the time. x best: time of the fastest "
    "competitor of the same bits (fftconv: of the same kind, allocators tuned for it included) over ours. Dense and "
    "DYAD layers: both sides in the same dtype, weights cold for one token only. Quantised layers: weights cold for up to 8 rows."
)
FOLDER = Path(__file__).parent / "results"


def write(paths: Sequence[Path], target: Path = FOLDER / "README.md") -> None:
    """Writes the page for the rows of all files."""
    rows = [row for path in paths for row in read_jsonl(path)]
    set_vs_best(rows)
    target.write_text("\n".join(page(rows, paths)) + "\n")


def page(rows: list[Row], paths: Sequence[Path]) -> Iterator[str]:
    """The lines of the page."""
    yield "# Measured"
    yield ""
    yield f"Written by `python -m bench --readme` from {', '.join(f'`{p.name}`' for p in paths)}. Not edited by hand."
    yield ""
    yield LEGEND
    for threads in sorted({r.threads for r in rows}):
        here = [r for r in rows if r.threads == threads]
        yield from [
            "",
            f"## {threads} thread{'s' * (threads > 1)}",
            "",
            *conditions(here),
            "",
            "### Bars",
            "",
            *verdicts(here),
        ]
        if any(r.op == "wq_linear" for r in here):
            yield from ["", "### Ours", "", *ours(here), "", "### The field", "", *field(here)]
        if any(r.op == "fftconv" for r in here):
            yield from ["", "### Long convolutions", "", *convolutions(here), "", "### Decoding", "", *decoding(here)]
        for op, title in dyad_page.sections(here):
            yield from ["", f"### {title}", "", *dyad_page.notes(here)]
            yield from table(dyad_page.HEADER, dyad_page.lines(here, op))
        for kind, title in quik_page.sections(here):
            yield from ["", f"### {title}", "", *quik_page.notes(here)]
            yield from table(quik_page.HEADERS[kind], quik_page.lines(here, kind))
        for kind, title in relu_page.sections(here):
            yield from ["", f"### {title}", ""]
            yield from table(relu_page.HEADER, relu_page.lines(here, kind))
        if any(r.op == "runtime" for r in here):
            yield from ["", "### Whole models", "", *models(here)]
        missing = sorted(
            {(r.backend, r.case.removeprefix("missing: ")) for r in here if r.case.startswith("missing: ")}
        )
        if missing:
            yield from ["", "Missing: " + "; ".join(f"{name}: {reason}" for name, reason in missing) + "."]


def table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> Iterator[str]:
    """A Markdown table."""
    yield "| " + " | ".join(header) + " |"
    yield "|" + "---|" * len(header)
    for line in lines:
        yield "| " + " | ".join(line) + " |"


def conditions(rows: Sequence[Row]) -> Iterator[str]:
    """Measured limits of the machine."""
    limits = [r for r in rows if r.op == "machine"]
    if limits:
        seen: dict[str, list[float]] = {}  # runs of single shapes measured the machine once each
        notes = [r.case for r in limits if not (r.gbps or r.gflops)]
        for r in (r for r in limits if r.gbps or r.gflops):
            name = f"{r.case} ({r.isa})" if r.isa else r.case
            seen.setdefault(f"{name}, {'GB/s' if r.gbps else 'GFLOP/s'}:", []).append(r.gbps or r.gflops)
        parts = [f"{name} {figure(statistics.median(values), 4)}" for name, values in seen.items()] + notes
        yield f"{limits[0].backend}: " + "; ".join(parts) + "."


def verdicts(rows: Sequence[Row]) -> Iterator[str]:
    """Every bar that has rows."""
    lines = [
        (
            v.name.strip(),
            figure(v.least),
            figure(v.worst.value),
            v.worst.where,
            figure(max(f.value for f in v.findings)),
            v.outcome,
        )
        for v in bars.judge(rows)
        if v.findings
    ]
    yield from table(("bar", "asked", "worst", "at", "best", "outcome"), lines)


def ours(rows: Sequence[Row]) -> Iterator[str]:
    """One line per case of ours: geometric means with the worst shape, then the time at each shape."""
    mine = [r for r in rows if r.ours and r.op == "wq_linear" and r.valid and r.case.endswith(COLD)]
    shapes = list(dict.fromkeys((r.shape["N"], r.shape["K"]) for r in mine))
    groups: dict[tuple, dict[tuple, Row]] = {}
    for r in mine:
        key = (r.isa, r.case.removesuffix(f", {COLD}"), r.shape["bits"], r.shape["M"])
        groups.setdefault(key, {})[r.shape["N"], r.shape["K"]] = r
    header = (
        "tier",
        "case",
        "bits",
        "M",
        "% roof, mean (worst)",
        "x best, mean (worst)",
        *(f"{n}x{k} us" for n, k in shapes),
    )
    order = sorted(groups.items(), key=lambda item: (item[0][0] == "avx2", item[0][1], -item[0][2], item[0][3]))
    yield from table(
        header,
        (
            [
                *map(str, key),
                spread([100 * r.roofline for r in found.values() if r.roofline]),
                spread([r.vs_best for r in found.values() if r.vs_best]),
                *(cell(found.get(shape)) for shape in shapes),
            ]
            for key, found in order
        ),
    )


def spread(values: Sequence[float]) -> str:
    """Geometric mean and worst."""
    return f"{figure(geomean(values))} ({figure(min(values))})" if values else "-"


def cell(row: Row | None) -> str:
    """Median microseconds."""
    return "-" if row is None else figure(row.us, 4)


def field(rows: Sequence[Row]) -> Iterator[str]:
    """All competitors' medians by M at each shape, the fastest of its bits in bold."""
    theirs = [r for r in rows if not r.ours and r.op == "wq_linear" and r.us and r.case.endswith(COLD)]
    ms = sorted({r.shape["M"] for r in theirs})
    groups: dict[tuple, dict[int, Row]] = {}
    for r in theirs:
        s = r.shape
        groups.setdefault(
            (f"{s['N']}x{s['K']}", s["bits"], r.backend, r.version, r.case.removesuffix(f", {COLD}")), {}
        )[s["M"]] = r

    def text(row: Row | None) -> str:
        if row is None:
            return "-"
        if not row.valid:
            return "wrong result"
        best = best_competitor(rows, row)
        return f"**{figure(row.us, 4)}**" if row is best else figure(row.us, 4)

    yield from table(
        ("shape", "bits", "competitor", "version", "settings", *(f"M={m} us" for m in ms), "match (M=1)"),
        (
            [*map(str, key), *(text(found.get(m)) for m in ms), figure(found[min(found)].match, 2)]
            for key, found in groups.items()
        ),
    )


def convolutions(rows: Sequence[Row]) -> Iterator[str]:
    """One line per kind and shape: ours on its best tier, on the other one, and every competitor's median."""
    found = [r for r in rows if r.op == "fftconv" and r.kind in KINDS and r.us]
    tiers = list(dict.fromkeys(r.isa for r in found if r.ours and r.case == r.kind))
    versions = {competitor(r): r.version for r in found if not r.ours or r.case != r.kind}
    groups: dict[tuple[str, str], dict[str, Row]] = {}
    for r in found:
        groups.setdefault((r.kind, shape_name(r)), {})[r.isa if r.ours and r.case == r.kind else competitor(r)] = r
    header = ["kind", "B x H x L", f"{tiers[0]} us", "ns per element", "GFLOP/s", "% roof", "x best"]
    header += [f"{tier} us" for tier in tiers[1:]] + [f"{name} {version} us" for name, version in versions.items()]
    lines = []
    for (kind, shape), by in sorted(groups.items(), key=lambda item: KINDS.index(item[0][0])):
        if (top := by.get(tiers[0])) is None:
            continue
        ns = 1e3 * top.us / (top.shape["B"] * top.shape["H"] * top.shape["L"])
        figures = (ns, top.gflops, 100 * top.roofline, top.vs_best)
        rest = [by.get(name) for name in (*tiers[1:], *versions)]
        lines.append([kind, shape, valid_cell(top), *map(figure, figures), *map(valid_cell, rest)])
    yield from table(header, lines)


def competitor(row: Row) -> str:
    """A competitor, or ours in unusual conditions, with the settings."""
    return ", ".join(filter(None, (row.backend, row.case.partition(", ")[2])))


def valid_cell(row: Row | None) -> str:
    """Median microseconds of a right result."""
    return "wrong result" if row is not None and not row.valid else cell(row)


def decoding(rows: Sequence[Row]) -> Iterator[str]:
    """Microseconds a token."""
    found = [r for r in rows if r.op == "fftconv" and r.kind == "decode"]
    lines = []
    for r in (r for r in found if r.ours):
        theirs = [o.us for o in found if not o.ours and o.shape == r.shape]
        count = r.case.partition(", ")[2]
        lines.append(
            (str(r.shape["L"]), figure(r.us, 4), figure(min(theirs, default=None), 4), figure(r.vs_best), count)
        )
    yield from table(("tokens", "effk us per token", "direct sum us", "times faster", "by count"), lines)


def models(rows: Sequence[Row]) -> Iterator[str]:
    """Tokens per second."""
    found = [r for r in rows if r.op == "runtime"]
    yield from table(
        ("case", "runtime", "tokens/s", "x fastest competitor", "match"),
        (
            (r.case, f"{r.backend} {r.version}", figure(1e6 / r.us, 4), figure(r.vs_best), figure(r.match, 2))
            for r in found
        ),
    )
