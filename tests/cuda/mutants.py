"""Planted bugs: each must make the emulated driver fail in at least one order of threads.

A mutant is one edit of one file of the kernels, compiled in place of the original. `python tests/cuda/mutants.py` plants all
of them, with their names as arguments only those; test_mutants.py plants the ones marked `ci`. A mutant that no order
catches means that the emulation or the driver's cases are blind there: add what sees it, never drop the mutant.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1])]
from cuda_emulation import OP, ORDERS, ROOT, SANITIZE, Build, CompileError, missing, run  # noqa: E402

MMA, DECODE, CUDA = f"{OP}/cuda_mma.h", f"{OP}/cuda_decode.h", f"{OP}/cuda.cu"


@dataclass(frozen=True)
class Mutant:
    """``old``, which occurs once in ``file``, becomes ``new``."""

    name: str
    file: str
    old: str
    new: str
    bits: int = 4  # width of the kernels and cases that are run
    sanitized: bool = False  # reads or writes that only ASan and UBSan see for certain
    ci: bool = False

    @property
    def changed(self) -> list[str]:
        """The sources that contain the file."""
        kernels = f"{OP}/cuda_mma_{self.bits}.cu"
        return {MMA: [kernels], DECODE: [kernels, CUDA], CUDA: [CUDA]}[self.file]


MUTANTS = [
    # barriers and asynchronous copies
    Mutant("no barrier of the warp after its copies", MMA, "    __syncwarp();  // all lanes'", "    // all lanes'"),
    Mutant("wait one group too weak", MMA, "cp_async_wait<S::stages - 2>()", "cp_async_wait<S::stages - 1>()", ci=True),
    Mutant("one stage too few in use", MMA, "slot = slot == S::stages - 1 ? 0", "slot = slot == S::stages - 2 ? 0"),
    Mutant("copies into the stage that is being read", MMA, "ring + free_slot * stage_size", "ring + slot * stage_size", ci=True),
    Mutant("rings of neighbouring warps overlap", MMA, "rings + warp * S::stages * stage_size", "rings + warp * (S::stages - 1) * stage_size"),
    Mutant("no barrier after the lookup tables", MMA, "    __syncthreads();\n  }\n  // While", "  }\n  // While"),
    Mutant("no barrier before the sums replace the rings", MMA, "wait<0>();\n  __syncthreads();", "wait<0>();", ci=True),
    Mutant("no barrier before the reduction", MMA, "  __syncthreads();\n  for (int i = int(threadIdx.x); i < panel", "  for (int i = int(threadIdx.x); i < panel"),
    Mutant("no cluster barrier before peers are read", MMA, "  if (ranks > 1) ptx::cluster_sync();  // one", "  __syncthreads();  // one", ci=True),
    Mutant("block leaves while peers read its sums", MMA, "  if (ranks > 1) ptx::cluster_sync();  // peers", "  // peers"),
    Mutant("half of the block misses a barrier", MMA, "wait<0>();\n  __syncthreads();", "wait<0>();\n  if (warp % 2 == 0) __syncthreads();"),
    # who adds what
    Mutant("stages of a part end one early", MMA, "(part + 1) * stages / parts)", "(part + 1) * stages / parts) - (part + 1 < parts)"),
    Mutant("sums of the first warp dropped", MMA, "for (int w = 0; w < warps; ++w) sum +=", "for (int w = 1; w < warps; ++w) sum +="),
    Mutant("sums of the last rank dropped", MMA, "for (int q = 0; q < ranks; ++q)", "for (int q = 0; q < ranks - 1; ++q)"),
    Mutant("bias on the first rank only", MMA, "if (p.w.bias) sum +=", "if (p.w.bias && rank == 0) sum +="),
    Mutant("bias of every rank", MMA, "load_float(p.w.bias, p.w.bias_dtype, n)", "ranks * load_float(p.w.bias, p.w.bias_dtype, n)", ci=True),
    Mutant("outliers on the first rank only", MMA, "  if (p.w.out_ptr) sum_outliers", "  if (p.w.out_ptr && rank == 0) sum_outliers"),
    Mutant("outliers of a row end one early", MMA, "end = min(p.w.out_ptr[n + 1], p.outliers);", "end = min(p.w.out_ptr[n + 1], p.outliers) - 1;", ci=True),
    Mutant("shuffles start at distance 8", MMA, "int distance = 16; distance;", "int distance = 8; distance;"),
    Mutant("half a warp shuffles", MMA, "      for (int distance = 16;", "      if (lane < 16) for (int distance = 16;"),
    # guards and tails
    Mutant("row guard off by one", MMA, "if (n >= p.w.n) continue;", "if (n > p.w.n) continue;", sanitized=True),
    Mutant("token guard of the sums missing", MMA, "        if (token < p.m)\n          *reinterpret_cast<float2*>(sums", "          *reinterpret_cast<float2*>(sums", sanitized=True),
    Mutant("x beyond K not masked", MMA, "const int count = max(0, min(8, p.k - k));", "const int count = 8;", sanitized=True),
    Mutant("codes beyond the last chunk not masked", MMA, "from < p.tile_bytes && tile0", "tile0", sanitized=True),
    Mutant("tiles beyond N not masked", MMA, "p.tile_bytes && tile0 + tile < p.tiles;", "p.tile_bytes;", sanitized=True),
    Mutant("shared memory 64 bytes short", MMA, "plan.smem = smem(plan.warps);", "plan.smem = smem(plan.warps) - 64;", sanitized=True),
    Mutant("one panel short", MMA, "int(t16::ceil_div(p.tiles, S::tiles));", "std::max(1, p.tiles / S::tiles);"),
    Mutant("rows of x off alignment copied as if on it", CUDA, " && w.k % (kAlignment / 2) == 0;", ";"),
    Mutant("x off alignment copied as if on it", CUDA, "reinterpret_cast<uintptr_t>(x) % kAlignment == 0 && ", "", ci=True),
    # fragments, codes, scales
    Mutant("registers of a swapped", MMA, "{upper[0], lower[0], upper[1], lower[1]}", "{upper[0], upper[1], lower[0], lower[1]}", ci=True),
    Mutant("k of x paired as it lies", MMA, "b[c][0] = __byte_perm(v.x, v.y, 0x5410u);", "b[c][0] = v.x;"),
    Mutant("halves of the step swapped", MMA, "b[c][2 * half], b[c][2 * half + 1]", "b[c][2 - 2 * half], b[c][3 - 2 * half]"),
    Mutant("codes read without the exchange of address bits", MMA, "stage_offset<kBits>(unit * t16::kUnitBytes + 8 * g) - 8 * g", "unit * t16::kUnitBytes"),
    Mutant("scale of the next group", MMA, "const int first = stage * kStageK >> p.group_shift;", "const int first = min(p.groups - 1, (stage * kStageK >> p.group_shift) + 1);"),
    Mutant("scale of the stage's first group twice", MMA, "p.group_shift == 5 ? step : 0", "0", ci=True),
    Mutant("groups not kept apart", MMA, "(k_end & group_mask) == 0 || k_end >= stop", "k_end >= stop"),
    Mutant("last, short group not added", MMA, "(k_end & group_mask) == 0 || k_end >= stop", "(k_end & group_mask) == 0"),
    Mutant("zero point of the neighbouring row", MMA, "zero[1] = z[1];", "zero[1] = z[0];"),
    Mutant("symmetric zero point off by one", MMA, "zero[2] = {1u << (kBits - 1), 1u", "zero[2] = {(1u << (kBits - 1)) - 1u, 1u"),
    Mutant("zero point not shifted with the code", DECODE, "(zero << kShift)", "zero"),
    Mutant("remainder of codebook entries dropped", MMA, "            multiply(half, upper_rest, lower_rest);\n", ""),
    Mutant("codebook of the panel's first tile", MMA, "tile = tile0 + row / t16::kTileRows;", "tile = tile0;"),
    Mutant("wrong half of the byte, 2 bits", DECODE, "const int half = 4 * (t & 1);", "const int half = 4 * (t >> 1);", bits=2),
    Mutant("high bit of the next code, 3 bits", DECODE, "h0 = __funnelshift_r(h.x, h.x, 2 * t + 30)", "h0 = __funnelshift_r(h.x, h.x, 2 * t + 31)", bits=3, ci=True),
    Mutant("high bits of the other row, 3 bits", DECODE, "h1 = __funnelshift_r(h.y, h.y", "h1 = __funnelshift_r(h.x, h.x", bits=3),
    Mutant("wrong byte widened, 8 bits", DECODE, "0x7442u + first", "0x7441u + first", bits=8),
    # dequantisation
    Mutant("dequantise: row guard off by one", CUDA, "if (n >= w.n) continue;", "if (n > w.n) continue;", sanitized=True),
    Mutant("dequantise: wide stores to rows off alignment", CUDA, "k0 + 8 <= w.k && w.k % 8 == 0;", "k0 + 8 <= w.k;", sanitized=True),
    Mutant("dequantise: one group for all of K", CUDA, "group = w.group ? k0 / w.group : 0;", "group = 0;"),
    Mutant("dequantise: every 33rd outlier left out", CUDA, "j < end; j += 32) {", "j < end; j += 33) {"),
]  # fmt: skip


@cache
def originals(folder: Path, sanitized: bool) -> Build:
    """The unchanged objects."""
    return Build(folder / ("sanitized" if sanitized else "plain"), SANITIZE if sanitized else ())


def prepare(folder: Path, mutants: list[Mutant]) -> str:
    """Builds and runs what the mutants stem from; says what failed, or nothing."""
    for bits, sanitized in sorted({(m.bits, m.sanitized) for m in mutants}):
        program = originals(folder, sanitized).driver([bits])
        for order in ORDERS:
            if (result := run(program, bits, order=order)).returncode != 0:
                return f"without a planted bug, {bits} bits, order {order}:\n{result.stdout}{result.stderr}"
    return ""


def plant(folder: Path, mutant: Mutant) -> str:
    """How the mutant was caught, e.g. ``rev 7``; empty: it was not. ValueError: the edit no longer fits the source."""
    place = Path(tempfile.mkdtemp(dir=folder))
    try:
        text = (ROOT / mutant.file).read_text()
        if text.count(mutant.old) != 1:
            raise ValueError(
                f"{mutant.name}: the text to replace occurs {text.count(mutant.old)} times in {mutant.file}"
            )
        copy = place / mutant.file
        copy.parent.mkdir(parents=True)
        copy.write_text(text.replace(mutant.old, mutant.new))
        base = originals(folder, mutant.sanitized)
        program = Build(place, base.flags, base).driver([mutant.bits], mutant.changed)
        return " ".join(order for order in ORDERS if run(program, mutant.bits, order=order).returncode != 0)
    finally:
        shutil.rmtree(place)


def main(names: list[str]) -> int:
    """Plants the named mutants, or all, two at a time."""
    if reason := missing():
        sys.exit(f"mutants: {reason}")
    chosen = [m for m in MUTANTS if not names or m.name in names]
    if not chosen or len({m.name for m in MUTANTS}) != len(MUTANTS):
        sys.exit("mutants: no such name")
    with tempfile.TemporaryDirectory() as folder:
        if problem := prepare(Path(folder), chosen):
            sys.exit(f"mutants: {problem}")

        def report(mutant: Mutant) -> bool:
            try:
                caught = plant(Path(folder), mutant)
            except (ValueError, CompileError) as error:
                print(f"{mutant.name}: {error}", flush=True)
                return False
            print(f"{mutant.name:52} {'caught: ' + caught if caught else 'NOT CAUGHT'}", flush=True)
            return bool(caught)

        with ThreadPoolExecutor(2) as pool:
            results = list(pool.map(report, chosen))
    print(f"{sum(results)} of {len(results)} caught")
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
