"""Builds, tests and measures the CUDA half of effk on a machine with an NVIDIA GPU; ``make gpu-check`` runs it.

Needs nvcc, CMake, Ninja, pybind11, a CUDA build of torch 2.11 or later and pytest, and no network. It installs nothing:
the package is assembled under build/gpu. Every step has a time limit, all of them together stay below nine minutes, and
a step that fails does not stop the later ones.

    python tools/gpu_check.py [--out FOLDER] [--lab] [--skip STEP ...]

Writes to FOLDER (default build/gpu/results): report.txt, report.json, bench.json, primitives.txt (what the GPU's
instructions returned: to be committed as tests/cuda/golden/<gpu>.txt), and the logs of the steps.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from contextlib import nullcontext
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "gpu"
PACKAGE = BUILD / "package"
LIMIT_S = 520  # of everything; the rest of nine minutes is for starting Python and for a step that ends late


class Check:
    """Runs steps, keeps their logs and verdicts."""

    def __init__(self, out: Path, skip: list[str]) -> None:
        self.out, self.skip, self.start = out, skip, time.monotonic()
        self.steps: list[dict[str, object]] = []
        self.env = dict(
            os.environ,
            PYTHONPATH=str(PACKAGE),
            PYTHONUNBUFFERED="1",
            EFFK_TEST_GPU_ONLY="1",
            EFFK_TEST_PTXAS=str(BUILD / "cmake"),
            EFFK_TEST_PRIMITIVES=str(out / "primitives.txt"),
        )
        if "CUDACXX" not in self.env and shutil.which("nvcc") is None:
            self.env["CUDACXX"] = "/usr/local/cuda/bin/nvcc"
        self.nvcc = self.env.get("CUDACXX", "nvcc")

    def run(self, name: str, commands: list[list[str]], limit: float, *, stdout: Path | None = None) -> bool:
        """One step: commands in order until one fails. Its log is FOLDER/<name>.log."""
        left = LIMIT_S - (time.monotonic() - self.start)
        if name in self.skip or left < 5:
            return self._done(name, "skipped" if name in self.skip else "no time left", 0.0)
        began, verdict = time.monotonic(), "ok"
        with open(self.out / f"{name}.log", "w") as log:
            for command in commands:
                try:
                    allowed = min(limit - (time.monotonic() - began), LIMIT_S - (time.monotonic() - self.start))
                    with open(stdout, "w") if stdout else nullcontext(log) as file:
                        code = subprocess.run(
                            command, stdout=file, stderr=log, env=self.env, cwd=ROOT, timeout=allowed
                        ).returncode
                except subprocess.TimeoutExpired:
                    verdict = "time limit"
                    break
                except OSError as error:
                    verdict = f"failed: {error}"
                    break
                if code:
                    verdict = f"failed with exit status {code}"
                    break
        return self._done(name, verdict, time.monotonic() - began)

    def _done(self, name: str, verdict: str, seconds: float) -> bool:
        self.steps.append({"step": name, "verdict": verdict, "seconds": round(seconds, 1)})
        print(f"{name:22} {verdict:28} {seconds:6.1f} s", flush=True)
        return verdict == "ok"

    def tail(self, name: str, lines: int) -> str:
        path = self.out / f"{name}.log"
        return "\n".join(path.read_text(errors="replace").splitlines()[-lines:]) if path.exists() else ""


def folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise SystemExit(f"gpu-check: the Python package {package} is needed and not installed")
    return Path(spec.origin).parent


def assemble_package(version: str) -> None:
    """python/effk and its metadata under build/gpu/package; the build adds the libraries."""
    shutil.rmtree(PACKAGE, ignore_errors=True)
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "python" / "effk", PACKAGE / "effk", ignore=ignored)
    info = PACKAGE / f"effk-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: effk\nVersion: {version}\n")


def architectures() -> str:
    """Of the first GPU, unless the environment says otherwise."""
    import torch

    major, minor = torch.cuda.get_device_capability()
    return os.environ.get("EFFK_CUDA_ARCHS", "90a-real" if (major, minor) == (9, 0) else f"{major}{minor}-real")


def build_commands(version: str) -> list[list[str]]:
    definitions = {
        "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_INSTALL_PREFIX": PACKAGE,
        "EFFK_VERSION": version,
        "EFFK_CUDA": "ON",
        "EFFK_CUDA_ARCHS": architectures(),
        "Python_EXECUTABLE": sys.executable,
        "TORCH_DIR": folder("torch"),
        "pybind11_DIR": folder("pybind11") / "share" / "cmake" / "pybind11",
    }
    cmake = BUILD / "cmake"
    program = shutil.which("cmake", path=str(Path(sys.executable).parent)) or "cmake"
    if ninja := shutil.which("ninja", path=str(Path(sys.executable).parent)):
        definitions["CMAKE_MAKE_PROGRAM"] = ninja
    return [
        [program, "-S", str(ROOT), "-B", str(cmake), "-G", "Ninja", *(f"-D{k}={v}" for k, v in definitions.items())],
        [program, "--build", str(cmake), "--parallel", str(os.cpu_count())],
        [program, "--install", str(cmake)],
    ]


def nvcc(check: Check, output: str, *sources: str, libraries: list[str] | None = None) -> list[str]:
    arch = architectures().split(";")[0].removesuffix("-real")
    return [
        check.nvcc,
        "-O3",
        "-std=c++17",
        "--expt-relaxed-constexpr",
        f"-gencode=arch=compute_{arch},code=sm_{arch}",
        "-lineinfo",
        f"-I{ROOT}/csrc",
        "-o",
        str(BUILD / output),
        *(str(ROOT / s) for s in [*sources, *(libraries or [])]),
    ]


def unfit() -> str | None:
    """Why this machine cannot run the check, or None."""
    if importlib.util.find_spec("torch") is None:
        return f"{sys.executable} has no torch: install a CUDA build of torch 2.11 or later, or pass PYTHON=... to make"
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA: install a CUDA build of torch 2.11 or later"
    if not torch.cuda.is_available():
        return "torch sees no NVIDIA GPU"
    if not (os.environ.get("CUDACXX") or shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")):
        return "nvcc was not found: put it on PATH or set CUDACXX"
    return None


def describe(primitives: Path, info: dict[str, object]) -> None:
    """Puts the machine above the recorded words, as tests/cuda/test_primitives.py expects it."""
    if primitives.exists():
        primitives.write_text(f"# {info['gpu']} · {info['driver']} · {info['date']}\n{primitives.read_text()}")


def machine() -> dict[str, object]:
    import torch

    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    smi = "nvidia-smi not found"
    if shutil.which(query[0]):
        smi = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    return {
        "date": date.today().isoformat(),
        "gpu": torch.cuda.get_device_name(),
        "driver": smi,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "sms": torch.cuda.get_device_properties(0).multi_processor_count,
    }


def bars(bench: dict[str, object]) -> list[str]:
    """The speeds that this op promises, checked on the measured rows: lines for the report."""
    rows = [r for r in bench["rows"] if r["backend"] == "effk" and r["dtype"] == "float16" and r["case"] == "float"]
    at = {(r["shape"]["N"], r["shape"]["K"], r["shape"]["bits"], r["shape"]["M"]): r for r in rows}
    lines = []

    def line(ok: bool, text: str) -> None:
        lines.append(f"{'met   ' if ok else 'MISSED'}  {text}")

    for n, k in ((8192, 8192), (4096, 14336)):
        if row := at.get((n, k, 4, 1)):
            line(row["roofline"] >= 0.85, f"M 1, 4 bits, {n}x{k}: {row['roofline']:.1%} of the device copy, bar 85 %")
        times = [at[n, k, b, 1]["us"] for b in (2, 3, 4) if (n, k, b, 1) in at]
        if len(times) == 3:
            text = " < ".join(f"{t:.2f}" for t in times)
            line(times[0] < times[1] < times[2], f"{n}x{k}: time at 2, 3, 4 bits: {text} us")
        if row := at.get((n, k, 4, 16)):
            line(row["vs_best"] >= 3.2, f"M 16, 4 bits, {n}x{k}: {row['vs_best']:.2f} times cuBLAS fp16, bar 3.2")
    for key, row in sorted(at.items()):
        if row["vs_best"] < 1.0:
            n, k, bits, m = key
            line(False, f"slower than cuBLAS fp16: {row['vs_best']:.2f} times at {n}x{k}, {bits} bits, M {m}")
    if all(r["vs_best"] >= 1.0 for r in rows):
        line(True, "never slower than cuBLAS fp16")
    worst = max((r["match"] for r in bench["rows"] if r["match"] is not None), default=0.0)
    line(worst <= 1.0, f"largest error over its bound: {worst:.3f}")
    return lines


# Of torch.fft's route, in the published setting (gated, fp16, L = FFT size): this and a filter of that length.
FFTCONV_BARS = {
    256: 5.0,
    1024: 7.93,
    4096: 5.0,
    8192: 5.0,
    16384: 2.5,
    32768: 2.5,
    1 << 20: 1.4,
    1 << 21: 1.4,
    1 << 22: 1.4,
}


def fftconv_bars(bench: dict[str, object]) -> list[str]:
    """The same for fftconv."""
    lines = []
    for row in bench["rows"]:
        bar = FFTCONV_BARS.get(row["shape"]["L"])
        if row["case"] == "gated circular" and row["dtype"] == "float16" and bar:
            verdict = "met   " if row["vs_best"] >= bar else "MISSED"
            lines.append(f"{verdict}  fftconv, L {row['shape']['L']}: {row['vs_best']:.2f} times torch.fft, bar {bar}")
    worst = max((r["match"] for r in bench["rows"] if r["match"] is not None), default=0.0)
    lines.append(f"{'met   ' if worst <= 1.0 else 'MISSED'}  fftconv, largest error over its bound: {worst:.3f}")
    return lines


def dyad_bars(bench: dict[str, object]) -> list[str]:
    """The same for dyad_linear: n = 4 against dense cuBLAS, like for like, where there is work enough."""
    lines = []
    for row in bench["rows"]:
        s = row["shape"]
        large = s["T"] >= 2048 and {s["n"] * s["d_in"], s["n"] * s["d_out"]} == {2048, 8192}
        if large and s["n"] == 4 and row["case"] == "it, dense cuBLAS" and row["dtype"] != "float32":
            verdict = "met   " if row["vs_best"] >= 1.5 else "MISSED"
            shape = f"T {s['T']}, {s['n'] * s['d_in']} -> {s['n'] * s['d_out']}, n 4, {row['dtype']}"
            lines.append(f"{verdict}  dyad_linear, {shape}: {row['vs_best']:.2f} times dense cuBLAS, bar 1.5")
    worst = max((r["match"] for r in bench["rows"] if r["match"] is not None), default=0.0)
    lines.append(f"{'met   ' if worst <= 1.0 else 'MISSED'}  dyad_linear, largest error over its bound: {worst:.3f}")
    return lines


# Of the fused layer over cuBLAS fp16 at 2048 rows, 8192 x 8192; the quantiser over its steps in torch.
QUIK_BAR, QUANTIZE_BAR = 1.6, 1.3


def quik_bars(bench: dict[str, object]) -> list[str]:
    """The same for quik_linear."""
    lines = []
    for row in bench["rows"]:
        s = row["shape"]
        text = (
            f"W{s['bits_w']}A{s['bits_a']}, M {s['M']}, {s['N']}x{s['K']}, {s['outliers']} outliers: {row['vs_best']}"
        )
        if row["case"] == "fused, fp16 cuBLAS" and (s["M"], s["N"], s["K"], s["bits_a"]) == (2048, 8192, 8192, 8):
            verdict = "met   " if row["vs_best"] >= QUIK_BAR else "MISSED"
            lines.append(f"{verdict}  quik_linear, {text} times cuBLAS fp16, bar {QUIK_BAR}")
        if row["case"].startswith("quantize") and s["N"] == s["K"] == 8192 and s["outliers"]:
            verdict = "met   " if row["vs_best"] >= QUANTIZE_BAR else "MISSED"
            lines.append(f"{verdict}  quik_quantize, {text} times the steps in torch, bar {QUANTIZE_BAR}")
    worst = max((r["match"] for r in bench["rows"] if r["match"] is not None), default=0.0)
    lines.append(f"{'met   ' if worst <= 1.0 else 'MISSED'}  quik_linear, largest error over its bound: {worst:.3f}")
    return lines


# Of the sparse layer over torch's dense one and over its own dense path: a tenth of the neurons, bf16, 4096 x 11008 gated.
RELU_BAR = 2.0


def relu_bars(bench: dict[str, object]) -> list[str]:
    """The same for relu_ffn."""
    lines = []
    for row in bench["rows"]:
        s = row["shape"]
        if (s["M"], s["d"], s["f"], s["density"], row["dtype"]) == (1, 4096, 11008, 0.1, "bf16"):
            verdict = "met   " if min(row["vs_best"], row["vs_dense"]) >= RELU_BAR else "MISSED"
            text = f"{row['vs_best']} times torch's dense layer, {row['vs_dense']} times its own"
            lines.append(f"{verdict}  relu_ffn, density 0.1, 4096 x 11008, bf16: {text}, bar {RELU_BAR}")
    worst = max((r["match"] for r in bench["rows"] if r["match"] is not None), default=0.0)
    lines.append(f"{'met   ' if worst <= 1.0 else 'MISSED'}  relu_ffn, largest error over its bound: {worst:.3f}")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=BUILD / "results", help="folder for the results")
    parser.add_argument("--lab", action="store_true", help="also time kernel variants (bench/lab)")
    parser.add_argument("--quick", action="store_true", help="a shorter bench")
    parser.add_argument("--skip", nargs="*", default=[], help="steps to leave out")
    args = parser.parse_args()

    if reason := unfit():
        raise SystemExit(f"gpu-check: {reason}; nothing was checked. What needs no GPU is tested by make test.")
    args.out.mkdir(parents=True, exist_ok=True)
    args.out = args.out.resolve()
    BUILD.mkdir(parents=True, exist_ok=True)
    info = machine()
    print(" · ".join(f"{k} {v}" for k, v in info.items()), flush=True)
    check = Check(args.out, args.skip)
    version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    assemble_package(version)
    kernels = str((BUILD / "cmake" / "libeffk_cuda.a").relative_to(ROOT))

    check.run("build", build_commands(version), 240)
    check.run(
        "build_driver",
        [nvcc(check, "driver", "tests/cuda/driver.cpp", "csrc/ops/wq_linear/pack.cpp", libraries=[kernels])],
        120,
    )
    check.run(
        "build_driver_fftconv",
        [nvcc(check, "driver_fftconv", "tests/cuda/driver_fftconv.cpp", libraries=[kernels])],
        120,
    )
    check.run("build_driver_dyad", [nvcc(check, "driver_dyad", "tests/cuda/driver_dyad.cpp", libraries=[kernels])], 120)
    check.run("build_driver_quik", [nvcc(check, "driver_quik", "tests/cuda/driver_quik.cpp", libraries=[kernels])], 120)
    check.run("build_driver_relu", [nvcc(check, "driver_relu", "tests/cuda/driver_relu.cpp", libraries=[kernels])], 120)
    check.run(
        "build_driver_bitmask",
        [nvcc(check, "driver_bitmask", "tests/cuda/driver_bitmask.cpp", libraries=[kernels])],
        120,
    )
    check.run(
        "primitives",
        [nvcc(check, "primitives", "tests/cuda/primitives.cu"), [str(BUILD / "primitives")]],
        60,
        stdout=args.out / "primitives.txt",
    )
    describe(args.out / "primitives.txt", info)
    check.run("driver", [[str(BUILD / "driver")]], 60)
    check.run("driver_fftconv", [[str(BUILD / "driver_fftconv")]], 60)
    check.run("driver_dyad", [[str(BUILD / "driver_dyad"), "large"]], 60)
    check.run("driver_quik", [[str(BUILD / "driver_quik")]], 60)
    check.run("driver_relu", [[str(BUILD / "driver_relu")]], 60)
    check.run("driver_bitmask", [[str(BUILD / "driver_bitmask")]], 60)
    if args.lab:
        check.run("lab", [nvcc(check, "lab", "bench/lab/cuda_wq_linear.cu"), [str(BUILD / "lab")]], 150)
        lab = nvcc(check, "lab_fftconv", "bench/lab/cuda_fftconv.cu", libraries=[kernels])
        check.run("lab_fftconv", [lab, [str(BUILD / "lab_fftconv")]], 120)
        lab = nvcc(check, "lab_relu_ffn", "bench/lab/cuda_relu_ffn.cu", libraries=[kernels])
        check.run("lab_relu_ffn", [lab, [str(BUILD / "lab_relu_ffn")]], 120)
    check.run("tests", [[sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/cuda"]], 120)
    bench_ok = check.run(
        "bench",
        [[sys.executable, "tools/gpu_bench.py", str(args.out / "bench.json"), *(["--quick"] if args.quick else [])]],
        180,
    )
    fftconv_ok = check.run(
        "bench_fftconv",
        [
            [
                sys.executable,
                "tools/gpu_bench_fftconv.py",
                str(args.out / "bench_fftconv.json"),
                *(["--quick"] if args.quick else []),
            ]
        ],
        120,
    )
    dyad_ok = check.run(
        "bench_dyad",
        [
            [
                sys.executable,
                "tools/gpu_bench_dyad.py",
                str(args.out / "bench_dyad.json"),
                *(["--quick"] if args.quick else []),
            ]
        ],
        120,
    )
    quik_ok = check.run(
        "bench_quik",
        [
            [
                sys.executable,
                "tools/gpu_bench_quik.py",
                str(args.out / "bench_quik.json"),
                *(["--quick"] if args.quick else []),
            ]
        ],
        120,
    )
    relu_ok = check.run(
        "bench_relu",
        [
            [
                sys.executable,
                "tools/gpu_bench_relu.py",
                str(args.out / "bench_relu.json"),
                *(["--quick"] if args.quick else []),
            ]
        ],
        120,
    )
    if sanitizer := shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer"):
        for tool in ("memcheck", "racecheck", "synccheck", "initcheck"):
            check.run(
                f"sanitizer_{tool}",
                [[sanitizer, "--tool", tool, "--error-exitcode", "3", str(BUILD / "driver"), "4"]],
                60,
            )
            for op in ("fftconv", "dyad", "quik", "relu", "bitmask"):
                program = str(BUILD / f"driver_{op}")
                check.run(
                    f"sanitizer_{tool}_{op}",
                    [[sanitizer, "--tool", tool, "--error-exitcode", "3", program, "quick"]],
                    60,
                )
    else:
        check.run("sanitizer", [["compute-sanitizer"]], 1)

    sections = [
        "gpu-check\n" + "\n".join(f"  {k}: {v}" for k, v in info.items()),
        "\n".join(f"{s['step']:22} {s['verdict']:28} {s['seconds']:6.1f} s" for s in check.steps),
    ]
    report: dict[str, object] = {"machine": info, "steps": check.steps}
    if bench_ok:
        bench = json.loads((args.out / "bench.json").read_text())
        report["bars"] = bars(bench)
        sections += ["\n".join(report["bars"]), (args.out / "bench.log").read_text()]
    if fftconv_ok:
        lines = fftconv_bars(json.loads((args.out / "bench_fftconv.json").read_text()))
        report["bars"] = [*report.get("bars", []), *lines]
        sections += ["\n".join(lines), (args.out / "bench_fftconv.log").read_text()]
    if dyad_ok:
        lines = dyad_bars(json.loads((args.out / "bench_dyad.json").read_text()))
        report["bars"] = [*report.get("bars", []), *lines]
        sections += ["\n".join(lines), (args.out / "bench_dyad.log").read_text()]
    if quik_ok:
        lines = quik_bars(json.loads((args.out / "bench_quik.json").read_text()))
        report["bars"] = [*report.get("bars", []), *lines]
        sections += ["\n".join(lines), (args.out / "bench_quik.log").read_text()]
    if relu_ok:
        lines = relu_bars(json.loads((args.out / "bench_relu.json").read_text()))
        report["bars"] = [*report.get("bars", []), *lines]
        sections += ["\n".join(lines), (args.out / "bench_relu.log").read_text()]
    for step in check.steps:
        if step["verdict"] not in ("ok", "skipped"):
            sections.append(f"---- {step['step']}: {step['verdict']}\n{check.tail(str(step['step']), 40)}")
    (args.out / "report.txt").write_text("\n\n".join(sections) + "\n")
    (args.out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    print("\n\n".join(sections))
    return 0 if all(s["verdict"] in ("ok", "skipped") for s in check.steps) else 1


if __name__ == "__main__":
    sys.exit(main())
