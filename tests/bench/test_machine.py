"""The roofline kernels run here, and weights rotate over more than any cache holds."""

from __future__ import annotations

import os

import pytest

import effk
from bench import machine


@pytest.mark.parametrize("nbytes", [1, 200_000, 8 << 20, 1 << 30])
def test_a_rotation_exceeds_four_times_the_last_level_cache(nbytes: int) -> None:
    count = machine.copies(nbytes)
    assert count * nbytes >= 4 * machine.last_level_cache()
    assert count * nbytes >= 136 << 20
    assert count >= 2


def test_cores() -> None:
    assert machine.cores(1) == [min(os.sched_getaffinity(0))]
    for threads in (0, 10**6):
        with pytest.raises(ValueError, match=f"threads: expected 1 to .* got {threads}"):
            machine.cores(threads)


def test_every_tier_of_this_cpu_has_its_kernels() -> None:
    have = machine.kernels()
    for tier in effk.isa.supported():
        assert machine.best_tier("read", tier) and machine.best_tier("fp32", tier)
        if tier != "scalar":
            assert ("int8", tier) in have
    assert all(tier in machine.TIERS for _, tier in have)
    assert machine.best_tier("int8", "scalar") == ""


def test_kernels_count_what_they_do() -> None:
    cpus = machine.cores(1)
    buffer = machine.aligned((1 << 16,))
    for what, tier in machine.kernels():
        if what == "read":
            seconds, units = machine.run(what, tier, cpus, buffer, 1 << 16, 3)
            assert units == 3 << 16
        else:
            seconds, units = machine.run(what, tier, cpus, None, 0, 1000)
            assert units > 0 and units % 1000 == 0
        assert seconds > 0


def test_peak_of_a_tier_without_instructions_of_its_own_is_the_next_lower() -> None:
    m = machine.Machine(1, peaks={"fp32": {"scalar": 1.0, "avx2": 2.0}, "int8": {"avx2": 4.0}})
    assert m.peak("fp32", "avx512vnni") == 2.0
    assert m.peak("int8", "scalar") == 0.0
