"""Times fftconv on a CUDA device against torch.fft's route, with the filter's spectrum ready on both sides.

The published setting (fp16 rows, L = FFT size, pregate and postgate, B = 64, H = 768; fewer channels where that would
not fit, times scaled up), the causal one with n_fft = 2 L, and the backward pass. torch.fft's route casts to fp32,
because it has no fp16 transform of every size: gate, rfft, product, irfft, gate, cast. Calls are replayed from a graph.

    python tools/gpu_bench_fftconv.py OUTPUT.json [--quick]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from gpu_bench import time_us

from effk.ops import fftconv

SIZES = (256, 1024, 4096, 8192, 16384, 32768, 1 << 20, 1 << 21, 1 << 22)
BATCH, CHANNELS = 64, 768
PUBLISHED_MS = dict(zip(SIZES, (0.11, 0.29, 1.43, 3.58, 12.2, 26.3, 1768.9, 4623.5, 10049.4), strict=True))
ELEMENTS = 1 << 28  # of a tensor, at most: torch.fft's route needs five such arrays of fp32
BOUND = {torch.float16: 2e-3, torch.bfloat16: 6e-3, torch.float32: 1e-6}


def shape_of(length: int) -> tuple[int, int, float]:
    """B, H that fit, and what the time is to be multiplied by."""
    batch = min(BATCH, max(1, ELEMENTS // length // 16))
    channels = min(CHANNELS, max(1, ELEMENTS // length // batch))
    return batch, channels, BATCH * CHANNELS / (batch * channels)


def torch_route(u, spectrum, pre, post, n_fft):
    v = u.float() if pre is None else u.float() * pre.float()
    c = torch.fft.irfft(torch.fft.rfft(v, n_fft) * spectrum, n_fft)[..., : u.shape[-1]]
    return (c if post is None else c * post.float()).to(u.dtype)


def measure(length: int, mode: str, dtype: torch.dtype, case: str) -> dict[str, object]:
    batch, channels, scale = shape_of(length)
    n_fft = length if mode == "circular" else 2 * length
    gated = case != "ungated"
    u, pre, post, gy = (torch.randn(batch, channels, length, device="cuda", dtype=dtype) for _ in range(4))
    k = torch.randn(channels, length, device="cuda") / length**0.5
    spec, spectrum = torch.ops.effk.fftconv_prepare(k, n_fft, mode, "fft"), torch.fft.rfft(k, n_fft)
    gates = (pre, post) if gated else (None, None)
    if case == "backward":
        mask = [True, True, True, True, False]
        args = (n_fft, length, mode, "fft", mask)
        ours = lambda _: torch.ops.effk.fftconv_backward(gy, u, spec, *gates, None, *args)  # noqa: E731
        theirs = None
    else:
        ours = lambda _: torch.ops.effk.fftconv(u, spec, *gates, None, n_fft, mode, "fft")  # noqa: E731
        theirs = lambda _: torch_route(u, spectrum, *gates, n_fft)  # noqa: E731
    match = None
    if case != "backward":
        part = (slice(0, 2), slice(0, 2))
        cpu = [None if t is None else t[part].cpu() for t in (u, *gates)]
        want = fftconv.reference(cpu[0], k[:2].cpu(), *cpu[1:], mode=mode, method="fft")
        got = ours(0)[part].cpu().double()
        match = ((got - want).pow(2).mean().sqrt() / want.pow(2).mean().sqrt()).item() / BOUND[dtype]
    us, spread = time_us(ours, 1 if length > 65536 else 4)
    best = time_us(theirs, 1)[0] if theirs else None
    tensors = (2 + 2 * gated) if case != "backward" else 7
    gbps = tensors * u.numel() * u.element_size() / us * 1e-3
    shape = {"B": batch, "H": channels, "L": length, "n_fft": n_fft, "gated": gated}
    name = str(dtype).removeprefix("torch.")
    row: dict[str, object] = {"op": "fftconv", "case": f"{case} {mode}", "shape": shape, "dtype": name}
    row |= {"isa": torch.cuda.get_device_name(), "threads": 0, "backend": "effk", "version": ""}
    row |= {"us": us, "us_iqr": spread, "gbps": gbps, "gflops": None, "roofline": None}
    row |= {"vs_best": best / us if best else None, "match": match}
    text = f"{us / 1000 * scale:9.3f} ms at B 64 H 768"
    if mode == "circular" and dtype == torch.float16 and length in PUBLISHED_MS:
        text += f", published {PUBLISHED_MS[length]} ms"
    print(
        f"{case:9} {mode:9} {name:9} L {length:8} B {batch} H {channels}: {us:10.1f} us {gbps:6.0f} GB/s"
        f" x{row['vs_best'] or 0:.2f} error/bound {-1 if match is None else match:.2f} | {text}",
        flush=True,
    )
    return row


def main() -> None:
    quick = "--quick" in sys.argv
    cases = [
        ("gated", "circular", torch.float16),
        ("gated", "causal", torch.bfloat16),
        ("backward", "causal", torch.bfloat16),
    ]
    if not quick:
        cases += [("ungated", "causal", torch.float16), ("gated", "causal", torch.float32)]
    rows = [
        measure(length, mode, dtype, case)
        for case, mode, dtype in cases
        for length in (SIZES[:6] if quick else SIZES)
        if case == "gated" or length <= 1 << 20
    ]
    Path(sys.argv[1]).write_text(json.dumps({"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
