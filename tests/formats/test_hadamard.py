"""The rotation: orthogonal at every width, dense where a Hadamard matrix is known, its factors what they say."""

from __future__ import annotations

import pytest
import torch

from effk.formats.hadamard import apply, base_matrix, factors, rotate, sylvester

DENSE = (1, 2, 4, 12, 20, 28, 36, 64, 72, 104, 128, 384, 576, 640, 768, 1536, 2048)


@pytest.mark.parametrize("width", DENSE)
def test_true_hadamard_matrices(width: int) -> None:
    rotation = rotate(torch.eye(width, dtype=torch.float64))
    assert torch.allclose(rotation @ rotation.t(), torch.eye(width, dtype=torch.float64), atol=1e-13)
    assert torch.allclose(rotation.abs(), torch.full_like(rotation, width**-0.5), atol=1e-13), "every entry alike"


@pytest.mark.parametrize(("width", "blocks"), [(9, 9), (100, 5), (344, 43), (688, 43), (63, 63), (1032, 43)])
def test_block_by_block_elsewhere(width: int, blocks: int) -> None:
    assert factors(width)[0] == blocks
    rotation = rotate(torch.eye(width, dtype=torch.float64))
    assert torch.allclose(rotation @ rotation.t(), torch.eye(width, dtype=torch.float64), atol=1e-13)
    inside = torch.block_diag(*[torch.ones(width // blocks, width // blocks)] * blocks)
    assert torch.equal(rotation != 0, inside != 0)


@pytest.mark.parametrize("width", [4096, 5632, 11008, 13824, 14336, 28672])
def test_widths_of_large_models(width: int) -> None:
    blocks, power, base = factors(width)
    assert blocks * power * base == width and power & (power - 1) == 0 and base <= 512
    assert blocks == (43 if width == 11008 else 1)
    x = torch.randn(3, width, dtype=torch.float64)
    assert torch.allclose(rotate(rotate(x), inverse=True), x, atol=1e-12)
    assert torch.allclose(rotate(x).square().sum(-1), x.square().sum(-1), rtol=1e-12)


def test_the_order_of_factors() -> None:
    """The matrix is I (x) S (x) B / sqrt(size), from the right; B is not symmetric at 12."""
    expected = torch.kron(sylvester(8).double(), base_matrix(12).double()) / 96**0.5
    assert torch.allclose(rotate(torch.eye(96, dtype=torch.float64)), expected, atol=1e-14)
    assert not torch.equal(base_matrix(12), base_matrix(12).t())


@pytest.mark.parametrize("order", [1, 12, 20, 28, 36, 44, 108])
def test_base_matrices(order: int) -> None:
    matrix = base_matrix(order).long()
    assert (
        torch.equal(matrix @ matrix.t(), order * torch.eye(order, dtype=torch.int64)) and int(matrix.abs().min()) == 1
    )


def test_many_sylvester_steps() -> None:
    x = torch.randn(2, 3, 8192, dtype=torch.float64)
    one_by_one = apply(x, base_matrix(1), sylvester(2), 8192)
    assert torch.allclose(rotate(x), one_by_one, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype) -> None:
    """fp32 sums: what is left is the rounding of the result, and of sums of 576 terms."""
    x = torch.randn(4, 576).to(dtype)
    got, exact = rotate(x), rotate(x.double())
    assert got.dtype == dtype
    bound = torch.finfo(dtype).eps / 2 * exact.abs() + 576 * 2**-24 * x.double().abs().sum(-1, keepdim=True) / 24
    assert bool(((got.double() - exact).abs() <= bound).all())


def test_one_large_entry_is_spread() -> None:
    x = torch.randn(1, 576)
    x[0, 7] = 400.0
    assert float(rotate(x).abs().max()) < 400 / 24 + 6


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="width: expected at least 1, got 0"):
        factors(0)
    with pytest.raises(ValueError, match="order: expected 1, p"):
        base_matrix(24 + 16)
