"""What this machine can do, measured in this run: read bandwidth by level, and fp32, bf16 and int8 peaks by ISA tier.

The micro-kernels are `lab/roofline.cpp`, compiled on first use with the system's C++ compiler (`CXX`, else g++) into
the user's cache folder. Every figure is for a stated number of threads, pinned to the first allowed cores.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import statistics
import subprocess
import tempfile
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path

import numpy as np

SOURCE = Path(__file__).parent / "lab" / "roofline.cpp"
TIERS = ("scalar", "avx2", "avx512", "avx512vnni")
MIN_ROTATION = 136 << 20  # bytes; four times the 32 MiB last-level cache of the machine it was chosen on, and a bit
HUGE_PAGE = 2 << 20
READ_STEP = 512  # read kernels take multiples of this
DRAM_PROBE = 64 << 20  # bytes per thread of one DRAM reading: 1.5 ms, long enough for a barrier not to count


class MissingCompiler(RuntimeError):
    """There is no C++ compiler to build the roofline kernels with."""


def cores(threads: int) -> list[int]:
    """The cores a run with `threads` threads is pinned to: the first allowed ones. ValueError if there are too few."""
    allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    if not 1 <= threads <= len(allowed):
        raise ValueError(f"threads: expected 1 to {len(allowed)} (cores this process may use), got {threads}")
    return allowed[:threads]


def cache_bytes(level: int) -> int:
    """Size of the data or unified cache of `level` seen by core 0 (Linux sysfs), 0 when unknown."""
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        if (index / "level").read_text().strip() == str(level) and (
            index / "type"
        ).read_text().strip() != "Instruction":
            text = (index / "size").read_text().strip()
            return int(text[:-1]) << {"K": 10, "M": 20, "G": 30}[text[-1]]
    return 0


def last_level_cache() -> int:
    """Bytes of the largest cache, or 0 when unknown."""
    return max(cache_bytes(level) for level in (1, 2, 3, 4))


def rotation_bytes() -> int:
    """Bytes of weights to rotate over, so that each is read from memory: 4x the last-level cache, at least 136 MiB."""
    return max(MIN_ROTATION, 4 * last_level_cache())


def copies(nbytes: int) -> int:
    """How many copies of a weight of `nbytes` make a rotation; at least two, so that none is read twice in a row."""
    return max(2, -(-rotation_bytes() // nbytes))


def cpu_name() -> str:
    """Model name of the processor."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


