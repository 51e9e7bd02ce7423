"""Times dyad_linear on a CUDA device against torch's dense linear (cuBLAS), two torch.bmm calls and our dense_linear.

Every comparison is like for like: one type on all sides, fp32 without TF32. Weights and activations stay in cache where
they fit, for everybody; calls are replayed from a graph. Forward rows carry their error over its bound (float64).

    python tools/gpu_bench_dyad.py OUTPUT.json [--quick]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from gpu_bench import time_us

import effk  # noqa: F401  (loads the ops)

SIDES = ((768, 3072), (3072, 768), (1024, 4096), (4096, 1024), (2048, 8192), (8192, 2048))  # f_in, f_out
TOKENS = (1, 16, 128, 512, 2048, 8192)
BLOCKS = (4, 8)
CHECKED_ROWS = 16
EPSILON = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}
NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


def match(y: torch.Tensor, x: torch.Tensor, dense: torch.Tensor, bias: torch.Tensor) -> float:
    """The largest error over its bound: fp32 sums of f_in products in any order, and one rounding."""
    rows, w = x[:CHECKED_ROWS].double(), dense.double()
    want, size = rows @ w.T + bias.double(), rows.abs() @ w.abs().T + bias.double().abs()
    bound = (dense.shape[1] + 8) * 2.0**-23 * size + EPSILON[y.dtype] * want.abs() + 2.0**-24
    return ((y[:CHECKED_ROWS].double() - want).abs() / bound).max().item()


def bmm(x: torch.Tensor, wl: torch.Tensor, wu: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Variant `it` as two batched products, as published."""
    n, d_out, d_in = wl.shape
    x1, x2 = x.view(-1, n, d_in).transpose(0, 1), x.view(-1, d_in, n).permute(2, 0, 1)
    y = torch.bmm(x1, wl.transpose(1, 2)) + torch.bmm(x2, wu.transpose(1, 2))
    return y.transpose(0, 1).reshape(-1, n * d_out) + bias


class Layer:
    def __init__(self, f_in: int, f_out: int, tokens: int, n: int, dtype: torch.dtype) -> None:
        d_in, d_out = f_in // n, f_out // n
        self.n, self.f_in, self.f_out, self.tokens, self.dtype = n, f_in, f_out, tokens, dtype
        self.x = torch.randn(tokens, f_in, device="cuda", dtype=dtype)
        self.gy = torch.randn(tokens, f_out, device="cuda", dtype=dtype)
        self.wl, self.wu = (torch.randn(n, d_out, d_in, device="cuda").div(f_in**0.5).to(dtype) for _ in range(2))
        self.w = torch.randn(f_out, f_in, device="cuda").div(f_in**0.5).to(dtype)
        self.bias = torch.randn(f_out, device="cuda", dtype=dtype)

    def row(self, case: str, ours, theirs, error: float | None, flops: float) -> dict[str, object]:
        count = 8 if self.tokens <= 512 else 3
        us, spread = time_us(ours, count)
        best = time_us(theirs, count)[0]
        name = str(self.dtype).removeprefix("torch.")
        shape = {"T": self.tokens, "d_in": self.f_in // self.n, "d_out": self.f_out // self.n, "n": self.n}
        row: dict[str, object] = {"op": "dyad_linear", "case": case, "shape": shape, "dtype": name}
        row |= {"isa": torch.cuda.get_device_name(), "threads": 0, "backend": "effk", "version": torch.__version__}
        row |= {"us": us, "us_iqr": spread, "gbps": None, "gflops": flops / us * 1e-3, "roofline": None}
        row |= {"vs_best": best / us, "match": error}
        text = "" if error is None else f" error/bound {error:.2f}"
        print(
            f"{case:24} {name:9} T {self.tokens:5} {self.f_in:5} -> {self.f_out:5} n {self.n}: {us:9.1f} us"
            f" {row['gflops'] / 1000:7.1f} Tflop/s, other {best:9.1f} us, x{best / us:.2f}{text}",
            flush=True,
        )
        return row


def measure(f_in: int, f_out: int, tokens: int, n: int, dtype: torch.dtype, backward: bool) -> list[dict[str, object]]:
    t, ops = Layer(f_in, f_out, tokens, n, dtype), torch.ops.effk
    flops = 4.0 * tokens * f_in * f_out / n
    packed, whole = ops.dyad_pack(t.wl, t.wu, "it", NAMES[dtype]), ops.dense_pack(t.w, NAMES[dtype])

    def forward(variant: str):
        return lambda _: ops.dyad_linear(t.x, t.wl, t.wu, t.bias, variant, "tokens", "none")

    def ours(_: int):
        return ops.dyad_linear_packed(t.x, packed, f_out, t.bias, "it", "tokens", "none")

    def library(_: int):
        return F.linear(t.x, t.w, t.bias)

    rows = [
        t.row(
            "it, dense cuBLAS", ours, library, match(ours(0), t.x, ops.dyad_to_dense(t.wl, t.wu, "it"), t.bias), flops
        )
    ]
    if n == BLOCKS[0]:
        own = lambda _: ops.dense_linear(t.x, whole, f_out, t.bias, "none")  # noqa: E731
        rows.append(t.row("our dense, dense cuBLAS", own, library, match(own(0), t.x, t.w, t.bias), flops * n / 2))
        for variant in ("ot", "dt"):
            error = match(forward(variant)(0), t.x, ops.dyad_to_dense(t.wl, t.wu, variant), t.bias)
            rows.append(t.row(f"{variant}, dense cuBLAS", forward(variant), library, error, flops))
        rows.append(t.row("it, two bmm", ours, lambda _: bmm(t.x, t.wl, t.wu, t.bias), None, flops))
    if backward:

        def step(_: int):
            ops.dyad_linear(t.x, t.wl, t.wu, t.bias, "it", "tokens", "none")
            ops.dyad_linear_backward(t.gy, t.x, t.wl, t.wu, "it", "tokens", [True] * 4)

        def dense_step(_: int):
            F.linear(t.x, t.w, t.bias)
            return t.gy @ t.w, t.gy.T @ t.x, t.gy.sum(0)

        rows.append(t.row("it step, dense cuBLAS", step, dense_step, None, 3 * flops))
    return rows


def main() -> None:
    quick = "--quick" in sys.argv
    torch.backends.cuda.matmul.allow_tf32 = False
    rows: list[dict[str, object]] = []
    for dtype in (torch.bfloat16,) if quick else (torch.bfloat16, torch.float16, torch.float32):
        for f_in, f_out in SIDES[4:] if quick or dtype != torch.bfloat16 else SIDES:
            for tokens in (1, 2048) if quick or dtype != torch.bfloat16 else TOKENS:
                for n in BLOCKS:
                    rows += measure(f_in, f_out, tokens, n, dtype, backward=tokens >= 512)
    Path(sys.argv[1]).write_text(json.dumps({"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
