"""Times relu_ffn on a CUDA device against its own dense path and against torch's dense layers (cuBLAS) in bf16.

Calls are replayed from a graph; every call has another x and so another set of active neurons, and the matrices of the large
shapes do not fit in L2. Rows carry their error over the bound 1e-5 |h| |Wd| + 1e-6, and one rounding of y (float64).

    python tools/gpu_bench_relu.py OUTPUT.json [--quick]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from gpu_bench import copy_gbps, time_us

import effk  # noqa: F401  (loads the ops)
from effk.ops.relu_ffn import row_bytes

SHAPES = ((4096, 11008, True), (4096, 16384, False), (2048, 8192, True), (768, 3072, False))  # d, f, gated
DENSITIES = (0.05, 0.1, 0.2, 0.33, 0.5)
ROWS = (("bf16", 0), ("int8", 0), ("int4", 32))
CALLS = 8

ops = torch.ops.effk


class Layer:
    """Random weights in bf16 and packed, and the threshold of shifted_relu at which ``density`` of the neurons are active."""

    def __init__(self, d: int, f: int, gated: bool, rows: str, group: int) -> None:
        self.d, self.f, self.rows = d, f, rows
        self.plain = [torch.randn(f, d, device="cuda", dtype=torch.bfloat16) / d**0.5 for _ in range(3 if gated else 2)]
        packed = [ops.relu_ffn_pack(w, False, rows, group) for w in self.plain]
        packed = [(w, s if s.numel() else None) for w, s in packed]
        self.used = [ops.relu_ffn_unpack(w, s, rows, d) for w, s in packed]
        self.packed = packed if gated else [(None, None), *packed]
        self.down = self.plain[-1].T.contiguous()

    def threshold(self, x: torch.Tensor, density: float) -> torch.Tensor:
        g = x.float() @ self.used[0].T
        return g.flatten().sort().values[int((1 - density) * (g.numel() - 1))].reshape(1)

    def run(self, x: torch.Tensor, param: torch.Tensor, mode: str) -> tuple[torch.Tensor, torch.Tensor]:
        (wg, sg), (wu, su), (wd, sd) = self.packed
        return ops.relu_ffn(x, wg, wu, wd, sg, su, sd, *[None] * 3, self.rows, "shifted_relu", param, None, 1, mode)

    def torch(self, x: torch.Tensor, param: torch.Tensor) -> torch.Tensor:
        a = torch.relu(F.linear(x, self.plain[0]) - param.bfloat16())
        return F.linear(a * F.linear(x, self.plain[1]) if len(self.plain) == 3 else a, self.down)

    def match(self, x: torch.Tensor, param: torch.Tensor) -> float:
        y, w = self.run(x, param, "sparse")[0].double(), [u.double() for u in self.used]
        h = torch.relu(x.double() @ w[0].T - param.double())
        if len(w) == 3:
            h = h * (x.double() @ w[1].T)
        want = h @ w[-1]
        bound = 1e-5 * (h.abs() @ w[-1].abs()) + 1e-6
        return ((y - want).abs() / (bound + 2.0**-8 * (want.abs() + bound))).max().item()


def main() -> None:
    out, quick = Path(sys.argv[1]), "--quick" in sys.argv
    device, copy, rows = torch.cuda.get_device_name(), copy_gbps(), []
    for (d, f, gated), (kind, group) in ((s, r) for s in (SHAPES[:1] if quick else SHAPES) for r in ROWS):
        layer = Layer(d, f, gated, kind, group)
        for tokens, density in ((m, p) for m in (1, 8) for p in ((0.1,) if quick or m > 1 else DENSITIES)):
            xs = [torch.randn(tokens, d, device="cuda", dtype=torch.bfloat16) for _ in range(CALLS)]
            param = layer.threshold(torch.cat(xs), density)
            us, spread = time_us(lambda i: layer.run(xs[i], param, "sparse"), CALLS)  # noqa: B023
            dense, _ = time_us(lambda i: layer.run(xs[i], param, "dense"), CALLS)  # noqa: B023
            other, _ = time_us(lambda i: layer.torch(xs[i], param), CALLS)  # noqa: B023
            union = torch.stack([(x.float() @ layer.used[0].T > param).any(0).sum() for x in xs]).float().mean().item()
            moved = row_bytes(kind, d) * ((f if gated else 0) + (f if not gated else union) + union)
            row = {
                "op": "relu_ffn",
                "case": "sparse",
                "shape": {"M": tokens, "d": d, "f": f, "density": density, "gated": gated},
            }
            row |= {"dtype": kind, "isa": device, "threads": None, "backend": "effk", "version": torch.__version__}
            row |= {"us": round(us, 2), "us_iqr": round(spread, 2), "gbps": round(moved / us * 1e-3, 1), "gflops": None}
            row |= {"roofline": round(moved / us * 1e-3 / copy, 4), "vs_best": round(other / us, 3)}
            row |= {"vs_dense": round(dense / us, 3), "match": layer.match(xs[0], param)}
            rows.append(row)
            text = f"M {tokens} {d:5} {f:6} {'gated' if gated else 'plain':5} {kind:5} density {density:4} {us:8.1f} us"
            beside = f"own dense {dense:8.1f} us x{dense / us:.2f}  torch {other:8.1f} us x{other / us:.2f}"
            print(f"{text} {row['gbps']:7} GB/s  {beside}  error/bound {row['match']:.2f}", flush=True)
    out.write_text(json.dumps({"device": device, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
