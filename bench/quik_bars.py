"""The speed bars of quik_linear."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from .baselines import onnxruntime_quik, torch_quik
from .fftconv_bars import TIERS, fma_peak
from .quik_linear import NAME, PARTS, WQ
from .quik_problem import FEW, LAYER, PRODUCT
from .report import Row, shape_name
from .verdict import Finding, Verdict

OP = "quik_linear"
MANY, MIDDLE, LARGE = 128, 512, 2048  # rows of x
PEAK, FASTEST, FOUR_BITS = 0.85, 0.95, 0.95
TORCH = {torch_quik.BF16: 1.8, torch_quik.FP32: 7.5}
FUSED, DYNAMIC = 1.3, 0.9

Value = Callable[[Row], float | None]


def judge(rows: Sequence[Row], threads: int) -> Iterator[Verdict]:
    """Every bar; nothing where the rows do not hold the op."""
    here = [r for r in rows if r.op == OP and r.threads == threads and r.valid and r.us]
    if not here:
        return
    tier = max((r.isa for r in here if r.ours), key=TIERS.index, default="")
    peak = fma_peak([r for r in rows if r.op == "machine" and r.threads == threads], threads, tier, "int8 peak")

    def verdict(name: str, least: float, found: Sequence[Row], value: Value, information: bool = False) -> Verdict:
        values = [(value(r), shape_name(r)) for r in found]
        findings = tuple(Finding(v, where) for v, where in values if v is not None)
        return Verdict(name + " (information)" * information, threads, least, findings, OP, information)

    def ours(kind: str, outliers: bool, name: str = NAME) -> list[Row]:
        found = [r for r in here if r.backend == name and r.isa == tier and r.kind == kind]
        return [r for r in found if (r.shape["outliers"] > 0) == outliers]

    def at(found: Sequence[Row], least: int, most: int = 1 << 30) -> list[Row]:
        return [r for r in found if least <= r.shape["M"] <= most]

    def against(wanted: Callable[[Row, Row], bool]) -> Value:
        """Time of the fastest such row of the same kind and size, over a row's time."""

        def ratio(row: Row) -> float | None:
            same = [r for r in here if r.kind == row.kind and all(r.shape[k] == row.shape[k] for k in "MNK")]
            times = [r.us for r in same if wanted(r, row)]
            return min(times) / row.us if times else None

        return ratio

    def named(*names: str, same_weight: bool = False) -> Value:
        keys = ("bits_w", "outliers") if same_weight else ()
        return against(
            lambda r, row: (
                r.backend in names and (not r.ours or r.isa == tier) and all(r.shape[k] == row.shape[k] for k in keys)
            )
        )

    products = at(ours(PRODUCT, False), MANY)
    competitor = against(lambda r, row: not r.ours)
    yield verdict(
        "product: share of the measured VNNI peak", PEAK, products, lambda r: r.gflops / peak if peak else None
    )
    yield verdict("product: x fastest competitor", FASTEST, at(products, MANY, LARGE - 1), competitor)
    yield verdict(f"product, M = {LARGE}: x fastest competitor", 1.0, at(products, LARGE), competitor)
    eight = against(lambda r, row: r.backend == NAME and r.isa == tier and r.shape["bits_w"] == 8)
    four = [r for r in products if r.shape["bits_w"] == 4]
    yield verdict("product of 4-bit weights: time of 8-bit ones / time", FOUR_BITS, four, eight)
    fused, plain = ours(LAYER, True), ours(LAYER, False)
    for name, least in TORCH.items():
        yield verdict(f"layer, M = {MIDDLE}: x {name}", least, at(fused, MIDDLE, MIDDLE), named(name))
        yield verdict(f"layer, M >= {MANY}: x {name}", least, at(fused, MANY), named(name), True)
    parts = named(PARTS, same_weight=True)
    yield verdict("layer: x the same steps as separate operations", FUSED, at(fused, MANY), parts)
    yield verdict("layer: x the same steps in torch", FUSED, at(fused, MANY), named(torch_quik.STEPS), True)
    dynamic = named(torch_quik.DYNAMIC, onnxruntime_quik.DYNAMIC)
    yield verdict("layer: x dynamic int8 without outliers", DYNAMIC, at(fused, MANY), dynamic)
    yield verdict("layer without outliers: x dynamic int8", 1.0, at(plain, MANY), dynamic, True)
    few = at(fused + plain, 1, FEW)
    yield verdict(f"layer, M <= {FEW}: x wq_linear on the same weights", 1.0, few, named(WQ, same_weight=True))
    yield verdict(f"layer, M <= {FEW}: x {torch_quik.BF16}", 1.0, few, named(torch_quik.BF16), True)
