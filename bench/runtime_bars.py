"""The speed bars of whole models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from .report import Row
from .verdict import Finding, Verdict

OP = "runtime"
TORCH, LLAMA = "torch eager", "llama.cpp"
FOUR_BITS = (
    "rtn 4.00 bits"  # fewer true bits than Q4_0: scales for 64 weights instead of 32, both with an embedding of 8 bits
)
DECODE, PREFILL, FLOAT = 1.3, 1.5, 1.0
COMPRESSED_DECODE, COMPRESSED_PREFILL = 1.5, 1.0  # of LLM-MQ over PyTorch
BATCHED, IN_OPERATION, OF_BANDWIDTH = 4.0, 0.9, 0.6


def judge(rows: Sequence[Row], threads: int) -> Iterator[Verdict]:
    """Every bar; nothing where the rows do not hold whole models."""
    here = [r for r in rows if r.op == OP and r.threads == threads and r.valid and r.us]
    if not here:
        return
    ours = [r for r in here if r.ours]

    def label(row: Row) -> str:
        return row.case.partition(", ")[2]

    def fastest(kind: str, *backends: str) -> Row | None:
        found = [r for r in here if r.backend in backends and r.case.startswith(kind + ", ")]
        return min(found, key=lambda r: r.us, default=None)

    def of(kind: str, *parts: str) -> list[Row]:
        return [r for r in ours if r.case.startswith(kind + ", ") and all(part in r.case for part in parts)]

    def against(found: Sequence[Row], other: Row | None) -> tuple[Finding, ...]:
        return tuple(Finding(other.us / r.us, r.case) for r in found if other is not None)

    def beside(found: Sequence[Row], kind: str, factor: float = 1.0) -> tuple[Finding, ...]:
        """Time of the same model's row of `kind` over theirs."""
        pairs = [(r, o) for r in found for o in of(kind) if label(o) == label(r)]
        return tuple(Finding(factor * o.us / r.us, r.case) for r, o in pairs)

    def verdict(name: str, least: float, findings: tuple[Finding, ...]) -> Verdict:
        return Verdict(name, threads, least, findings, OP)

    llama = fastest("decode", LLAMA)
    yield verdict("SmolLM2 decode, 4 bits int8: x llama.cpp", DECODE, against(of("decode", FOUR_BITS, "int8"), llama))
    yield verdict("SmolLM2 decode, 4 bits float: x llama.cpp", FLOAT, against(of("decode", FOUR_BITS, "float"), llama))
    both = fastest("prefill", TORCH, LLAMA)
    yield verdict(
        "SmolLM2 prompt of 512: x best of PyTorch, llama.cpp", PREFILL, against(of("prefill", FOUR_BITS, "int8"), both)
    )
    torch_decode, torch_prefill = fastest("decode", TORCH), fastest("prefill", TORCH)
    for kind, least, other in (
        ("decode", COMPRESSED_DECODE, torch_decode),
        ("prefill", COMPRESSED_PREFILL, torch_prefill),
    ):
        yield verdict(f"SmolLM2 {kind}, llm-mq: x PyTorch bf16 eager", least, against(of(kind, "llm-mq"), other))
    four = min(of("decode", "llm-mq 4"), key=lambda r: r.us, default=None)
    yield verdict("SmolLM2 decode, llm-mq: time at 4 bits / at 3 bits", 1.0, against(of("decode", "llm-mq 3"), four))
    yield verdict("a token: share of the operation", IN_OPERATION, tuple(
        Finding(1 / f.value, f.where) for f in beside(of("step", "int8"), "decode")
    ))  # fmt: skip
    shares = tuple(Finding(r.roofline, r.case) for r in of("decode", "int8") if r.roofline is not None)
    yield verdict("decode: share of the measured bandwidth", OF_BANDWIDTH, shares)
    yield verdict("8 sequences: x one", BATCHED, beside(of("batch", "int8"), "decode"))
