"""Round to nearest against the golden table, the modes' definitions and the rules of the stored form."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from effk.compress.solvers.rtn import MODES, Grid, decode, encode, round_to_nearest, search_grid
from golden_matrices import golden_matrix

# Relative Frobenius error for a 512 x 512 matrix in groups of 128, computed once from the modes' formulas; columns are
# MODES without the last ("mse_asym" has no published twin).
GOLDEN = {
    ("gauss", 8): (0.0065, 0.0065, 0.0066, 0.0064, 0.0064, 0.0059, 0.0062),
    ("gauss", 4): (0.1177, 0.1112, 0.1059, 0.1036, 0.1062, 0.1008, 0.0968),
    ("gauss", 3): (0.2748, 0.2382, 0.2132, 0.2086, 0.2301, 0.2160, 0.1861),
    ("gauss", 2): (0.7682, 0.5519, 0.4346, 0.4256, 0.5511, 0.5046, 0.3636),
    ("struct", 4): (0.2491, 0.2356, 0.2237, 0.2185, 0.2193, 0.1659, 0.2016),
    ("struct", 2): (0.7710, 0.7139, 0.6539, 0.6253, 0.6732, 0.6373, 0.5137),
}


def relative_error(weight: Tensor, bits: int, group_size: int, mode: str, **options) -> float:
    codes, grid = round_to_nearest(weight, bits, group_size, mode, **options)
    return float((decode(codes, grid, bits, group_size) - weight).norm() / weight.norm())


@pytest.mark.parametrize(("kind", "bits"), GOLDEN)
def test_golden_errors(kind: str, bits: int) -> None:
    weight = golden_matrix(kind)
    for mode, expected in zip(MODES, GOLDEN[kind, bits], strict=False):
        assert relative_error(weight, bits, 128, mode) == pytest.approx(expected, rel=0.03), mode


def test_asymmetric_search_beats_min_max() -> None:
    weight = golden_matrix("struct")
    for bits in (2, 3, 4):
        assert relative_error(weight, bits, 128, "mse_asym") < relative_error(weight, bits, 128, "asym")


def test_modes_put_the_extreme_where_they_say() -> None:
    weight = torch.tensor([[-0.5, 0.25, 1.0, 0.1]])  # positive extreme
    for mode, scale, code in (
        ("sym_narrow", 1 / 7, 15),
        ("sym_mid", 1 / 7.5, 15),
        ("sym_clip", 1 / 8, 15),
        ("signed_full", -1 / 8, 0),
        ("signed_auto", -1 / 8, 0),  # skewed: |max + min| = 0.5 >= 1/8
    ):
        codes, grid = round_to_nearest(weight, 4, 4, mode)
        assert grid.zeros is None
        assert float(grid.scales) == pytest.approx(scale, rel=2**-11), mode
        assert int(codes[0, 2]) == code, mode
    balanced = torch.tensor([[-1.0, 1.0, 0.5, 0.0]])
    assert abs(float(search_grid(balanced, 4, 4, "signed_auto").scales)) == pytest.approx(1 / 7.5, rel=2**-11)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_error_within_half_a_step_unless_clipped(mode: str, bits: int) -> None:
    weight = torch.randn(17, 70, generator=torch.Generator().manual_seed(1))
    codes, grid = round_to_nearest(weight, bits, 32, mode)
    step = grid.scales.float().abs().repeat_interleave(32, 1)[:, :70]
    inside = (codes > (1 if mode == "sym_narrow" else 0)) & (codes < 2**bits - 1)
    gap = (decode(codes, grid, bits, 32) - weight).abs()
    # Half a step, plus fp32 rounding of w / s and of s * level: three operations on values up to |w|.
    assert bool((gap <= step / 2 + 3 * 2**-24 * weight.abs())[inside].all())


@pytest.mark.parametrize("mode", MODES)
def test_codes_come_from_the_stored_scale(mode: str) -> None:
    weight = torch.randn(8, 128, generator=torch.Generator().manual_seed(2))
    codes, grid = round_to_nearest(weight, 4, 64, mode)
    assert grid.scales.dtype == torch.float16
    assert torch.equal(codes, encode(weight, Grid(grid.scales, grid.zeros), 4, 64, mode=mode))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "weight",
    [torch.zeros(3, 64), torch.ones(3, 64), -torch.ones(3, 64), torch.full((1, 1), 0.3), torch.rand(2, 7) + 1],
    ids=["zeros", "ones", "minus ones", "one weight", "all positive"],
)
def test_degenerate_groups(mode: str, weight: Tensor) -> None:
    codes, grid = round_to_nearest(weight, 4, 32, mode)
    restored = decode(codes, grid, 4, 32)
    assert bool(restored.isfinite().all())
    assert bool(((restored - weight).abs() <= weight.abs() / 7).all())  # sym_clip loses one of 8 steps


def test_all_zero_group_has_scale_one_and_the_code_of_zero() -> None:
    weight = torch.randn(2, 64, generator=torch.Generator().manual_seed(3))
    weight[0, :32] = 0
    for mode in MODES:
        codes, grid = round_to_nearest(weight, 4, 32, mode)
        assert float(grid.scales[0, 0]) == 1.0
        zero = 8 if grid.zeros is None else int(grid.zeros[0, 0])
        assert bool((codes[0, :32] == zero).all())


def test_short_last_group_stands_alone() -> None:
    weight = torch.randn(4, 80, generator=torch.Generator().manual_seed(4))
    whole = search_grid(weight, 3, 64, "mse")
    tail = search_grid(weight[:, 64:].contiguous(), 3, 64, "mse")
    assert whole.scales.shape == (4, 2)
    assert torch.equal(whole.scales[:, 1:], tail.scales)


def test_masked_weights_do_not_widen_ranges() -> None:
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(5))
    mask = torch.zeros_like(weight, dtype=torch.bool)
    mask[:, 10] = True
    spiked = weight.clone()
    spiked[:, 10] = 50.0
    for mode in MODES:
        with_spike = search_grid(spiked, 4, 32, mode, mask=mask)
        without = search_grid(torch.where(mask, 0.0, weight), 4, 32, mode, mask=mask)
        assert torch.equal(with_spike.scales, without.scales)
        codes = encode(spiked, with_spike, 4, 32, mode=mode, mask=mask)
        assert bool((decode(codes, with_spike, 4, 32)[:, 10] == 0).all())


def test_importance_lowers_the_error_that_it_weighs() -> None:
    generator = torch.Generator().manual_seed(6)
    weight = torch.randn(64, 256, generator=generator)
    importance = torch.rand(256, generator=generator) ** 8 * 100
    for mode in ("mse", "mse_asym"):

        def cost(grid: Grid, mode: str = mode) -> float:
            restored = decode(encode(weight, grid, 3, 64, mode=mode), grid, 3, 64)
            return float(((restored - weight).square() * importance).sum())

        assert cost(search_grid(weight, 3, 64, mode, importance=importance)) < 0.8 * cost(
            search_grid(weight, 3, 64, mode)
        )


def test_scales_outside_the_range_of_fp16_are_fp32() -> None:
    assert search_grid(torch.randn(2, 32) * 1e-5, 4, 32, "sym_clip").scales.dtype == torch.float32
    assert search_grid(torch.randn(2, 32) * 1e7, 4, 32, "sym_clip").scales.dtype == torch.float32


def test_empty_weight() -> None:
    codes, grid = round_to_nearest(torch.zeros(0, 64), 4, 32)
    assert codes.shape == (0, 64)
    assert grid.scales.shape == (0, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mode": "best"}, "mode: expected one of"),
        ({"bits": 5}, "bits: expected 2, 3, 4 or 8, got 5"),
        ({"group_size": -1}, "group_size: expected 0 or a positive size"),
        ({"weight": torch.zeros(4)}, r"weight: expected floating \[N, K\]"),
        ({"weight": torch.full((2, 64), torch.nan)}, "expected finite values"),
        ({"importance": torch.ones(3)}, "importance: expected"),
        ({"importance": -torch.ones(64)}, "importance: expected finite non-negative"),
        ({"mask": torch.zeros(2, 64)}, "mask: expected bool"),
    ],
)
def test_bad_arguments(change: dict, message: str) -> None:
    arguments = {"weight": torch.zeros(2, 64), "bits": 4, "group_size": 32, "mode": "mse"} | change
    with pytest.raises(ValueError, match=message):
        search_grid(**arguments)
