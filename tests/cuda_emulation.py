"""Programs of tests/cuda compiled for the CPU with the emulation of csrc/emu; shared by the tests and commands there.

Needs g++ and the headers of the CUDA toolkit, not a GPU.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ORDERS = ("fwd", "rev", "7")  # of lanes, warps and blocks: see csrc/emu/cuemu.h
WIDTHS = (2, 3, 4, 8)
SANITIZE = ("-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")
OP = "csrc/ops/wq_linear"
FFTCONV = "csrc/ops/fftconv"
DENSE, DYAD = "csrc/ops/dense_linear", "csrc/ops/dyad_linear"
DYAD_KERNELS = [
    *(f"{DENSE}/{name}.cu" for name in ("cuda", "cuda_ffma", "cuda_mma_f16", "cuda_mma_bf16")),
    f"{DYAD}/cuda.cu",
]
QUIK = "csrc/ops/quik_linear"
QUIK_KERNELS = [f"{QUIK}/{name}.cu" for name in ("cuda", "cuda_float", "cuda_mma_w8", "cuda_mma_w4", "cuda_mma_int4")]
RELU = "csrc/ops/relu_ffn"
RELU_KERNELS = [f"{RELU}/{name}.cu" for name in ("cuda", "cuda_f32", "cuda_bf16", "cuda_f16", "cuda_i8", "cuda_i4")]
BITMASK = "csrc/ops/bitmask_linear"
TIME_LIMIT_S = 120  # of one run of a program: a kernel that hangs is a failure


class CompileError(Exception):
    """The compiler refused a file; the message is what it said."""


def nvcc() -> str | None:
    """The CUDA compiler, also where CMake is told of it or finds it by itself."""
    return os.environ.get("CUDACXX") or shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def missing() -> str | None:
    """Why programs cannot be built here, or None."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return "the emulation switches stacks in x86-64 assembly"
    if shutil.which("g++") is None:
        return "g++ was not found"
    return None if nvcc() else "nvcc was not found: the emulation uses the headers of the CUDA toolkit"


def headers() -> list[str]:
    """Include options of the CUDA toolkit, as nvcc itself would pass them."""
    said = subprocess.run([nvcc(), "--dryrun", "none.cu"], capture_output=True, text=True).stderr
    return [word for path in re.findall(r'INCLUDES="-I(.+?)"', said) for word in ("-isystem", path)]


