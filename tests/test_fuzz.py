"""The C++ fuzz programs (tests/cpp): random calls on every tier, each buffer against an inaccessible page.

``make fuzz`` runs up to a million calls of each, ``make sanitize`` the same programs under ASan and UBSan.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BUILD = Path(__file__).parents[1] / "build" / f"cmake-{sys.implementation.cache_tag}"


@pytest.mark.parametrize(
    ("program", "calls"),
    [
        ("fuzz_wq_linear", 20_000),
        ("fuzz_fftconv", 5_000),
        ("fuzz_dyad", 5_000),
        ("fuzz_quik", 4_000),
        ("fuzz_attention", 1_500),
        ("fuzz_decoder", 2_000),
        ("fuzz_relu_ffn", 3_000),
        ("fuzz_bitmask", 4_000),
        ("fuzz_wq_grouped", 6_000),
    ],
)
def test_random_calls(program: str, calls: int) -> None:
    path = BUILD / "tests" / "cpp" / program
    if not path.is_file():
        pytest.skip("no build folder with the C++ tests: effk was not installed editable")
    done = subprocess.run([path, str(calls)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert f"{calls} calls" in done.stdout and "no finding" in done.stdout
