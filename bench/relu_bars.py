"""The speed bars of relu_ffn."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from .baselines import torch_relu_ffn as theirs
from .fftconv_bars import TIERS
from .relu_ffn import DENSE, LINEAR, LISTED, NAME
from .relu_problem import BATCH, DOWN, LAYER, PROMPT
from .report import Row, shape_name
from .verdict import Finding, Verdict

OP = "relu_ffn"
BANDWIDTH, MODEL, OWN_DENSE, TORCH_DENSE, QUANTISED, BATCHED = 0.9, 1 / 1.2, 2.1, 2.5, 1.9, 1.3
BAG = {1: 1.2, 2: 1.4}  # threads -> least

Value = Callable[[Row], float | None]


def cost(row: Row) -> float:
    """Bytes of a row's call over those of the dense layer, as the cost model has it."""
    rho = row.shape["density"]
    return (1 + 2 * rho) / 3 if row.shape["gated"] else (1 + rho) / 2


def judge(rows: Sequence[Row], threads: int) -> Iterator[Verdict]:
    """Every bar; nothing where the rows do not hold the op."""
    here = [r for r in rows if r.op == OP and r.threads == threads and r.valid and r.us]
    if not here:
        return
    tier = max((r.isa for r in here if r.ours), key=TIERS.index, default="")

    def verdict(name: str, least: float, found: Sequence[Row], value: Value, information: bool = False) -> Verdict:
        values = [(value(r), f"{shape_name(r)} {r.dtype}") for r in found]
        findings = tuple(Finding(v, where) for v, where in values if v is not None)
        return Verdict(name + " (information)" * information, threads, least, findings, OP, information)

    def ours(what: str, *types: str, name: str = NAME, density: float | None = None) -> list[Row]:
        kinds = [f"{what} {t}" for t in types or ("fp32", "bf16", "int8", "int4")]
        found = [r for r in here if r.backend == name and r.isa == tier and r.kind in kinds]
        return [r for r in found if density is None or r.shape["density"] == density]

    def against(*names: str) -> Value:
        """Time of the fastest of these backends at the same size, density and kind, over a row's time."""

        def ratio(row: Row) -> float | None:
            same = [r for r in here if r.backend in names and r.kind == row.kind and r.shape == row.shape]
            times = [r.us for r in same if not r.ours or r.isa == row.isa]
            return min(times) / row.us if times else None

        return ratio

    def model(row: Row) -> float | None:
        gain = against(DENSE)(row)
        return None if gain is None else gain * cost(row)

    def gated(found: Sequence[Row]) -> list[Row]:
        return [r for r in found if r.shape["gated"]]

    dense = against(DENSE)
    layers, tenth = ours(LAYER), ours(LAYER, "bf16", density=0.1)
    for types, counts in ((("bf16", "int8"), True), (("int4",), False)):
        name = f"reading all, {' and '.join(types)}: share of the read bandwidth"
        yield verdict(name, BANDWIDTH, ours(LAYER, *types, name=DENSE), lambda r: r.roofline, not counts)
    yield verdict("skipping: time by the cost model / time", MODEL, layers, model)
    yield verdict("skipping: x reading all, every density", 1.0, layers, dense)
    yield verdict("skipping, gated, bf16, density 0.1: x reading all", OWN_DENSE, gated(tenth), dense)
    torch_dense = against(theirs.BF16, theirs.FP32)
    yield verdict("skipping, gated, bf16, density 0.1: x torch's dense layers", TORCH_DENSE, gated(tenth), torch_dense)
    quantised = gated(ours(LAYER, "int8", "int4", density=0.1))
    yield verdict("skipping, gated, int8 and int4, density 0.1: x reading all", QUANTISED, quantised, dense)
    yield verdict("8 tokens, union 0.3: x reading all", BATCHED, ours(BATCH), dense)
    for types, name in ((("fp32", "bf16"), theirs.BAG), (("int8", "int4"), theirs.BYTES)):
        title, extra = f"rows of down, {' and '.join(types)}", name != theirs.BAG
        least, given = BAG.get(threads, 1.0), ours(DOWN, *types, name=LISTED)
        yield verdict(f"{title}, list given to both: x {name}", least, given, against(name), extra)
        yield verdict(f"{title}, list found too: x {name}", least, ours(DOWN, *types), against(name), extra)
    yield verdict("prompts, bf16: x dense_linear", 1.0, ours(PROMPT, "bf16"), against(LINEAR), True)