class Build:
    """Compiles into a folder and remembers what is there."""

    def __init__(self, folder: Path, flags: Sequence[str] = (), base: Build | None = None) -> None:
        """``base``: a build with the same flags whose objects are used for what this one does not compile anew."""
        self.folder, self.flags, self.base = folder, flags, base
        self.headers = base.headers if base else headers()
        folder.mkdir(parents=True, exist_ok=True)

    def object(self, source: str, *, anew: bool = False) -> Path:
        """Object file of a source of the repository; a copy of the source or of its headers under this build's folder
        takes precedence when it is compiled ``anew``."""
        if self.base and not anew:
            return self.base.object(source)
        target = self.folder / (source.replace("/", "_") + ".o")
        if not anew and target.exists():
            return target
        copy = self.folder / source
        command = [
            "g++",
            "-std=c++17",
            "-O1",
            *self.flags,
            "-DEFFK_CUEMU",
            "-fno-strict-aliasing",
            "-Wno-unknown-pragmas",
        ]
        command += [f"-I{self.folder / 'csrc'}", f"-I{ROOT / 'csrc'}", *self.headers, "-x", "c++", "-c"]
        run = subprocess.run(
            [*command, str(copy if copy.exists() else ROOT / source), "-o", str(target)], capture_output=True, text=True
        )
        if run.returncode != 0:
            raise CompileError(f"{source}:\n{run.stderr[-2000:]}")
        return target

    def driver(self, widths: Iterable[int], changed: Iterable[str] = ()) -> Path:
        """tests/cuda/driver.cpp with the kernels of some widths; ``changed`` files are compiled anew.

        The other widths' kernels are left undefined, which saves most of the time: only cases of ``widths`` may run.
        """
        sources = [f"{OP}/cuda.cu", *(f"{OP}/cuda_mma_{bits}.cu" for bits in widths)]
        sources += [f"{OP}/pack.cpp", "csrc/emu/cuemu.cpp", "tests/cuda/driver.cpp"]
        changed = set(changed)
        objects = [self.object(source, anew=source in changed) for source in sources]
        return self.link("driver", objects)

    def fftconv_driver(self, changed: Iterable[str] = ()) -> Path:
        """tests/cuda/driver_fftconv.cpp; ``changed`` files are compiled anew."""
        sources = [f"{FFTCONV}/{name}.cu" for name in ("cuda", "cuda_mma_small", "cuda_mma_large")]
        sources += ["csrc/emu/cuemu.cpp", "tests/cuda/driver_fftconv.cpp"]
        changed = set(changed)
        return self.link("driver_fftconv", [self.object(source, anew=source in changed) for source in sources])

    def dyad_driver(self, changed: Iterable[str] = ()) -> Path:
        """tests/cuda/driver_dyad.cpp; ``changed`` files are compiled anew."""
        sources = [*DYAD_KERNELS, "csrc/emu/cuemu.cpp", "tests/cuda/driver_dyad.cpp"]
        changed = set(changed)
        return self.link("driver_dyad", [self.object(source, anew=source in changed) for source in sources])

    def quik_driver(self, changed: Iterable[str] = ()) -> Path:
        """tests/cuda/driver_quik.cpp; ``changed`` files are compiled anew."""
        sources = [*QUIK_KERNELS, "csrc/emu/cuemu.cpp", "tests/cuda/driver_quik.cpp"]
        changed = set(changed)
        return self.link("driver_quik", [self.object(source, anew=source in changed) for source in sources])

    def relu_driver(self, changed: Iterable[str] = ()) -> Path:
        """tests/cuda/driver_relu.cpp; ``changed`` files are compiled anew."""
        sources = [*RELU_KERNELS, "csrc/emu/cuemu.cpp", "tests/cuda/driver_relu.cpp"]
        changed = set(changed)
        return self.link("driver_relu", [self.object(source, anew=source in changed) for source in sources])

    def bitmask_driver(self, changed: Iterable[str] = ()) -> Path:
        """tests/cuda/driver_bitmask.cpp; ``changed`` files are compiled anew."""
        sources = [f"{BITMASK}/cuda.cu", "csrc/emu/cuemu.cpp", "tests/cuda/driver_bitmask.cpp"]
        changed = set(changed)
        return self.link("driver_bitmask", [self.object(source, anew=source in changed) for source in sources])

    def program(self, source: str) -> Path:
        """A program of one file and the emulation."""
        return self.link(Path(source).stem, [self.object(source), self.object("csrc/emu/cuemu.cpp")])

    def link(self, name: str, objects: Sequence[Path]) -> Path:
        target = self.folder / name
        undefined = ["-no-pie", "-Wl,--unresolved-symbols=ignore-in-object-files"]
        command = ["g++", *self.flags, *undefined, *map(str, objects), "-o", str(target)]
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode != 0:
            raise CompileError(run.stderr[-2000:])
        return target


def run(program: Path, *arguments: object, order: str = "fwd") -> subprocess.CompletedProcess[str]:
    """Output and exit status of an emulated program; 124 where it ran into the time limit.

    Leaks are not looked for: what the emulated threads hold lives on stacks that the sanitizer does not search.
    """
    env = dict(os.environ, CUEMU_ORDER=order, ASAN_OPTIONS="detect_leaks=0")
    command = [str(program), *map(str, arguments)]
    try:
        return subprocess.run(command, capture_output=True, text=True, errors="replace", env=env, timeout=TIME_LIMIT_S)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 124, "", f"longer than {TIME_LIMIT_S} s")
