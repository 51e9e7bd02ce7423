"""Turns the JSON lines of finished runs into `results/README.md`: conditions, bars, our rows and the field."""

from __future__ import annotations

import re
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from . import bars, dyad_page, quik_page, relu_page
from .fftconv_problem import KINDS
from .measure import FIRST, FOREIGN
from .report import COLD, Row, best_competitor, figure, geomean, read_jsonl, set_vs_best, shape_name, time_of

LEGEND = (
    "Cold: weights rotate over at least four times the last-level cache. Medians. Ours: one call per product; "
    "competitors whose settings say so run all copies in one graph. % roof: least possible time (bytes over the DRAM "
    "bandwidth read between the rows, or operations over the measured peak) over the time. x best: time of the fastest "
    "competitor of the same bits (fftconv: of the same kind, allocators tuned for it included) over ours. Dense and "
    "DYAD layers: both sides in the same dtype, weights cold for one token only. Quantised layers: weights cold for up to 8 rows."
)
DISTURBED = 20  # percent of a core that others used
MORE = ", "  # between the parts of a note
FOLDER = Path(__file__).parent / "results"


def write(paths: Sequence[Path], target: Path = FOLDER / "README.md") -> None:
    """Writes the page for the rows of all files."""
    found = [run for path in paths for run in runs(path)]
    set_vs_best([row for run in found for row in run.rows])
    target.write_text("\n".join(page(found, paths)) + "\n")


@dataclass(frozen=True)
class Run:
    """Rows that were measured together, and the share of a core that others used during the worst block, in percent."""

    file: str
    rows: list[Row]
    foreign: float | None

    @property
    def disturbed(self) -> bool:
        """Whether others used so much that the times are not those of a machine left alone."""
        return self.foreign is not None and self.foreign > DISTURBED


def runs(path: Path) -> Iterator[Run]:
    """The runs of a file: each begins with the machine's limits. Marks the rows of those that were disturbed."""
    rows = read_jsonl(path)
    starts = [i for i, row in enumerate(rows) if row.op == "machine" and row.case == FIRST] or [0]
    for begin, end in pairwise([*starts, len(rows)]):
        part = rows[begin:end]
        worst = [float(m[1]) for row in part if (m := re.match(rf"{FOREIGN}: .*worst block ([\d.]+)%", row.case))]
        run = Run(path.name, part, max(worst, default=None))
        for row in part:
            row.disturbed = run.disturbed
        yield run


def page(found: Sequence[Run], paths: Sequence[Path]) -> Iterator[str]:
    """The lines of the page."""
    rows = [row for run in found for row in run.rows]
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
            *conditions([run for run in found if run.rows[0].threads == threads]),
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


def conditions(found: Sequence[Run]) -> Iterator[str]:
    """Measured limits of the machine, medians over the runs; then every other condition once."""
    limits = [r for run in found for r in run.rows if r.op == "machine"]
    if not limits:
        return
    seen: dict[tuple[str, str], list[float]] = {}
    notes: dict[str, list[str]] = {}
    for r in limits:
        if r.gbps or r.gflops:
            name = f"{r.case} ({r.isa})" if r.isa else r.case
            seen.setdefault((name, "GB/s" if r.gbps else "GFLOP/s"), []).append(r.gbps or r.gflops)
        elif not r.case.startswith(FOREIGN):
            name, _, what = r.case.partition(": ")
            notes.setdefault(name, [])
            notes[name] += [part for part in what.split(MORE) if part not in notes[name]]
    for unit in ("GB/s", "GFLOP/s"):
        parts = [f"{name} {figure(statistics.median(v), 4)}" for (name, u), v in seen.items() if u == unit]
        yield f"- {limits[0].backend}, {unit}, medians of {sum(r.case == FIRST for r in limits)} runs: {', '.join(parts)}."
    yield from (f"- {name}: {MORE.join(what)}." for name, what in notes.items())
    shares = [run.foreign for run in found if run.foreign is not None]
    if shares:
        text = f"- {FOREIGN} in the worst block of a run, % of a core: {figure(min(shares))} to {figure(max(shares))}"
        loud = Counter(run.file for run in found if run.disturbed)
        where = MORE.join(f"`{name}` ({n} of {sum(r.file == name for r in found)} runs)" for name, n in loud.items())
        yield text + (f"; above {DISTURBED} in {where}, whose times carry an asterisk." if loud else ".")


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
                *(time_of(found.get(shape)) for shape in shapes),
            ]
            for key, found in order
        ),
    )


def spread(values: Sequence[float]) -> str:
    """Geometric mean and worst."""
    return f"{figure(geomean(values))} ({figure(min(values))})" if values else "-"


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
        return f"**{time_of(row)}**" if row is not None and row is best_competitor(rows, row) else time_of(row)

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
        lines.append([kind, shape, time_of(top), *map(figure, figures), *map(time_of, rest)])
    yield from table(header, lines)


def competitor(row: Row) -> str:
    """A competitor, or ours in unusual conditions, with the settings."""
    return ", ".join(filter(None, (row.backend, row.case.partition(", ")[2])))


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
