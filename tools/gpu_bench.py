"""Times wq_linear on a CUDA device against torch's fp16 GEMM and the device's copy bandwidth.

Weights are rotated past the L2 cache and calls are replayed from a CUDA graph, as a decoding loop would replay them, so
that neither launch overhead nor cached weights flatter anybody. Every row carries its error over its bound.

    python tools/gpu_bench.py OUTPUT.json [--quick]
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch

import effk  # noqa: F401  (loads the ops)

SHAPES = ((8192, 8192), (4096, 14336), (14336, 4096), (4096, 4096))  # (N, K)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
BITS = (4, 3, 2, 8)
GROUP = 128
ROTATE = 384 << 20  # bytes of weights that one timing goes through: several times the L2 cache
REPLAYS = 7


def time_us(call: Callable[[int], object], count: int) -> tuple[float, float]:
    """Median microseconds and interquartile range of one of ``count`` calls, over replays of one graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call(0)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(count):
            call(i)
    graph.replay()
    times = []
    for _ in range(REPLAYS):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) * 1000 / count)
    low, middle, high = statistics.quantiles(times, n=4)
    return middle, high - low


class Weights:
    """Copies of one weight, enough of them to fall out of the cache; any bytes are valid codes."""

    def __init__(self, n: int, k: int, bits: int, outliers: float = 0.0, zeros: bool = False) -> None:
        chunk_k, chunk_bytes = (32, 192) if bits == 3 else (32 // bits, 64)
        tiles, chunks, groups = -(-n // 16), -(-k // chunk_k), -(-k // GROUP)
        self.n, self.k, self.bits = n, k, bits
        count = max(2, -(-ROTATE // (tiles * chunks * chunk_bytes)))
        self.packed = torch.randint(0, 256, (count, tiles, chunks, chunk_bytes), dtype=torch.uint8, device="cuda")
        self.scales = ((torch.rand(tiles, groups, 16, device="cuda") + 0.5) * 2.0**-7).half()
        self.zeros = (
            torch.randint(0, 1 << bits, (tiles, groups, 16), dtype=torch.uint8, device="cuda") if zeros else None
        )
        self.sparse: tuple[torch.Tensor | None, ...] = (None, None, None)
        if outliers:
            per_row = round(outliers * k)
            columns = torch.rand(n, k, device="cuda").topk(per_row).indices.sort().values
            self.sparse = (
                torch.arange(0, (n + 1) * per_row, per_row, dtype=torch.int32, device="cuda"),
                columns.flatten().to(torch.int32).to(torch.uint16),
                torch.randn(n * per_row, device="cuda").half(),
            )

    def arguments(self, i: int) -> tuple[object, ...]:
        return (self.packed[i % len(self.packed)], self.scales, self.zeros, None, *self.sparse)

    @property
    def geometry(self) -> tuple[int, int, int, int]:
        return (self.n, self.k, self.bits, GROUP)

    def bytes(self) -> int:
        sparse = sum(t.numel() * t.element_size() for t in self.sparse if t is not None)
        zeros = self.zeros.numel() if self.zeros is not None else 0
        return self.packed[0].numel() + self.scales.numel() * 2 + zeros + sparse


def match(y: torch.Tensor, x: torch.Tensor, weights: Weights) -> float:
    """Largest error over its bound against float64: fp32 sums, one rounding; above 64 rows also that of the weights."""
    w = torch.ops.effk.wq_dequantize(*weights.arguments(0), *weights.geometry).double()
    expected, magnitude = x.double() @ w.T, x.double().abs() @ w.abs().T
    unit = 2.0**-11 if x.dtype == torch.float16 else 2.0**-8
    allowed = magnitude * (2 * weights.k + 64) * 2.0**-24 + unit * expected.abs() + 2.0**-24
    if x.shape[0] > 64:
        allowed += 4 * unit * magnitude
    return float(((y.double() - expected).abs() / allowed).max())


def copy_gbps() -> float:
    """Bytes read and written per second by the device's copy of a GiB."""
    big = torch.empty(2, 1 << 30, dtype=torch.uint8, device="cuda").random_()
    us, _ = time_us(lambda i: big[i % 2].copy_(big[1 - i % 2]), 4)
    return 2 * big[0].numel() / us * 1e-3


def main() -> None:
    out, quick = Path(sys.argv[1]), "--quick" in sys.argv
    device = torch.cuda.get_device_name()
    rows: list[dict[str, object]] = []

    copy = copy_gbps()
    print(f"{device}, torch {torch.__version__}: device copy {copy:.0f} GB/s (read + written)", flush=True)

    def add(
        case: str,
        backend: str,
        dtype: torch.dtype,
        m: int,
        weights: Weights | None,
        n: int,
        k: int,
        timing: tuple[float, float],
        moved: int,
        best: float | None,
        error: float | None,
    ) -> None:
        us, spread = timing
        shape = {
            "M": m,
            "N": n,
            "K": k,
            "bits": weights.bits if weights else 16,
            "group": GROUP if weights else 0,
            "outliers": 0.005 if weights and weights.sparse[0] is not None else 0.0,
        }
        rows.append(
            {
                "op": "wq_linear",
                "case": case,
                "shape": shape,
                "dtype": str(dtype).removeprefix("torch."),
                "isa": device,
                "threads": None,
                "backend": backend,
                "version": torch.__version__,
                "us": round(us, 3),
                "us_iqr": round(spread, 3),
                "gbps": round(moved / us * 1e-3, 1),
                "gflops": round(2 * m * n * k / us * 1e-3, 1),
                "roofline": round(moved / us * 1e-3 / copy, 4),
                "vs_best": None if best is None else round(best / us, 3),
                "match": None if error is None else round(error, 4),
            }
        )
        row = rows[-1]
        print(
            f"{case:22} {backend:6} {n:6}x{k:<6} M {m:<5} {us:9.2f} us"
            f" {row['gbps']:8} GB/s {row['roofline']:7.1%} of copy"
            + (f"  x{row['vs_best']:.2f} cuBLAS" if best else "")
            + (f"  match {row['match']}" if error is not None else ""),
            flush=True,
        )

    for n, k in SHAPES[:2] if quick else SHAPES:
        dense_copies = max(2, -(-ROTATE // (2 * n * k)))
        for dtype in (torch.float16,) if quick else (torch.float16, torch.bfloat16):
            dense = torch.randn(dense_copies, n, k, device="cuda", dtype=dtype)
            baseline = {}
            for m in ROWS:
                x = torch.randn(m, k, device="cuda", dtype=dtype)
                timing = time_us(lambda i: torch.nn.functional.linear(x, dense[i % dense_copies]), 2 * dense_copies)  # noqa: B023
                baseline[m] = timing[0]
                add("fp16 GEMM", "cublas", dtype, m, None, n, k, timing, 2 * (n * k + m * (n + k)), None, None)
            dense = x = None  # their memory is needed
            for bits in BITS:
                cases = [("float", Weights(n, k, bits))]
                if bits == 4 and dtype == torch.float16:
                    cases += [
                        ("float, 0.5 % outliers", Weights(n, k, bits, outliers=0.005)),
                        ("float, zeros", Weights(n, k, bits, zeros=True)),
                    ]
                for case, weights in cases:
                    for m in ROWS if bits == 4 and case == "float" else (1, 8, 16):
                        x = torch.randn(m, k, device="cuda", dtype=dtype)

                        def call(i: int, x: torch.Tensor = x, weights: Weights = weights) -> torch.Tensor:
                            return torch.ops.effk.wq_linear(x, *weights.arguments(i), None, *weights.geometry, "float")

                        error = match(call(0), x, weights)
                        timing = time_us(call, min(2 * len(weights.packed), 40) if m <= 64 else 4)
                        add(
                            case,
                            "effk",
                            dtype,
                            m,
                            weights,
                            n,
                            k,
                            timing,
                            weights.bytes() + 2 * m * (n + k),
                            baseline[m],
                            error,
                        )
                cases = weights = call = None
        torch.cuda.empty_cache()
    out.write_text(
        json.dumps({"device": device, "torch": torch.__version__, "copy_gbps": round(copy, 1), "rows": rows}, indent=1)
        + "\n"
    )


if __name__ == "__main__":
    main()
