"""Registers, shared memory and spills of every CUDA kernel, from the report that ptxas left beside the objects.

budget.json has for each kernel, at most how many threads its blocks have and how many such blocks a multiprocessor must be
able to hold by registers, so that copies of one block hide behind the arithmetic of another; and its static shared
memory in bytes. No kernel may spill. A new kernel needs a line there.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

BUILD = Path(__file__).parents[2] / "build" / f"cmake-{sys.implementation.cache_tag}"
BUDGET = json.loads((Path(__file__).parent / "budget.json").read_text())
REGISTERS, GRANULE = 65536, 8  # of a multiprocessor, from compute capability 8.0 on; a thread gets multiples of 8
# EFFK_TEST_PTXAS: another build folder, such as the one of `make cuda-all`.
REPORTS = Path(os.environ.get("EFFK_TEST_PTXAS", BUILD)) / "CMakeFiles" / "effk_cuda.dir"

ENTRY = re.compile(
    r"Compiling entry function '(?P<name>[^']+)' for 'sm_(?P<arch>\w+)'"
    r".*?(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
    r".*?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


@dataclass(frozen=True)
class Kernel:
    """What ptxas said about one kernel for one architecture."""

    name: str
    arch: str
    registers: int
    shared: int
    stack: int
    spills: int

    @property
    def key(self) -> str:
        """Its line of the budget: the template and, of its arguments, the shape."""
        return " ".join(re.findall(r"\w+_kernel\b|Shape<[\d, ]+>", self.name))

    def excesses(self) -> list[str]:
        if self.key not in BUDGET:
            return [f"no line {self.key!r} in budget.json"]
        budget = BUDGET[self.key]
        limit = min(255, REGISTERS // (budget["threads"] * budget["blocks"]) // GRANULE * GRANULE)
        found = []
        if self.spills or self.stack:
            found.append(f"spills: {self.spills} bytes, stack frame {self.stack} bytes")
        if self.registers > limit:
            found.append(f"{self.registers} registers, at most {limit}")
        if self.shared > budget["shared"]:
            found.append(f"{self.shared} bytes of static shared memory, at most {budget['shared']}")
        return found


def parse(text: str) -> list[Kernel]:
    return [
        Kernel(
            name=m["name"],
            arch=m["arch"],
            registers=int(m["registers"]),
            shared=int(s[1]) if (s := re.search(r"(\d+) bytes smem", m["rest"])) else 0,
            stack=int(m["stack"]),
            spills=int(m["stores"]) + int(m["loads"]),
        )
        for m in ENTRY.finditer(text)
    ]


@pytest.fixture(scope="module")
def kernels() -> list[Kernel]:
    files = sorted(REPORTS.rglob("*.ptxas"))
    if not files:
        pytest.skip(f"no compiler reports in {REPORTS}: effk was built without nvcc, or installed from a wheel")
    if shutil.which("c++filt") is None:
        pytest.skip("needs binutils")
    text = "".join(f.read_text(errors="replace") for f in files)
    return parse(subprocess.run(["c++filt"], input=text, capture_output=True, text=True, check=True).stdout)


def test_within_budget(kernels: list[Kernel]) -> None:
    over = [f"{k.name} for sm_{k.arch}: {text}" for k in kernels for text in k.excesses()]
    assert over == []


def test_every_line_is_used(kernels: list[Kernel]) -> None:
    assert {k.key for k in kernels} == set(BUDGET)


def test_an_excess_is_seen() -> None:
    """The reader of reports is tested on one that breaks every rule."""
    (kernel,) = parse(
        "ptxas info    : Compiling entry function 'void effk::mma_kernel<__half, 4, effk::Shape<1, 2, 4, 16, 2> >(Args)' for 'sm_90a'\n"
        "ptxas info    : Function properties for void effk::mma_kernel\n"
        "    16 bytes stack frame, 12 bytes spill stores, 24 bytes spill loads\n"
        "ptxas info    : Used 72 registers, used 1 barriers, 16 bytes smem, 504 bytes cmem[0]\n"
    )
    assert (kernel.arch, kernel.registers, kernel.shared, kernel.stack, kernel.spills) == ("90a", 72, 16, 16, 36)
    assert len(kernel.excesses()) == 3
