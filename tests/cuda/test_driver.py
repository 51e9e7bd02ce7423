"""The kernels' own test program, emulated: under ASan and UBSan, and with planted bugs that it must not survive.

Both compile the kernels, which takes most of the time. Without more said one width and the mutants marked `ci` are run;
EFFK_TEST_ALL=1 runs every width and every mutant (about six minutes on one core).
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest

from cuda_emulation import ORDERS, SANITIZE, WIDTHS, Build, missing, run

ALL = os.environ.get("EFFK_TEST_ALL") == "1"
pytestmark = [
    pytest.mark.skipif("EFFK_TEST_GPU_ONLY" in os.environ, reason="a check of the GPU alone"),
    pytest.mark.skipif(missing() is not None, reason=str(missing())),
]


def load_mutants() -> ModuleType:
    path = Path(__file__).parent / "mutants.py"
    spec = importlib.util.spec_from_file_location("mutants", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["mutants"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("bits", WIDTHS if ALL else (4,))
def test_sanitized(bits: int, tmp_path: Path) -> None:
    """No access outside a buffer or its alignment, no undefined arithmetic, right results, whatever the order of threads."""
    program = Build(tmp_path, SANITIZE).driver([bits])
    for order in ORDERS:
        result = run(program, bits, order=order)
        assert result.returncode == 0, f"order {order}:\n{result.stdout}{result.stderr}"
        assert ", 0 failed" in result.stdout


@pytest.mark.slow
def test_fftconv_sanitized(tmp_path: Path) -> None:
    program = Build(tmp_path, SANITIZE).fftconv_driver()
    for order in ORDERS:
        result = run(program, *(() if ALL else ("quick",)), order=order)
        assert result.returncode == 0, f"order {order}:\n{result.stdout}{result.stderr}"
        assert ", 0 failed" in result.stdout


@pytest.mark.slow
def test_dyad_sanitized(tmp_path: Path) -> None:
    program = Build(tmp_path, SANITIZE).dyad_driver()
    for order in (*ORDERS, "11") if ALL else ORDERS[2:]:
        result = run(program, *(() if ALL else ("quick",)), order=order)
        assert result.returncode == 0, f"order {order}:\n{result.stdout}{result.stderr}"
        assert ", 0 failed" in result.stdout


@pytest.mark.slow
def test_quik_sanitized(tmp_path: Path) -> None:
    program = Build(tmp_path, SANITIZE).quik_driver()
    for order in ORDERS if ALL else ORDERS[2:]:
        result = run(program, *(() if ALL else ("quick",)), order=order)
        assert result.returncode == 0, f"order {order}:\n{result.stdout}{result.stderr}"
        assert ", 0 failed" in result.stdout


@pytest.mark.slow
def test_relu_sanitized(tmp_path: Path) -> None:
    program = Build(tmp_path, SANITIZE).relu_driver()
    for order in (*ORDERS, "11") if ALL else ORDERS[2:]:
        result = run(program, *(() if ALL else ("quick",)), order=order)
        assert result.returncode == 0, f"order {order}:\n{result.stdout}{result.stderr}"
        assert ", 0 failed" in result.stdout


@pytest.mark.slow
def test_bitmask_sanitized(tmp_path: Path) -> None:
    program = Build(tmp_path, SANITIZE).bitmask_driver()
    for order in (*ORDERS, "11") if ALL else ORDERS:
        result = run(program, order=order)
        assert result.returncode == 0, f"order {order}:\n{result.stdout}{result.stderr}"
        assert ", 0 failed" in result.stdout


@pytest.mark.slow
def test_planted_bugs_are_caught(tmp_path: Path) -> None:
    mutants = load_mutants()
    chosen = [m for m in mutants.MUTANTS if ALL or m.ci]
    assert mutants.prepare(tmp_path, chosen) == ""
    assert [m.name for m in chosen if not mutants.plant(tmp_path, m, first=True)] == []
