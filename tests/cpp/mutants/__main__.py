"""Plants bugs in the kernels, one at a time, and checks that the fuzz program notices each.

    python tests/cpp/mutants [part of a name]

A mutant changes one line of a copy of csrc, recompiles one file, links it with the objects of the last build and runs the
fuzz program of its family (``relu_ffn.py`` here: ``fuzz_relu_ffn.cpp``), which must fail. Takes a few seconds a mutant, a
minute where a tier must be recompiled. When a line that is changed here changes for good, the script says so: bring the
mutant up to date.
"""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from mutant import Mutant

ROOT = Path(__file__).parents[3]
BUILD = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
CALLS = "4000"
# Modules beside this one, each named like the fuzz program that has to notice its bugs.
FAMILIES = ("fftconv", "dyad", "quik", "relu_ffn", "bitmask", "wq_grouped", "decoder", "attention", "wq_linear")


def compile_command(unit: Path) -> tuple[list[str], Path]:
    """How the last build compiled a file, and to which object."""
    for entry in json.loads((BUILD / "compile_commands.json").read_text()):
        if Path(entry["file"]) == unit:
            words = entry["command"].split()
            return words, Path(entry["directory"]) / words[words.index("-o") + 1]
    raise SystemExit(f"mutants: {unit} is not in the last build: make build")


def caught(mutant: Mutant, family: str, work: Path) -> bool:
    shutil.copytree(ROOT / "csrc", work / "csrc")
    target = work / "csrc" / mutant.file
    text = target.read_text()
    if text.count(mutant.old) != 1:
        raise SystemExit(
            f"mutants: {mutant.name}: expected the line once in {mutant.file}, found it {text.count(mutant.old)} times"
        )
    target.write_text(text.replace(mutant.old, mutant.new))

    command, own = compile_command(ROOT / "csrc" / mutant.unit)
    words = [word.replace(str(ROOT / "csrc"), str(work / "csrc")) for word in command]
    words = ["-O1" if word == "-O3" else word for word in words]
    words[words.index("-o") + 1] = str(work / "mutant.o")
    subprocess.run(words, check=True, cwd=BUILD, stderr=subprocess.DEVNULL)
    objects = [o for o in BUILD.glob("CMakeFiles/effk_*/csrc/**/*.o") if o != own and "/csrc/torch/" not in str(o)]
    objects = [
        o for o in objects if o.parts[len(BUILD.parts) + 1] not in ("effk_ops.dir", "effk_emu.dir", "effk_cuda.dir")
    ]
    program = work / "fuzz"
    main = BUILD / f"tests/cpp/CMakeFiles/fuzz_{family}.dir/fuzz_{family}.cpp.o"
    linker = next(word for word in words if Path(word).name.endswith(("++", "clang", "gcc")))  # behind a compiler cache
    subprocess.run(
        [linker, str(main), str(work / "mutant.o"), *map(str, objects), "-pthread", "-o", str(program)], check=True
    )
    return subprocess.run([program, CALLS], capture_output=True).returncode != 0


def main() -> None:
    wanted = sys.argv[1] if len(sys.argv) > 1 else ""
    survivors = []
    planted = [(family, m) for family in FAMILIES for m in importlib.import_module(family).MUTANTS]
    chosen = [(family, m) for family, m in planted if wanted in m.name]
    for family, mutant in chosen:
        with tempfile.TemporaryDirectory() as work:
            ok = caught(mutant, family, Path(work))
        print(f"{'caught  ' if ok else 'SURVIVED'}  {mutant.name}", flush=True)
        if not ok:
            survivors.append(mutant.name)
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} planted bugs caught")
    sys.exit(bool(survivors))


if __name__ == "__main__":
    main()
