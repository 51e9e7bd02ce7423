"""The emulation's twins of GPU instructions against what a GPU returned for the same data.

golden/<name>.txt is the output of primitives.cu on a GPU, recorded by `make gpu-check`; its first line, which begins with
`#`, says on which one. EFFK_TEST_PRIMITIVES names one more such file. The emulation and the kernels have one author: only this comparison tells whether he read the manual
right.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest

from cuda_emulation import Build, missing, run

GOLDEN = sorted((Path(__file__).parent / "golden").glob("*.txt"))
if more := os.environ.get("EFFK_TEST_PRIMITIVES"):
    GOLDEN.append(Path(more))
NAMES = (
    "mma_f16_integers", "mma_bf16_integers", "mma_f16", "mma_bf16", "mma_s8", "mma_s4", "ldmatrix", "ldmatrix_trans", "shuffles",
    "bits", "fma_f16", "fma_bf16", "lanes", "cp_async", "cluster",
)  # fmt: skip
# Tensor cores add the 16 products and the sum they continue in an order and with a width of their own. The numbers lie below
# 4 in size, so that no partial sum exceeds 16 * 16 + 32; each of 17 additions may cut 2^-23 of that.
ROUNDED = {"mma_f16", "mma_bf16"}
BOUND = 17 * 2.0**-23 * 288


def parse(text: str) -> dict[str, list[int]]:
    lines = [line.split() for line in text.splitlines() if line and not line.startswith("#")]
    return {name: [int(word, 16) for word in words] for name, *words in lines}


def as_float(word: int) -> float:
    return struct.unpack("<f", struct.pack("<I", word))[0]


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[int]]:
    if reason := missing():
        pytest.skip(reason)
    result = run(Build(tmp_path_factory.mktemp("primitives")).program("tests/cuda/primitives.cu"))
    assert result.returncode == 0, result.stdout + result.stderr
    return parse(result.stdout)


def test_program_covers_every_name(emulated: dict[str, list[int]]) -> None:
    assert tuple(emulated) == NAMES


def test_exact_where_sums_are_exact(emulated: dict[str, list[int]]) -> None:
    """Products of integers from -8 to 7 give integers, below 16 * 64 plus the sum that is continued."""
    for name in ("mma_f16_integers", "mma_bf16_integers"):
        values = [as_float(word) for word in emulated[name]]
        assert all(v == int(v) and abs(v) <= 1024 + 32 for v in values) and len(set(values)) > 32


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("path", GOLDEN or [None], ids=lambda p: p.stem if p else "none")
def test_matches_gpu(path: Path | None, name: str, emulated: dict[str, list[int]]) -> None:
    if path is None:
        pytest.skip("no GPU's output is recorded yet: tests/cuda/golden is empty")
    golden = parse(path.read_text())
    if name == "cluster" and name not in golden:
        pytest.skip(f"{path.stem} has no clusters")
    if name in ROUNDED:
        errors = [abs(as_float(a) - as_float(b)) for a, b in zip(emulated[name], golden[name], strict=True)]
        assert max(errors) <= BOUND
    else:
        assert emulated[name] == golden[name]