@cache
def library() -> ctypes.CDLL:
    """The compiled micro-kernels. MissingCompiler when there is nothing to build them with."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if not compiler:
        raise MissingCompiler("bench: a C++ compiler (g++) is needed to measure the roofline; found none on PATH")
    flags = ["-std=c++17", "-O3", "-shared", "-fPIC", "-pthread"]
    key = hashlib.sha256((compiler + " ".join(flags)).encode() + SOURCE.read_bytes()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "effk" / "bench"
    target = folder / f"roofline-{key}.so"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as tmp:
            built = Path(tmp) / target.name
            subprocess.run([compiler, *flags, str(SOURCE), "-o", str(built)], check=True)
            os.replace(built, target)
    lib = ctypes.CDLL(str(target))
    lib.roofline_what.restype = lib.roofline_isa.restype = ctypes.c_char_p
    lib.roofline_run.restype = ctypes.c_double
    lib.roofline_run.argtypes = [
        ctypes.c_int,
        ctypes.c_int,
        ctypes.POINTER(ctypes.c_int),
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_size_t,
        ctypes.c_long,
        ctypes.POINTER(ctypes.c_double),
    ]
    return lib


@cache
def kernels() -> dict[tuple[str, str], int]:
    """(what, tier) -> number of each micro-kernel this CPU can run."""
    lib = library()
    return {
        (lib.roofline_what(i).decode(), lib.roofline_isa(i).decode()): i
        for i in range(lib.roofline_kernels())
        if lib.roofline_supported(i)
    }


def run(
    what: str, tier: str, cpus: list[int], buffer: np.ndarray | None, nbytes: int, reps: int
) -> tuple[float, float]:
    """One run of a micro-kernel on pinned threads: (seconds, bytes read or operations done by all threads together)."""
    units = ctypes.c_double()
    address = buffer.ctypes.data if buffer is not None else None
    stride = buffer.nbytes // len(cpus) // READ_STEP * READ_STEP if buffer is not None else 0
    seconds = library().roofline_run(
        kernels()[what, tier],
        len(cpus),
        (ctypes.c_int * len(cpus))(*cpus),
        address,
        stride,
        nbytes // READ_STEP * READ_STEP,
        reps,
        ctypes.byref(units),
    )
    return seconds, units.value


def best_tier(what: str, at_most: str = TIERS[-1]) -> str:
    """The highest tier up to `at_most` that has a kernel for `what` on this CPU; "" when none has."""
    usable = [t for t in TIERS[: TIERS.index(at_most) + 1] if (what, t) in kernels()]
    return usable[-1] if usable else ""


def aligned(shape: tuple[int, ...]) -> np.ndarray:
    """A touched byte array on huge pages where the system has them (NumPy asks for them from 4 MiB on)."""
    raw = np.ones(int(np.prod(shape)) + 2 * HUGE_PAGE, np.uint8)
    start = -raw.ctypes.data % HUGE_PAGE
    return raw[start : start + int(np.prod(shape))].reshape(shape)


class DramProbe:
    """Reads a window of a large buffer on every thread; used by itself and, in the tables, between the other rows."""

    def __init__(self, threads: int) -> None:
        self.cpus = cores(threads)
        self.tier = best_tier("read")
        windows = max(2, -(-2 * rotation_bytes() // (DRAM_PROBE * threads)))
        self.buffer = aligned((windows, threads, DRAM_PROBE))
        self.next = 0

    def read(self) -> float:
        """GB/s of reading the next window."""
        self.next = (self.next + 1) % len(self.buffer)
        seconds, nbytes = run("read", self.tier, self.cpus, self.buffer[self.next], DRAM_PROBE, 1)
        return nbytes / seconds / 1e9


@dataclass
class Machine:
    """Measured limits of this machine for `threads` threads; medians. GB/s and GFLOP/s (a multiply-add is two)."""

    threads: int
    cpu: str = ""
    llc_bytes: int = 0
    rotation_bytes: int = 0
    dram_gbps: float = 0.0
    dram_gbps_best: float = 0.0
    cache_gbps: dict[str, float] = field(default_factory=dict)  # "L1", "L2", "L3": half the cache's size per thread
    peaks: dict[str, dict[str, float]] = field(default_factory=dict)  # "fp32" | "int8" | "bf16" -> tier -> GFLOP/s

    def peak(self, what: str, tier: str) -> float:
        """Peak of `what` at `tier` or, where it adds no instruction for it, at the next lower one; "native": at the highest."""
        last = TIERS.index(tier if tier in TIERS else TIERS[-1])
        usable = [t for t in TIERS[: last + 1] if t in self.peaks.get(what, {})]
        return self.peaks[what][usable[-1]] if usable else 0.0

    def to_json(self) -> dict:
        """A plain dict."""
        return asdict(self)


def measure(threads: int, repeats: int = 9) -> Machine:
    """Measures everything for `threads` threads, in about two seconds."""
    cpus = cores(threads)
    probe = DramProbe(threads)
    dram = [probe.read() for _ in range(repeats * 3)]
    machine = Machine(threads, cpu_name(), last_level_cache(), rotation_bytes(), statistics.median(dram), max(dram))
    shares = {"L1": cache_bytes(1) // 2, "L2": cache_bytes(2) // 2, "L3": cache_bytes(3) // 4 // threads}
    for name, share in shares.items():
        if share >= READ_STEP:
            buffer = aligned((share // READ_STEP * READ_STEP * threads,))
            reps = max(1, (64 << 20) // share)
            machine.cache_gbps[name] = median_rate("read", probe.tier, cpus, buffer, share, reps, repeats)
    for what, tier in kernels():
        if what != "read":
            rate = median_rate(what, tier, cpus, None, 0, 1_000_000, repeats)
            machine.peaks.setdefault(what, {})[tier] = rate
    return machine


def median_rate(
    what: str, tier: str, cpus: list[int], buffer: np.ndarray | None, nbytes: int, reps: int, repeats: int
) -> float:
    """Median of `repeats` runs in 1e9 units per second; one run before them is not counted."""
    runs = [run(what, tier, cpus, buffer, nbytes, reps) for _ in range(repeats + 1)][1:]
    return statistics.median(units / seconds for seconds, units in runs) / 1e9
