"""2:4 and pair-wise 4:8 weights: exact round trips and products, every pattern of a group, bad input."""

from __future__ import annotations

import itertools

import pytest
import torch

from dyad_cases import same_bits
from effk.ops import sp24

ops = torch.ops.effk


def sparse(n: int, k: int, pattern: str, seed: int = 0) -> torch.Tensor:
    """Random int8 with at most two kept places of four, some groups with fewer, the full range of values."""
    rng = torch.Generator().manual_seed(seed)
    width = 2 if pattern == "pair4:8" else 1
    w = torch.randint(-128, 128, (n, k // (4 * width), 4, width), generator=rng, dtype=torch.int8)
    order = torch.rand(w.shape[:3], generator=rng).argsort(2)
    kept = (order < torch.randint(0, 3, (n, w.shape[1], 1), generator=rng)).unsqueeze(3)
    return (w * kept).reshape(n, k)


@pytest.mark.parametrize("pattern", sp24.PATTERNS)
def test_round_trip(pattern: str) -> None:
    for n, k in ((0, 8), (1, 8), (5, 24), (17, 64), (40, 200), (33, 1000)):
        w = sparse(n, k, pattern)
        assert sp24.fits(w, pattern).all()
        values, meta = ops.sp24_compress(w, pattern)
        assert values.shape == (n, k // 2) and meta.shape == (n, sp24.meta_bytes(k, pattern))
        assert torch.equal(ops.sp24_decompress(values, meta, k, pattern), w)


def test_every_pattern_of_a_group() -> None:
    """All masks of four places: those with at most two pass and keep the lowest places that ascend, others are errors."""
    for pattern, width in (("2:4", 1), ("pair4:8", 2)):
        for mask in itertools.product((0, 1), repeat=4):
            w = torch.tensor(mask).repeat_interleave(width)[None].to(torch.int8)
            w = torch.cat((w * 7, torch.zeros(1, 4 * width, dtype=torch.int8)), 1)
            if sum(mask) > 2:
                assert not sp24.fits(w, pattern).any()
                with pytest.raises(
                    RuntimeError, match=f"sp24_compress: w: expected rows of the pattern {pattern}.* row 0"
                ):
                    ops.sp24_compress(w, pattern)
                continue
            values, meta = ops.sp24_compress(w, pattern)
            places = [int(meta[0, 0]) >> 2 * i & 3 for i in range(4)]
            assert places[0] < places[1] and places[2:] == [0, 1]
            assert set(places[:2]) >= {i for i in range(4) if mask[i]}
            assert torch.equal(ops.sp24_decompress(values, meta, 8 * width, pattern), w)


def test_elementwise_is_not_pairwise() -> None:
    w = torch.tensor([[1, 0, 1, 0, 1, 0, 0, 0]], dtype=torch.int8)
    assert sp24.fits(w, "2:4") and not sp24.fits(w, "pair4:8")
    w = torch.tensor([[1, 2, 3, 4, 0, 0, 0, 0]], dtype=torch.int8)
    assert sp24.fits(w, "pair4:8") and not sp24.fits(w, "2:4")
    for pattern in sp24.PATTERNS:
        with pytest.raises(RuntimeError, match="in row 1"):
            ops.sp24_compress(torch.cat((torch.zeros_like(w), torch.ones_like(w))), pattern)


@pytest.mark.emulated
@pytest.mark.parametrize("pattern", sp24.PATTERNS)
def test_product_equals_the_dense_one(tier: str, pattern: str) -> None:
    for seed, (m, n, k) in enumerate(((0, 5, 8), (1, 1, 8), (3, 17, 24), (9, 50, 64), (70, 400, 72))):
        qx = torch.randint(-128, 128, (m, k), dtype=torch.int8)
        w = sparse(n, k, pattern, seed)
        expected = (qx.double() @ w.double().T).int()
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(ops.sp24_matmul(qx, *ops.sp24_compress(w, pattern), pattern))
        assert all(same_bits(y, expected) for y in results), (m, n, k)


def test_citizen_of_torch() -> None:
    for pattern in sp24.PATTERNS:
        w, qx = sparse(6, 16, pattern), torch.ones(3, 16, dtype=torch.int8)
        values, meta = ops.sp24_compress(w, pattern)
        torch.library.opcheck(ops.sp24_compress.default, (w, pattern))
        torch.library.opcheck(ops.sp24_decompress.default, (values, meta, 16, pattern))
        torch.library.opcheck(ops.sp24_matmul.default, (qx, values, meta, pattern))
        compiled = torch.compile(lambda *a: ops.sp24_matmul(*a), fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(qx, values, meta, pattern), ops.sp24_matmul(qx, values, meta, pattern))


def test_bad_arguments() -> None:
    w, qx = sparse(6, 16, "2:4"), torch.ones(3, 16, dtype=torch.int8)
    values, meta = ops.sp24_compress(w, "2:4")
    for call, message in (
        (lambda: ops.sp24_compress(w, "4:8"), "sp24_compress: pattern: expected '2:4' or 'pair4:8', got '4:8'"),
        (lambda: ops.sp24_compress(w.int(), "2:4"), r"sp24_compress: w: expected int8 \[rows, columns\]"),
        (lambda: ops.sp24_compress(w[:, :6].contiguous(), "2:4"), "sp24_compress: k: expected a multiple of 4"),
        (lambda: ops.sp24_compress(w[:, :12].contiguous(), "pair4:8"), "sp24_compress: k: expected a multiple of 8"),
        (lambda: ops.sp24_decompress(values, meta, 20, "2:4"), r"sp24_decompress: values: expected int8 \[6, 10\]"),
        (lambda: ops.sp24_decompress(values, meta[:, :1].contiguous(), 16, "2:4"), r"meta: expected uint8 \[6, 2\]"),
        (lambda: ops.sp24_matmul(qx[:, :8].contiguous(), values, meta, "2:4"), r"sp24_matmul: values: expected int8 \[6, 4\]"),
        (lambda: ops.sp24_matmul(qx.float(), values, meta, "2:4"), r"sp24_matmul: qx: expected int8"),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match=message):
            call()


def test_any_meta_is_safe() -> None:
    """Places that do not ascend come from nowhere but damage: results are some numbers, memory is not touched."""
    values, meta = torch.ones(5, 32, dtype=torch.int8), torch.randint(0, 256, (5, 8), dtype=torch.uint8)
    w = ops.sp24_decompress(values, meta, 64, "2:4")
    assert w.shape == (5, 64) and ((w == 0) | (w == 1)).all()
    assert torch.equal(
        ops.sp24_matmul(torch.ones(2, 64, dtype=torch.int8), values, meta, "2:4"), w.sum(1).int().expand(2, 5)
    )
