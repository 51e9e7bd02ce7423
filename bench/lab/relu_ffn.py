"""`python bench/lab/relu_ffn.py`: what skipping neurons gains, and how fast rows are read. Weights come from memory.

Not a bench of the project's form yet: no competitors but torch's dense layers, no roofline of the run.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Annotated

import torch
import typer
from torch import Tensor

import effk  # noqa: F401  (registers the operations)

OPS = torch.ops.effk
DENSITIES = (0.05, 0.1, 0.2, 0.33, 0.5)
CACHE = 200e6  # bytes over which weights rotate at least


def median(call: Callable[[int], object], rounds: int = 14) -> float:
    """Seconds of the median call; the first two do not count."""
    times = []
    for i in range(rounds):
        start = time.perf_counter()
        call(i)
        times.append(time.perf_counter() - start)
    times = sorted(times[2:])
    return times[len(times) // 2]


def measure(d: int, f: int, rows: str, group: int) -> str:
    """One line of the table: dense path, densities, rows of down alone."""
    plain = torch.randn(f, d) * 0.02
    x, hidden = torch.randn(1, d), torch.randn(1, f)
    gates = (x @ plain.T)[0].sort().values

    def packed() -> tuple[Tensor, Tensor | None]:
        w, scales = OPS.relu_ffn_pack(plain, False, rows, group)
        return w, scales if scales.numel() else None

    first = packed()
    size = first[0].numel() + (0 if first[1] is None else 4 * first[1].numel())
    layers = [[packed() for _ in range(3)] for _ in range(max(2, round(CACHE / size / 3)))]

    def layer(i: int, threshold: float, mode: str) -> object:
        (wg, sg), (wu, su), (wd, sd) = layers[i % len(layers)]
        b = torch.tensor([threshold])
        return OPS.relu_ffn(x, wg, wu, wd, sg, su, sd, None, None, None, rows, "shifted_relu", b, None, 1, mode)

    def threshold(density: float) -> float:
        return float(gates[min(f - 1, int(f * (1 - density)))])

    dense = median(lambda i: layer(i, threshold(0.1), "dense"))
    gate = median(lambda i: layer(i, 1e9, "sparse"))
    gains = [(rho, dense / median(lambda i, rho=rho: layer(i, threshold(rho), "sparse"))) for rho in DENSITIES]
    down = []
    for rho in (1.0, 0.5, 0.1):
        cut = None if rho == 1 else hidden.abs().quantile(1 - rho).reshape(1)
        seconds = median(
            lambda i, cut=cut: OPS.input_sparse_linear(hidden, *layers[i % len(layers)][i % 3], None, cut, rows, d)
        )
        down.append(rho * size / seconds / 1e9)
    return (
        f"{rows:5} {d} x {f}: dense {dense * 1e3:.2f} ms, {3 * size / dense / 1e9:.1f} GB/s; gate {size / gate / 1e9:.1f} GB/s; "
        f"down, all / half / a tenth {' / '.join(f'{v:.1f}' for v in down)} GB/s; "
        + ", ".join(f"{rho}: {gain:.2f} x (model {3 / (1 + 2 * rho):.2f})" for rho, gain in gains)
    )


@torch.inference_mode()
def main(
    d: Annotated[int, typer.Option(help="Hidden size.")] = 4096,
    f: Annotated[int, typer.Option(help="Neurons.")] = 11008,
    threads: Annotated[int, typer.Option(help="Threads of torch.")] = 1,
) -> None:
    """Print a line for each type of rows, and the time of torch's dense bf16 layers."""
    torch.set_num_threads(threads)
    for rows, group in (("bf16", 0), ("int8", 0), ("int4", 32)):
        print(measure(d, f, rows, group), flush=True)
    x = torch.randn(1, d).bfloat16()
    layers = [[(torch.randn(n, k) * 0.02).bfloat16() for n, k in ((f, d), (f, d), (d, f))] for _ in range(2)]

    def dense(i: int) -> Tensor:
        wg, wu, wd = layers[i % 2]
        linear = torch.nn.functional.linear
        return linear(torch.relu(linear(x, wg)) * linear(x, wu), wd)

    print(f"torch bf16 dense {median(dense) * 1e3:.2f} ms")


if __name__ == "__main__":
    typer.run(main)
