"""Choosing a tier: by environment, by call, for a block; and the kernel table."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

import effk
from effk import _C, isa


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k != "EFFK_ISA"} | environment
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)


def test_tiers_are_a_prefix_of_all() -> None:
    assert isa.names() == ["scalar", "avx2", "avx512", "avx512vnni"]
    assert isa.supported() == isa.names()[: len(isa.supported())]
    assert isa.active() in isa.supported()


def test_the_best_tier_is_the_default() -> None:
    done = run_python("from effk import isa; print(isa.active(), isa.bf16())")
    assert done.stdout.split() == [isa.supported()[-1], str(_C.isa_detected_bf16())]


@pytest.mark.parametrize("name", isa.supported())
def test_environment_forces_a_tier(name: str) -> None:
    assert run_python("from effk import isa; print(isa.active())", EFFK_ISA=name).stdout.strip() == name


@pytest.mark.parametrize("name", ("avx9", "AVX2", "avx2 ", "x" * 300))
def test_environment_with_another_name_is_an_error(name: str) -> None:
    done = run_python("import effk", EFFK_ISA=name)
    assert done.returncode != 0
    assert (
        f"ImportError: EFFK_ISA: expected one of {', '.join(isa.supported())} on this CPU, got '{name[:60]}"
        in done.stderr
    )


def test_command_with_another_name_ends_in_one_line() -> None:
    env = os.environ | {"EFFK_ISA": "avx9"}
    done = subprocess.run([sys.executable, "-m", "effk", "info"], env=env, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("effk: error: EFFK_ISA: expected one of") and done.stderr.count("\n") == 1


def test_empty_environment_is_none() -> None:
    assert run_python("from effk import isa; print(isa.active())", EFFK_ISA="").stdout.strip() == isa.supported()[-1]


def test_use_as_a_block_restores() -> None:
    before = (isa.active(), isa.bf16())
    with isa.use("scalar"):
        assert isa.active() == "scalar" and not isa.bf16()
        with isa.use(isa.supported()[-1], bf16=False):
            assert isa.active() == isa.supported()[-1] and not isa.bf16()
        assert isa.active() == "scalar"
    assert (isa.active(), isa.bf16()) == before


def test_use_as_a_call_stays() -> None:
    before = (isa.active(), isa.bf16())
    try:
        isa.use("scalar")
        assert isa.active() == "scalar"
    finally:
        isa.use(*before)


def test_use_of_another_name_changes_nothing() -> None:
    before = isa.active()
    with pytest.raises(ValueError, match=r"expected one of scalar.* on this CPU, got 'neon'"):
        isa.use("neon")
    assert isa.active() == before


def test_every_form_has_a_portable_kernel() -> None:
    table = _C.kernel_table()
    forms = {row["form"] for row in table if row["tier"] == "scalar"}
    assert forms == {"int8", "fp32"}
    assert {row["tier"] for row in table} <= set(isa.names())
    names = [(row["op"], row["name"]) for row in table]  # two families run on the same matrix products
    assert len(names) == len(set(names))


def test_build_info() -> None:
    info = _C.build_info()
    assert info["version"] == effk.__version__
    assert info["oldest_torch"] == "2.11"
