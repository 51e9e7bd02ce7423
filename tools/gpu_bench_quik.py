"""Times quik_linear on a CUDA device: the fused layer against torch's fp16 linear (cuBLAS), the integer product against
cuBLAS int8 (torch._int_mm), the quantiser against the same steps in torch, and one row against wq_linear on the same bytes.

Calls are replayed from a graph. Weights stay in cache where they fit, for everybody. Rows of the fused layer carry their
error over its bound (float64, from the codes that the quantiser made).

    python tools/gpu_bench_quik.py OUTPUT.json [--quick]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from gpu_bench import copy_gbps, time_us

import effk  # noqa: F401  (loads the ops)

SIDES = ((8192, 8192), (4096, 4096), (11008, 4096), (4096, 11008))  # N, K
ROWS = (2048, 16, 64, 128, 512, 8192)
KINDS = ((4, 8), (8, 8), (4, 4))  # weights, activations
OUTLIERS = 256
CHECKED_ROWS = 16

ops = torch.ops.effk


class Layer:
    """A random layer of ``n`` rows and ``k`` columns, some of which are outliers, and its packed form."""

    def __init__(self, n: int, k: int, bits: int, outliers: int) -> None:
        self.n, self.k, self.bits, self.base = n, k, bits, k - outliers
        order = torch.randperm(k, device="cuda")
        self.int_idx, self.fp_idx = (part.sort().values.int() for part in (order[: self.base], order[self.base :]))
        chunk = 32 // bits
        shape = (-(-n // 16), -(-self.base // chunk), 64)
        self.packed = torch.randint(0, 256, shape, dtype=torch.uint8, device="cuda")
        self.scale = (torch.rand(shape[0], 1, 16, device="cuda") + 0.5) * 2.0 ** -(bits + 6)
        self.reduced = self.dense().double().sum(1).float()
        self.rows_out = (torch.randn(n, outliers, device="cuda") * 0.05).half()
        self.w_out = ops.dense_pack(self.rows_out, "fp16") if outliers else None

    def dense(self) -> torch.Tensor:
        nothing = (None,) * 5
        return ops.wq_dequantize(self.packed, self.scale, *nothing, self.n, self.base, self.bits, 0)

    def run(self, x: torch.Tensor, bits_a: int, mode: str = "kernel") -> torch.Tensor:
        weight = (self.packed, self.scale, self.reduced, self.w_out, None, self.int_idx, self.fp_idx)
        return ops.quik_linear(x, *weight, self.n, self.base, self.bits, bits_a, mode)

    def quantize(self, x: torch.Tensor, bits_a: int) -> list[torch.Tensor]:
        return ops.quik_quantize(x, self.int_idx, self.fp_idx, self.base, bits_a, "kernel")

    def match(self, x: torch.Tensor, bits_a: int) -> float:
        """The largest error over its bound: four fp32 roundings, sums over the outliers in any order, and one rounding."""
        few = x[:CHECKED_ROWS].contiguous()
        y = self.run(few, bits_a, "sim")
        qx, s, z, out = ops.quik_quantize(few, self.int_idx, self.fp_idx, self.base, bits_a, "sim")
        if bits_a == 4:
            low, high = (qx << 4).view(torch.int8) >> 4, qx.view(torch.int8) >> 4
            qx = torch.stack((low, high), 2).flatten(1)[:, : self.base]
        w, half = self.dense().double(), 2 ** (bits_a - 1)
        first = s.double()[:, None] * (qx.double() @ w.T)
        second = (z.double() + half * s.double())[:, None] * self.reduced.double()
        want, size = first + second, 5 * (first.abs() + second.abs())
        if self.w_out is not None:
            want = want + out.double() @ self.rows_out.double().T
            size = size + (out.shape[1] + 8) * (out.double().abs() @ self.rows_out.double().abs().T + want.abs())
        bound = size * 2.0**-23 + 2.0**-11 * want.abs() + 2.0**-24
        return ((y.double() - want).abs() / bound).max().item()


class Table:
    def __init__(self) -> None:
        self.rows: list[dict[str, object]] = []
        self.device = torch.cuda.get_device_name()
        self.copy = copy_gbps()

    def add(
        self,
        case: str,
        shape: dict[str, int],
        ours: Callable,
        theirs: Callable | None,
        error: float | None,
        moved: float,
    ) -> None:
        count = 8 if shape["M"] <= 512 else 3
        us, spread = time_us(ours, count)
        best = time_us(theirs, count)[0] if theirs else None
        flops = 2.0 * shape["M"] * shape["N"] * shape["K"]
        row: dict[str, object] = {"op": "quik_linear", "case": case, "shape": shape, "dtype": "float16"}
        row |= {"isa": self.device, "threads": None, "backend": "effk", "version": torch.__version__}
        row |= {"us": round(us, 2), "us_iqr": round(spread, 2), "gbps": round(moved / us * 1e-3, 1)}
        row |= {"gflops": round(flops / us * 1e-3, 1), "roofline": None}
        row |= {"vs_best": None if best is None else round(best / us, 3), "match": error}
        if shape["M"] == 1 or case.startswith("quantize"):
            row["roofline"] = round(moved / us * 1e-3 / self.copy, 4)
        self.rows.append(row)
        text = " ".join(f"{k} {v}" for k, v in shape.items())
        other = "" if best is None else f" other {best:9.1f} us x{best / us:.2f}"
        print(
            f"{case:34} {text:55} {us:9.1f} us {row['gflops'] / 1000:7.1f} Top/s {row['gbps']:8} GB/s{other}"
            + ("" if error is None else f" error/bound {error:.2f}"),
            flush=True,
        )


def unfused_quantize(x: torch.Tensor, layer: Layer) -> tuple[torch.Tensor, ...]:
    """The steps of quik_quantize one by one, 8 bits."""
    base, out = x.index_select(1, layer.int_idx), x.index_select(1, layer.fp_idx)
    lo, hi = base.aminmax(dim=1, keepdim=True)
    lo, hi = lo.float(), hi.float()
    scale = ((hi - lo) / 255).clamp(min=1e-6)
    return (((base - lo) / scale).round_().clamp_(0, 255) - 128).to(torch.int8), scale, lo, out


def measure(table: Table, layer: Layer, dense: torch.Tensor, m: int, bits_a: int, parts: bool) -> None:
    """The fused layer on ``m`` rows; with ``parts`` also the product and the quantiser alone."""
    n, k, base, outliers = layer.n, layer.k, layer.base, layer.k - layer.base
    x = torch.randn(m, k, device="cuda", dtype=torch.float16)
    shape = {"M": m, "N": n, "K": k, "bits_w": layer.bits, "bits_a": bits_a, "outliers": outliers}
    weights = layer.packed.numel() + 2 * n * outliers
    if m == 1:
        x_base, nothing = x[:, :base].contiguous(), (None,) * 6

        def weight_only(_: int) -> torch.Tensor:
            return ops.wq_linear(x_base, layer.packed, layer.scale, *nothing, n, base, layer.bits, 0, "float")

        table.add("one row, wq_linear", shape, lambda _: layer.run(x, bits_a), weight_only, None, weights)
        return
    error = layer.match(x, bits_a)
    moved = weights + 2 * m * (n + k)
    table.add("fused, fp16 cuBLAS", shape, lambda _: layer.run(x, bits_a), lambda _: F.linear(x, dense), error, moved)
    if not parts:
        return
    qx, library = layer.quantize(x, bits_a)[0], None
    if bits_a == 8 and base % 8 == 0:
        as_bytes = torch.randint(-128, 128, (n, base), dtype=torch.int8, device="cuda")
        library = lambda _: torch._int_mm(qx, as_bytes.T)  # noqa: E731

    def product(_: int) -> torch.Tensor:
        return ops.quik_int_matmul(qx, layer.packed, n, base, layer.bits, bits_a)

    moved = layer.packed.numel() + qx.numel() + 4 * m * n
    table.add("integers alone, cuBLAS int8", shape, product, library, None, moved)
    if bits_a == 8:
        ours, theirs = (lambda _: layer.quantize(x, 8)), (lambda _: unfused_quantize(x, layer))
        table.add("quantize, unfused in torch", shape, ours, theirs, None, 2 * m * k + m * base + 2 * m * outliers)


def main() -> None:
    out, quick = Path(sys.argv[1]), "--quick" in sys.argv
    table = Table()
    has_int4 = torch.cuda.get_device_capability()[0] == 8
    for n, k in SIDES[:1] if quick else SIDES:
        dense = torch.randn(n, k, device="cuda", dtype=torch.float16)
        for bits_w, bits_a in KINDS:
            if bits_a == 4 and not has_int4 and quick:
                continue  # as fast as 8 bits there, and less exact
            for outliers in (OUTLIERS, 0):
                layer = Layer(n, k, bits_w, outliers)
                for m in (ROWS[0], 1) if quick or outliers == 0 else (*ROWS, 1):
                    measure(table, layer, dense, m, bits_a, parts=m == ROWS[0])
    out.write_text(json.dumps({"device": table.device, "rows": table.rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
