"""Lists, listed products and masks of neurons against float64, brute force and the fixtures of their papers."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from effk.ops import neuron_lists as nl
from effk.ops import relu_ffn as rf

OPS = torch.ops.effk
EPS = 2.0**-24
STORE = {"fp32": 2.0**-24, "bf16": 2.0**-8, "fp16": 2.0**-11}


def bits(mask: Tensor, n: int) -> Tensor:
    return rf.expand_mask(mask, 1, n)


@pytest.mark.emulated
def test_every_pattern_of_sixteen(tier: str) -> None:
    """All 2^16 patterns of one vector."""
    for first in range(0, 1 << 16, 1 << 13):
        pattern = torch.arange(first, first + (1 << 13))[:, None] >> torch.arange(16) & 1
        x = pattern * torch.randn(len(pattern), 16).abs().clamp(min=0.1)
        index, value, count = OPS.nz_compact(x, None)
        assert torch.equal(count, pattern.sum(1).int())
        kept = torch.arange(16) < count[:, None]
        assert bool((index[~kept] == -1).all()) and bool((value[~kept] == 0).all())
        back = torch.zeros(len(x), 17).scatter(1, torch.where(kept, index.long(), 16), value)[:, :16]
        assert torch.equal(back, x)
        assert bool((index.diff() > 0)[kept[:, 1:]].all())


def test_lengths_and_thresholds(tier: str) -> None:
    for n in range(1, 131):
        x = torch.randn(2, n).to((torch.float32, torch.bfloat16, torch.float16)[n % 3])
        threshold = (None, torch.tensor([0.5]), torch.rand(n))[n % 3 if n > 1 else 0]
        index, value, count = OPS.nz_compact(x, threshold)
        for b, want in enumerate(nl.reference_compact(x, threshold)):
            assert index[b, : count[b]].tolist() == want.tolist() and bool((index[b, count[b] :] == -1).all())
            assert torch.equal(value[b, : count[b]], x[b, want].float()) and not value[b, count[b] :].any()
    assert OPS.nz_compact(torch.tensor([[0.0, torch.nan, -0.0]]), None)[0].tolist() == [[1, -1, -1]]


@pytest.mark.emulated
@pytest.mark.parametrize("rows", rf.ROWS)
def test_products_with_listed_rows(tier: str, rows: str) -> None:
    """Also that rows which are not listed are not read, with any number of threads."""
    for (d, f, tokens), n in zip(((64, 40, 1), (100, 33, 3), (260, 300, 9), (4, 7, 2)), (40, 5, 200, 0), strict=True):
        group = 32 if rows == "int4" else 0
        w, scales = OPS.relu_ffn_pack(torch.randn(f, d), False, rows, group)
        scales = scales if scales.numel() else None
        plain = OPS.relu_ffn_unpack(w, scales, rows, d).double()
        listed = torch.randperm(f)[:n].sort().values
        if rows == "fp32":
            w.view(torch.float32)[[i for i in range(f) if i not in listed.tolist()]] = torch.nan
        index = torch.full((f,), -1, dtype=torch.int32)
        index[:n] = listed
        count = torch.tensor([n], dtype=torch.int32)
        x, bias, out_bias = torch.randn(tokens, d), torch.randn(f), torch.randn(d)
        dot = OPS.rows_dot(x, w, scales, bias, index, count, rows)
        bound = (d + 4) * EPS * (x.double().abs() @ plain[listed].abs().T + bias.double()[listed].abs())
        assert (
            bool(((dot[:, :n] - nl.reference_dot(x, plain, listed, bias)).abs() <= bound).all())
            and not dot[:, n:].any()
        )
        value = torch.randn(tokens, f)
        want = nl.reference_axpy(value, plain, listed, out_bias)
        size = value.double().abs()[:, :n] @ plain[listed].abs() + out_bias.double().abs()
        for dtype, unit in STORE.items():
            y = OPS.rows_axpy(value, index, count, w, scales, out_bias, rows, d, dtype)
            bound = (n + 4) * EPS * size
            assert bool(((y.double() - want).abs() <= bound + unit * (want.abs() + bound)).all()), dtype
        torch.set_num_threads(3)
        assert torch.equal(OPS.rows_dot(x, w, scales, bias, index, count, rows), dot)
        assert torch.equal(OPS.rows_axpy(value, index, count, w, scales, out_bias, rows, d, "fp16"), y)
        torch.set_num_threads(1)
        alone = torch.cat([OPS.rows_axpy(v[None], index, count, w, scales, out_bias, rows, d, "fp16") for v in value])
        assert torch.equal(alone, y)


@pytest.mark.parametrize(("rows", "act"), list(itertools.product(("fp32", "bf16", "int8"), ("none", "relu"))))
def test_low_rank_masks(tier: str, rows: str, act: str) -> None:
    for d, r, f, tokens in ((64, 16, 50, 1), (100, 33, 129, 3), (40, 5, 8, 9)):
        first, second = (OPS.relu_ffn_pack(torch.randn(n, k), False, rows, 0) for n, k in ((r, d), (f, r)))
        p1, p2 = ((w, s if s.numel() else None) for w, s in (first, second))
        plain = OPS.relu_ffn_unpack(*p1, rows, d), OPS.relu_ffn_unpack(*p2, rows, r)
        x = torch.randn(tokens, d)
        for threshold in (torch.zeros(1), torch.randn(f)):
            mask = OPS.mask_lowrank(x, p1[0], p2[0], p1[1], p2[1], act, threshold, rows, r)
            want = nl.reference_lowrank(x, *plain, act, threshold)
            hidden = x.double() @ plain[0].double().T
            hidden = hidden.relu() if act == "relu" else hidden
            size = (x.double().abs() @ plain[0].double().abs().T) @ plain[1].double().abs().T
            near = (hidden @ plain[1].double().T - threshold.double()).abs() <= (d + r + 8) * EPS * size
            assert mask.shape == (tokens, nl.mask_bytes(f)) and bool((bits(mask, f) == want)[~near].all())
            assert torch.equal(nl.pack_mask(bits(mask, f)), mask), "bits beyond f"


def test_sign_masks(tier: str) -> None:
    x = torch.tensor([[1, -2, 0.5, 3, -1, 2, -0.5, 1]])
    w = torch.tensor([[-1, 1, -1, 1, 1, -1, 1, -1.0]])
    signs = nl.pack_mask(w < 0)
    for alpha, active in ((1.0, 0), (6.9, 0), (7.0, 1), (8.0, 1)):
        assert OPS.mask_sign(x, signs, torch.tensor([alpha]))[0, 0] == active, alpha
    for d, f, tokens in ((5, 9, 1), (64, 40, 2), (131, 70, 3), (200, 8, 1)):
        x, w = torch.randn(tokens, d), torch.randn(f, d)
        for alpha in (torch.ones(1), 0.5 + torch.rand(f)):
            mask = OPS.mask_sign(x, nl.pack_mask(w < 0), alpha)
            assert torch.equal(mask, nl.pack_mask(nl.reference_sign(x, w, alpha)))


def test_dynamic_k() -> None:
    r = torch.tensor([[0.1, 4, 2, 0.5, 3.4]])
    for rule, tau, want in (
        ("largest", 0.5, {1, 2, 4}), ("largest", 0.2, {1, 4}), ("largest", 1.0, {0, 1, 2, 3, 4}), ("share", 0.3, {1}), ("share", 0.5, {1, 4}),
        ("share", 0.75, {1, 2, 4}), ("share", 0.9, {1, 2, 4}), ("share", 1.0, {0, 1, 2, 3, 4}),
    ):  # fmt: skip
        mask, count = OPS.mask_dynk(r, tau, rule)
        assert set(bits(mask, 5)[0].nonzero()[:, 0].tolist()) == want and count[0] == len(want), (rule, tau)
    zeros, tied = torch.zeros(1, 9), torch.ones(1, 9)
    assert OPS.mask_dynk(zeros, 0.5, "share")[0].tolist() == [[1, 0]]
    assert OPS.mask_dynk(zeros, 0.5, "largest")[0].tolist() == [[255, 1]]
    assert OPS.mask_dynk(tied, 0.3, "share")[0].tolist() == [[7, 0]]


def test_top_k() -> None:
    score = torch.tensor([[3.0, 1, 3, 2, 5, 0, 0, 3, 4]])
    for k, group, want in (
        (0, 1, []),
        (1, 1, [4]),
        (3, 1, [0, 4, 8]),
        (4, 1, [0, 2, 4, 8]),
        (2, 2, [2, 4]),
        (3, 2, [0, 2, 4]),
        (9, 1, [*range(9)]),
    ):
        mask = OPS.mask_topk(score, k, group)
        n = -(-9 // group)
        assert bits(mask, n)[0].nonzero()[:, 0].tolist() == want, (k, group)
    score = torch.randn(3, 1000)
    want = torch.zeros(3, 1000, dtype=torch.bool).scatter(1, score.topk(77).indices, True)
    assert torch.equal(OPS.mask_topk(score, 77, 1), nl.pack_mask(want))


def test_union() -> None:
    mask = torch.tensor([[1, 0, 2], [4, 0, 2]], dtype=torch.uint8)
    any_, count = OPS.mask_union(mask)
    assert any_.tolist() == [[5, 0, 2]] and count.tolist() == [3]


def test_masks_go_into_the_layer() -> None:
    """A mask of the low-rank predictor limits relu_ffn to the rows that it names."""
    wu, wd = (OPS.relu_ffn_pack(torch.randn(40, 16), False, "fp32", 0)[0] for _ in range(2))
    p1, p2 = (OPS.relu_ffn_pack(torch.randn(*s), False, "fp32", 0)[0] for s in ((4, 16), (40, 4)))
    x = torch.randn(2, 16)
    mask = OPS.mask_lowrank(x, p1, p2, None, None, "relu", torch.zeros(1), "fp32", 4)
    plain = OPS.relu_ffn_unpack(wu, None, "fp32", 16), OPS.relu_ffn_unpack(wd, None, "fp32", 16)
    y, _ = OPS.relu_ffn(x, None, wu, wd, *[None] * 6, "fp32", "relu", None, mask, 1, "sparse")
    h = (x @ plain[0].T).relu() * bits(mask, 40)
    assert torch.allclose(y, h @ plain[1], atol=1e-4)


def test_bad_arguments() -> None:
    w, _ = OPS.relu_ffn_pack(torch.randn(6, 16), False, "fp32", 0)
    x, value = torch.randn(2, 16), torch.randn(2, 4)
    n = torch.tensor([3], dtype=torch.int32)

    def listed(*numbers: int) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int32)

    for index in ((-1, 2, 3, 0), (0, 2, 6, 0), (2, 1, 3, 0), (1, 1, 3, 0)):
        with pytest.raises(RuntimeError, match="rows_dot: index: expected rising numbers below 6"):
            OPS.rows_dot(x, w, None, None, listed(*index), n, "fp32")
        with pytest.raises(RuntimeError, match="rows_axpy: index: expected rising numbers below 6"):
            OPS.rows_axpy(value, listed(*index), n, w, None, None, "fp32", 16, "fp32")
    good = listed(0, 2, 5, -1)
    for call, message in (
        (lambda: OPS.rows_dot(x, w, None, None, good, listed(5), "fp32"), "rows_dot: count: expected 0 to 4, got 5"),
        (lambda: OPS.rows_dot(x, w, None, None, good[None], n, "fp32"), "rows_dot: index: expected int32"),
        (lambda: OPS.rows_axpy(value[:, :3].contiguous(), good, n, w, None, None, "fp32", 16, "fp32"), "rows_axpy: value: expected"),
        (lambda: OPS.rows_axpy(value, good, n, w, None, None, "fp32", 16, "fp8"), "rows_axpy: dtype: expected"),
        (lambda: OPS.nz_compact(x, torch.tensor([-1.0])), "nz_compact: threshold: expected values of at least 0"),
        (lambda: OPS.nz_compact(x[0], None), "nz_compact: x: expected"),
        (lambda: OPS.mask_lowrank(x, w, w, None, None, "gelu", torch.zeros(1), "fp32", 6), "mask_lowrank: act: expected"),
        (lambda: OPS.mask_sign(torch.randn(1, 5), torch.full((2, 1), 255, dtype=torch.uint8), torch.ones(1)), "mask_sign: signs: expected zeros"),
        (lambda: OPS.mask_dynk(-torch.ones(1, 3), 0.5, "share"), "mask_dynk: r: expected finite values of at least 0"),
        (lambda: OPS.mask_dynk(torch.ones(1, 3), 1.5, "share"), "mask_dynk: tau: expected 0 to 1"),
        (lambda: OPS.mask_dynk(torch.ones(1, 3), 0.5, "top"), "mask_dynk: rule: expected"),
        (lambda: OPS.mask_topk(value, 5, 1), "mask_topk: k: expected 0 to 4, got 5"),
        (lambda: OPS.mask_union(value), "mask_union: mask: expected"),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match=message):
            call()


def test_shapes_for_compilers() -> None:
    w, _ = OPS.relu_ffn_pack(torch.randn(6, 16), False, "fp32", 0)
    x = torch.randn(2, 16)
    index, count = torch.tensor([0, 2, 5, -1], dtype=torch.int32), torch.tensor([3], dtype=torch.int32)
    tests = ("test_schema", "test_faketensor")
    for name, arguments in (
        ("nz_compact", (x, None)),
        ("rows_dot", (x, w, None, None, index, count, "fp32")),
        ("rows_axpy", (torch.randn(2, 4), index, count, w, None, None, "fp32", 16, "bf16")),
        ("mask_lowrank", (x, w, OPS.relu_ffn_pack(torch.randn(9, 6), False, "fp32", 0)[0], None, None, "relu", torch.zeros(1), "fp32", 6)),
        ("mask_sign", (x, torch.zeros(9, 2, dtype=torch.uint8), torch.ones(1))),
        ("mask_dynk", (torch.rand(2, 9), 0.5, "share")),
        ("mask_topk", (torch.randn(2, 9), 2, 4)),
        ("mask_union", (torch.zeros(3, 2, dtype=torch.uint8),)),
    ):  # fmt: skip
        torch.library.opcheck(getattr(OPS, name).default, arguments, test_utils=tests)
    compiled = torch.compile(lambda x: OPS.nz_compact(x, None)[1] + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), OPS.nz_compact(x, None)[1] + 1)
