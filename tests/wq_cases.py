"""Weights to test with, and how far a kernel may be from the float64 reference."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from effk.formats.wq import WqWeight, csr_from_mask, num_groups
from effk.ops import wq_linear as wq

BITS = (2, 3, 4, 8)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# qemu 7.2 ignores the index register of a gather when it is ymm4 (index 4 means "none" in an ordinary address), and only
# tables a row are gathered from.
EMULATED = "EFFK_TEST_EMULATED" in os.environ
KINDS = ("symmetric", "asymmetric", "table", "row_tables")  # codes as integers without and with zeros, or codebooks


def kinds(bits: int, compute: str = "float") -> tuple[str, ...]:
    """The kinds of weight that exist at these bits in this form."""
    if bits == 8:
        return KINDS[:2]
    return KINDS[:3] if compute == "int8" or EMULATED else KINDS


def random_weight(
    n: int,
    k: int,
    bits: int = 4,
    group_size: int = 64,
    kind: str = "symmetric",
    *,
    outliers: float = 0.0,
    scale_dtype: torch.dtype = torch.float16,
    seed: int = 0,
) -> WqWeight:
    """A weight with every code, zero point, scale sign and outlier position equally likely."""
    rng = torch.Generator().manual_seed(seed)
    groups = num_groups(k, group_size)
    scales = (torch.rand(n, groups, generator=rng) + 0.25) * 2.0**-8
    scales *= torch.where(torch.rand(n, groups, generator=rng) < 0.2, -1.0, 1.0)
    sparse = None
    if outliers:
        mask = torch.rand(n, k, generator=rng) < outliers
        sparse = csr_from_mask(torch.randn(n, k, generator=rng), mask)
    return WqWeight.from_codes(
        torch.randint(0, 1 << bits, (n, k), generator=rng, dtype=torch.uint8),
        scales.to(scale_dtype),
        bits=bits,
        group_size=group_size,
        zeros=torch.randint(0, 1 << bits, (n, groups), generator=rng, dtype=torch.uint8)
        if kind == "asymmetric"
        else None,
        codebook={
            "table": lambda: torch.randn(1 << bits, generator=rng),
            "row_tables": lambda: torch.randn(n, 1 << bits, generator=rng),
        }.get(kind, lambda: None)(),
        outliers=sparse,
    )


def random_input(m: int, k: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    """Normal activations, a few of them large, as in a transformer."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(m, k, generator=rng)
    x[torch.rand(m, k, generator=rng) < 0.01] *= 20
    return x.to(dtype)


SIGNIFICANT_BITS = {torch.float32: 24, torch.bfloat16: 8, torch.float16: 11}
SMALLEST = {torch.float32: 2.0**-149, torch.bfloat16: 2.0**-133, torch.float16: 2.0**-24}


def gamma(operations: int) -> float:
    """Higham's gamma_n: n roundings to fp32 in a row, each by a factor within 1 +- 2**-24, change a value by less."""
    u = operations * 2.0**-24
    return u / (1 - u)


def bound(x: Tensor, weight: WqWeight, y: Tensor, bias: Tensor | None, compute: str) -> Tensor:
    """The largest |kernel - reference| that fp32 arithmetic in any order allows, per element of float64 ``y``.

    Every output is a sum of products; a chain of n fp32 roundings over terms t is off by at most gamma(n) * sum |t|.

    float: at most k multiply-adds, one per group to apply the scale, and with zeros the kernels split q - z into
    (q - c) - (z - c), c = 2**(b-1), so the terms are |q - c| + |z - c|. BF16 dot products read subnormal operands as
    zero and flush subnormal results, hence an absolute 2**-126 per product.
    int8: integer sums are exact; per activation group two roundings of the scales, one of a table's, one multiply-add. A
    product of scales may be subnormal, which makes its error absolute: half of 2**-149, times the integer sum.
    Both: a chain of at most `row nnz` for the outliers, three additions, one rounding to the output's dtype.
    """
    rows = x.reshape(-1, weight.k)
    scales = wq.expand_groups(weight.scales.double().abs(), weight)
    if compute == "float":
        terms = wq.dense_values(weight).abs()
        if weight.codebook is None:
            center = 1 << (weight.bits - 1)
            terms = (weight.codes().double() - center).abs()
            if weight.zeros is not None:
                terms = terms + (wq.expand_groups(weight.zeros.double(), weight) - center).abs()
        magnitude = rows.double().abs()
        chain = 2 * weight.k + 2 * weight.groups + 4
        flushed = weight.k * 2.0**-126 * 512 * (scales.max() if scales.numel() else 0)
    else:
        codes, scale = wq.quantize_activations(rows.float(), weight.group_size)
        width = min(weight.group_size or wq.MAX_ACT_GROUP, wq.MAX_ACT_GROUP)
        magnitude = codes.abs() * scale.repeat_interleave(width, dim=1)[:, : weight.k]
        terms = wq.dense_values(weight).abs()
        if weight.codebook is not None:  # rounding to bytes moves an entry by half a step of 1 / 127
            top = weight.codebook.double().abs().amax(dim=-1, keepdim=True)
            terms = terms + top / 254
        chain = 4 * num_groups(weight.k, width) + 4
        flushed = 2.0**-149 * (codes.abs() @ terms.T).reshape(y.shape)
    total = (gamma(chain) + gamma(3)) * (magnitude @ (scales * terms).T)
    if weight.out_ptr is not None and weight.n:
        longest = int(weight.out_ptr.diff().max())
        total += (gamma(longest + 1) + gamma(3)) * (rows.double().abs() @ wq.outlier_matrix(weight).abs().T)
    if bias is not None:
        total += gamma(3) * bias.double().abs()
    total = total.reshape(y.shape) + flushed
    return total + 2.0 ** -SIGNIFICANT_BITS[x.dtype] * (y.abs() + total) + SMALLEST[x.dtype] * (weight.k + 2)


def assert_close(y: Tensor, x: Tensor, weight: WqWeight, bias: Tensor | None, compute: str, label: str = "") -> None:
    """Fail unless ``y`` is within the derived bound of the reference, naming the worst element."""
    expected = wq.reference(x, weight, bias, compute)
    check(y, expected, bound(x, weight, expected, bias, compute), label)


def check(y: Tensor, expected: Tensor, allowed: Tensor, label: str = "") -> None:
    """Fail unless |y - expected| <= allowed everywhere."""
    assert y.shape == expected.shape, f"{label}: shape {list(y.shape)}, expected {list(expected.shape)}"
    if not y.numel():
        return
    ratio = (y.double() - expected).abs() / allowed
    ratio = ratio.nan_to_num(nan=torch.inf)
    worst = int(ratio.argmax())
    assert ratio.flatten()[worst] <= 1, (
        f"{label}: element {worst} of {list(y.shape)}: {y.flatten()[worst].item()!r}, expected "
        f"{expected.flatten()[worst].item()!r} within {allowed.flatten()[worst].item():.3g} "
        f"({float(ratio.flatten()[worst]):.3g} times too far)"
    )
