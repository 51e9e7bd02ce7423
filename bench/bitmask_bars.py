"""The speed bars of bitmask_linear."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from .bitmask_linear import DENSE, NAME, WQ
from .fftconv_bars import TIERS
from .report import Row, shape_name
from .verdict import Finding, Verdict

OP = "bitmask_linear"
DECODE = ((0.75, 4, 1.3), (0.5, 8, 1.5))  # zeros of int8 values, bits of the dense weight, least
PREFILL, MANY = 0.9, 128


def judge(rows: Sequence[Row], threads: int) -> Iterator[Verdict]:
    """Every bar; nothing where the rows do not hold the op. The dense weight is the faster one of both sizes of groups."""
    here = [r for r in rows if r.op == OP and r.threads == threads and r.valid and r.us]
    if not here:
        return
    tier = max((r.isa for r in here if r.ours and r.isa in TIERS), key=TIERS.index, default="")

    def verdict(name: str, least: float, found: Sequence[Row], bits: int | None, backend: str, kind: str) -> Verdict:
        findings = []
        for row in found:
            like = [
                r.us for r in here
                if r.backend == backend and r.case.split(",")[0] == kind and all(r.shape[k] == row.shape[k] for k in "MNK")
                and r.shape["bits"] == (bits or row.shape["bits"])
            ]  # fmt: skip
            if like:
                findings.append(Finding(min(like) / row.us, shape_name(row)))
        return Verdict(name, threads, least, tuple(findings), OP)

    def ours(kind: str, **shape: float) -> list[Row]:
        found = [r for r in here if r.backend == NAME and r.isa == tier and r.case.split(",")[0] == kind]
        return [r for r in found if all(r.shape[key] == value for key, value in shape.items())]

    for zeros, bits, least in DECODE:
        name = f"int8, {zeros:.0%} zeros, M = 1: x wq_linear of {bits} bits"
        yield verdict(name, least, ours("int8", M=1, sparsity=zeros), bits, WQ, "int8")
    many = [r for r in ours("int8") if r.shape["M"] >= MANY]
    yield verdict(f"int8, M >= {MANY}: x wq_linear of 8 bits", PREFILL, many, 8, WQ, "int8")
    many = [r for r in ours("float") if r.shape["M"] >= MANY and r.shape["bits"] > 8]
    yield verdict(f"float, M >= {MANY}: x dense_linear of the same type", PREFILL, many, None, DENSE, "float")
