"""A slice of the suite on an emulated CPU with AVX2 and without AVX-512: the proof that the AVX2 path is clean.

On the development machine every instruction works, so a stray AVX-512 one would not be noticed; under ``qemu-x86_64 -cpu
max`` (which emulates AVX2, FMA, F16C and BMI2) it ends the process with SIGILL.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

QEMU = shutil.which("qemu-x86_64")
ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(QEMU is None, reason="needs qemu-x86_64 (Debian package qemu-user)")


def emulated(*arguments: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k != "EFFK_ISA"} | {"OMP_NUM_THREADS": "1", "EFFK_TEST_EMULATED": "1"}
    command = [QEMU, "-cpu", "max", sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)


def test_avx2_is_what_is_found() -> None:
    done = emulated("-c", "from effk import isa; print(isa.supported(), isa.active(), isa.bf16())")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "['scalar', 'avx2'] avx2 False"


@pytest.mark.slow
def test_slice_of_the_suite() -> None:
    files = [
        f"tests/ops/test_{op}.py"
        for op in (
            "wq_linear",
            "wq_grouped_linear",
            "fftconv",
            "depthwise_conv1d",
            "dense_linear",
            "dyad_linear",
            "quik_linear",
            "sp24",
            "relu_ffn",
            "neuron_lists",
            "attention",
            "bitmask_linear",
        )
    ]
    done = emulated("-m", "pytest", "-m", "emulated", "-p", "no:cacheprovider", *files)
    closing = done.stdout.strip().splitlines()[-1:]
    assert done.returncode == 0, f"exit {done.returncode}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
    assert "passed" in closing[0]
