"""dyad_linear against the float64 reference, on every tier, forward and backward, and what it promises besides."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from dyad_cases import ACTS, DTYPES, PAIRS, Dyad, dyad, feed_forward_bound, integers, same_bits
from effk import isa
from effk.ops import dyad_linear as dy
from wq_cases import SIGNIFICANT_BITS, check

SIDES = (1, 3, 8, 24, 96, 192)
TOKENS = (0, 1, 5, 64, 129)
# Beyond the sides above: remainders of every tile, and sums longer than any block of the packed operand.
UNEVEN = ((5, 17, 33), (7, 50, 65), (3, 129, 100), (2, 1003, 45), (1, 40, 3001), (2, 67, 2050), (6, 31, 16), (16, 5, 2))


def biases(seed: int, p: tuple[torch.dtype, torch.dtype]) -> torch.dtype | None:
    """Every kind of bias in turn."""
    return (None, torch.float32, *p)[seed % 4]


@pytest.mark.parametrize("variant", dy.VARIANTS)
@pytest.mark.parametrize("n", (1, 2, 3, 4, 8))
def test_matches_reference(tier: str, n: int, variant: str) -> None:
    """Sides x tokens x layouts, dtypes and biases in turn; the largest on slow tiers with few tokens only.

    The specification asks that no error exceed 2e-6 of the results' rms in fp32, and one rounding in 16 bits; chains of 64
    products keep within it (1.7e-6 for the largest of 10^6 results; one chain of K = 384 reaches 3.7e-6).
    """
    for seed, (d_out, d_in) in enumerate(itertools.product(SIDES, SIDES)):
        dtypes = PAIRS[(seed + n) % 9]
        slow = tier == "scalar" and d_out * d_in * n > 1 << 16
        whole = dyad(
            n, d_out, d_in, 5 if slow else 129, variant, "tokens", *dtypes, biases(seed // 9, dtypes), seed=seed
        )
        expected = whole.reference()
        allowed = whole.bound(expected)
        rms = expected.square().mean().sqrt()
        for tokens in TOKENS[:3] if slow else TOKENS:
            part = whole.tokens(0, tokens)
            for p, y in ((part, part.run()), (part.features(), part.features().run().T)):
                assert y.dtype == dtypes[0]
                check(y, expected[:tokens], allowed[:tokens], str(p))
                if tokens:
                    size = expected[:tokens].abs()
                    rounding = 2.0 ** -SIGNIFICANT_BITS[y.dtype]
                    exact = 0.0 if y.dtype == torch.float32 else rounding
                    check(y, expected[:tokens], 2e-6 * rms + exact * (size + 2e-6 * rms), f"specification: {p}")


@pytest.mark.parametrize("variant", dy.VARIANTS)
@pytest.mark.parametrize("shape", UNEVEN, ids=str)
def test_remainders_and_long_sums(tier: str, shape: tuple[int, int, int], variant: str) -> None:
    for seed, (layout, dtypes) in enumerate(itertools.product(dy.LAYOUTS, PAIRS[:: 4 if tier == "scalar" else 1])):
        p = dyad(*shape, 17 if tier == "scalar" else 70, variant, layout, *dtypes, biases(seed, dtypes), seed=seed)
        expected = p.reference()
        check(p.run(), expected, p.bound(expected), str(p))


@pytest.mark.emulated
@pytest.mark.parametrize("variant", dy.VARIANTS)
def test_matches_reference_small(tier: str, variant: str) -> None:
    """A slice that is quick enough for an emulated CPU: forward, packed and backward."""
    for n, d_out, d_in, tokens in ((4, 24, 8, 5), (3, 17, 33, 13), (2, 50, 20, 1)):
        for dtype, layout, act in zip(DTYPES, ("tokens", "features", "tokens"), ("none", "gelu", "silu"), strict=True):
            p = dyad(n, d_out, d_in, tokens, variant, layout, dtype, act=act)
            expected = p.reference()
            check(p.run(), expected, p.bound(expected), str(p))
            assert same_bits(p.run_packed(), p.run())
            check_backward(p)


@pytest.mark.emulated
@pytest.mark.parametrize("variant", dy.VARIANTS)
def test_small_integers_are_exact(tier: str, variant: str) -> None:
    """Every sum is exact in fp32, so results are the reference rounded once: the same bits on every tier and layout."""
    for (n, d_out, d_in), dtypes in zip(
        ((4, 24, 40), (3, 50, 17), (8, 7, 12), (1, 33, 65)) * 3, [*PAIRS, *PAIRS[:3]], strict=True
    ):
        for tokens in (1, 3, 21):
            p = integers(n, d_out, d_in, tokens, dtypes[0], variant=variant, weights=dtypes[1])
            expected = p.reference()
            assert torch.equal(p.run(), expected.to(dtypes[0])), str(p)
            assert torch.equal(p.features().run().T, expected.to(dtypes[0])), str(p)
            assert torch.equal(p.run_packed(), expected.to(dtypes[0])), str(p)
            gy = torch.randint(-3, 4, expected.shape, generator=torch.Generator().manual_seed(1)).to(dtypes[0])
            for grad, want in zip(p.backward(gy), p.reference_backward(gy), strict=True):
                assert torch.equal(grad, want.to(grad.dtype)), str(p)


# ---- the places of the weights ----------------------------------------------------------------------------------------


def test_permutation() -> None:
    """f = 12, n = 4: P maps (0 .. 11) to (0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11), and its transpose back."""
    x, unit, zero = torch.arange(12.0)[None], torch.eye(3).expand(4, 3, 3).contiguous(), torch.zeros(4, 3, 3)
    y = torch.ops.effk.dyad_linear(x, zero, unit, None, "it", "tokens", "none")
    assert y[0].tolist() == [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]
    assert torch.equal(torch.ops.effk.dyad_linear(y, zero, unit, None, "ot", "tokens", "none"), x)
    assert torch.equal(torch.ops.effk.dyad_linear(x, zero, unit, None, "dt", "tokens", "none"), x)
    assert torch.equal(torch.ops.effk.dyad_linear(x, unit, zero, None, "it", "tokens", "none"), x)


@pytest.mark.parametrize("variant", dy.VARIANTS)
def test_one_weight_is_one_entry(tier: str, variant: str) -> None:
    """Block index and residue are different things: every single weight, at its place and nowhere else."""
    n, d_out, d_in = 3, 4, 5
    for which, d, o, i in itertools.product(range(2), range(n), range(d_out), range(d_in)):
        w = torch.zeros(2, n, d_out, d_in)
        w[which, d, o, i] = 1
        row = o * n + d if which and variant in ("ot", "dt") else d * d_out + o
        column = i * n + d if which and variant in ("it", "dt") else d * d_in + i
        for matrix in (
            torch.ops.effk.dyad_to_dense(w[0], w[1], variant),
            torch.ops.effk.dyad_linear(torch.eye(n * d_in), w[0], w[1], None, variant, "tokens", "none").T,
            torch.ops.effk.dyad_linear(torch.eye(n * d_in), w[0], w[1], None, variant, "features", "none"),
            dy.reference_to_dense(w[0], w[1], variant),
        ):
            assert matrix.nonzero().tolist() == [[row, column]], (which, d, o, i)
            assert matrix[row, column] == 1


@pytest.mark.parametrize("variant", dy.VARIANTS)
def test_shared_places_hold_the_sum(variant: str) -> None:
    for dtype in DTYPES:
        p = dyad(4, 6, 8, 1, variant, dtype=dtype)
        w = torch.ops.effk.dyad_to_dense(p.wl, p.wu, variant)
        assert w.dtype == dtype
        assert torch.equal(w, dy.reference_to_dense(p.wl, p.wu, variant).to(dtype))
    ones = torch.ones(4, 8, 8)
    w = torch.ops.effk.dyad_to_dense(ones, ones, variant)
    assert (w == 2).sum() == w.numel() // 16 and (w > 0).sum() == w.numel() * 7 // 16  # 2/n - 1/n^2 of the places
    rows = (w > 0).sum(1).unique().tolist()
    assert rows == ([8, 16] if variant == "ot" else [14])  # "ot": rows where both components meet have half as many


@pytest.mark.parametrize("variant", dy.VARIANTS)
@pytest.mark.parametrize("n", (1, 2, 3, 4))
def test_projection(n: int, variant: str) -> None:
    """Masking: what is at a place stays, exactly, what is not is lost, and a DYAD matrix comes back."""
    w = torch.randn(24, 36, generator=torch.Generator().manual_seed(n))
    wl, wu = dy.from_dense(w, n, variant)
    kept = torch.ops.effk.dyad_to_dense(wl, wu, variant)
    places = dy.reference_to_dense(torch.ones_like(wl), torch.ones_like(wu), variant) > 0
    assert torch.equal(kept, w * places)
    lost = (w - kept).double().square().sum()
    torch.testing.assert_close(lost, w.double().square()[~places].sum())
    again = dy.from_dense(kept, n, variant)
    assert torch.equal(again[0], wl) and torch.equal(again[1], wu)
    if n == 1:
        assert torch.equal(wl, wu) and torch.equal(kept, w)


def test_projection_refuses() -> None:
    for w, n, variant in ((torch.zeros(8, 9), 2, "it"), (torch.zeros(8), 2, "it"), (torch.zeros(8, 8), 0, "it")):
        with pytest.raises(ValueError, match=r"^from_dense: w: expected a matrix with sides divisible by n"):
            dy.from_dense(w, n, variant)
    with pytest.raises(ValueError, match=r"^from_dense: variant: expected one of .* got 'cat'"):
        dy.from_dense(torch.zeros(8, 8), 2, "cat")


def test_swapped_reshape_is_another_layer() -> None:
    """The trap of the specification: (n, d_in) read as (d_in, n) is a valid layer, and a different one."""
    p = dyad(4, 6, 8, 3)
    wrong = p.x.reshape(3, 4, 8).transpose(1, 2).reshape(3, 32).contiguous()
    assert (replace(p, x=wrong).run() - p.run()).abs().max() > 0.1


# ---- equivalences -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", dy.VARIANTS)
def test_two_calls_and_one(tier: str, variant: str) -> None:
    """The concatenated evaluation equals the published one, two products of blocks, to 1e-6 of the results' rms."""
    p = dyad(4, 96, 192, 64, variant, bias=None)
    blocks, residues = p.x.T.reshape(4, 192, 64), p.x.T.reshape(192, 4, 64).swapaxes(0, 1)
    upper = torch.bmm(p.wu, blocks if variant == "ot" else residues)
    upper = upper.reshape(384, 64) if variant == "it" else upper.swapaxes(0, 1).reshape(384, 64)
    y = (torch.bmm(p.wl, blocks).reshape(384, 64) + upper).T
    error = (p.run() - y).double()
    assert error.square().mean().sqrt() <= 1e-6 * y.square().mean().sqrt()
    assert error.abs().max() <= 4e-6 * y.square().mean().sqrt()  # the two round differently, each by half of 4e-6


@pytest.mark.parametrize("pair", (("it", "ot"), ("ot", "it"), ("dt", "dt")))
def test_duality(tier: str, pair: tuple[str, str]) -> None:
    """The gradient of x is a forward of the dual variant with transposed blocks."""
    for layout in dy.LAYOUTS:
        p = dyad(4, 24, 40, 9, pair[0], layout)
        gy = torch.randn(p.run().shape)
        (gx, *_) = p.backward(gy, (True, False, False, False))
        wl, wu = (w.transpose(1, 2).contiguous() for w in (p.wl, p.wu))
        dual = Dyad(gy, wl, wu, None, pair[1], layout, "none")
        expected = dual.reference()
        check(gx, expected, 2 * dual.bound(expected))
        check(dual.run(), gx.double(), 2 * dual.bound(expected))


@pytest.mark.parametrize("variant", dy.VARIANTS)
def test_one_block_is_the_sum_of_two_dense_matrices(variant: str) -> None:
    p = dyad(1, 50, 60, 7, variant, bias=None)
    expected = p.x.double() @ (p.wl[0].double() + p.wu[0].double()).T
    check(p.run(), expected, p.bound(expected))


# ---- activations and biases -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("act", ACTS)
def test_activations(tier: str, act: str) -> None:
    for seed, (variant, layout, dtypes) in enumerate(itertools.product(dy.VARIANTS, dy.LAYOUTS, PAIRS)):
        p = dyad(4, 24, 20, 19, variant, layout, *dtypes, biases(seed, dtypes), act, seed)
        p = replace(p, x=p.x * 3)
        expected = p.reference()
        check(p.run(), expected, p.bound(expected), str(p))


@pytest.mark.parametrize("act", ACTS)
def test_activations_far_out(tier: str, act: str) -> None:
    """Arguments for which an exponential overflows or vanishes, zero, and NaN, which every activation passes on."""
    values = [0.0, -0.0, 1e-30, 1e-6, 0.5, 1, 3, 5, 8, 12, 20, 50, 88, 90, 104, 1e3, 1e6, 1e12, 1e20, 1e30]
    z = torch.tensor([*values, *(-v for v in values), torch.nan])
    unit = torch.ones(1, 1, 1)
    y = torch.ops.effk.dyad_linear(z[:, None], unit, torch.zeros(1, 1, 1), None, "it", "tokens", act)[:, 0]
    assert y[-1].isnan()
    expected = Dyad(z[:-1, None], unit, 0 * unit, None, "it", "tokens", act).reference()[:, 0]
    p = Dyad(z[:-1, None], unit, 0 * unit, None, "it", "tokens", act)
    check(y[:-1], expected, p.bound(expected[:, None])[:, 0])


# ---- independence of threads, batch, strides ---------------------------------------------------------------------------


@pytest.mark.parametrize("variant", dy.VARIANTS)
def test_result_does_not_depend_on_threads(variant: str) -> None:
    for (n, d_out, d_in, tokens), layout, dtype in zip(
        ((4, 192, 768, 150), (8, 96, 200, 1), (3, 50, 70, 333), (4, 256, 64, 8)) * 2,
        ("tokens",) * 4 + ("features",) * 4,
        (torch.float32, torch.bfloat16) * 4,
        strict=True,
    ):
        p = dyad(n, d_out, d_in, tokens, variant, layout, dtype)
        packed, gy = p.packed(), torch.randn(p.run().shape).to(dtype)
        torch.set_num_threads(1)
        alone = (p.run(), p.run_packed(packed), *p.backward(gy))
        for threads in (2, 3, 4, 7):
            torch.set_num_threads(threads)
            for a, b in zip(alone, (p.run(), p.run_packed(packed), *p.backward(gy)), strict=True):
                assert same_bits(a, b), (str(p), threads)


@pytest.mark.parametrize("variant", dy.VARIANTS)
def test_token_does_not_depend_on_its_batch(tier: str, variant: str) -> None:
    for layout, dtype in itertools.product(dy.LAYOUTS, DTYPES):
        p = dyad(4, 50, 33, 77, variant, layout, dtype)
        whole = p.run() if layout == "tokens" else p.run().T
        for tokens in (1, 2, 3, 4, 6, 8, 9, 16, 17, 31):
            for first in (0, 7, 77 - tokens):
                part = p.tokens(first, first + tokens)
                y = part.run() if layout == "tokens" else part.run().T
                assert same_bits(y, whole[first : first + tokens]), (str(part), first)


@pytest.mark.parametrize("variant", dy.VARIANTS)
def test_packed_is_the_same_function(tier: str, variant: str) -> None:
    """Bit for bit, packed once or in the call; and rounding while packing is rounding before."""
    for layout, dtypes, act, tokens in itertools.product(dy.LAYOUTS, PAIRS, ("none", "gelu"), (0, 1, 9)):
        p = dyad(3, 50, 33, tokens, variant, layout, *dtypes, act=act)
        assert same_bits(p.run_packed(), p.run()), str(p)
    for dtype in DTYPES:
        p = dyad(3, 50, 33, 5, variant, weights=torch.float32)
        rounded = replace(p, wl=p.wl.to(dtype), wu=p.wu.to(dtype))
        assert torch.equal(p.packed(dtype), rounded.packed())


def test_layouts_agree(tier: str) -> None:
    for variant, dtype in itertools.product(dy.VARIANTS, DTYPES):
        p = dyad(4, 24, 96, 33, variant, dtype=dtype)
        expected = p.reference()
        check(p.features().run().T, p.run().double(), 2 * p.bound(expected), str(p))


@pytest.mark.parametrize("bad", (torch.nan, torch.inf))
def test_non_finite_token_stays_alone(tier: str, bad: float) -> None:
    for variant, layout, dtype in itertools.product(dy.VARIANTS, dy.LAYOUTS, DTYPES):
        p = dyad(4, 20, 24, 9, variant, layout, dtype)
        clean = p.run() if layout == "tokens" else p.run().T
        x = p.x.clone()
        (x if layout == "tokens" else x.T)[5, 13] = bad
        y = replace(p, x=x).run()
        y = y if layout == "tokens" else y.T
        keep = torch.arange(9) != 5
        assert same_bits(y[keep], clean[keep]), str(p)
        touched = dy.reference_to_dense(torch.ones(4, 20, 24), torch.ones(4, 20, 24), variant)[:, 13] > 0
        assert not y[5][touched].isfinite().any() and y[5][~touched].isfinite().all(), str(p)


def shifted(t: torch.Tensor | None) -> torch.Tensor | None:
    """The same in the middle of an allocation, at an address that no vector is aligned to."""
    if t is None:
        return None
    room = torch.empty(t.numel() + 1, dtype=t.dtype)
    room[1:] = t.flatten()
    return room[1:].view(t.shape)


def test_misaligned_buffers(tier: str) -> None:
    for variant, layout, dtype in itertools.product(dy.VARIANTS, dy.LAYOUTS, DTYPES):
        p = dyad(3, 50, 33, 9, variant, layout, dtype)
        odd = replace(p, x=shifted(p.x), wl=shifted(p.wl), wu=shifted(p.wu), bias=shifted(p.bias))
        assert same_bits(odd.run(), p.run()), str(p)
        assert same_bits(odd.run_packed(shifted(p.packed())), p.run()), str(p)
        gy = torch.randn(p.run().shape).to(dtype)
        for a, b in zip(odd.backward(shifted(gy)), p.backward(gy), strict=True):
            assert same_bits(a, b), str(p)


def test_shapes_of_x() -> None:
    p = dyad(4, 6, 8, 30)
    whole, packed = p.run(), p.packed()
    for shape in ((2, 3, 5, 32), (30, 1, 32), (1, 30, 32)):
        y = replace(p, x=p.x.reshape(shape))
        assert same_bits(y.run(), whole.reshape(*shape[:-1], 24))
        assert same_bits(y.run_packed(packed), whole.reshape(*shape[:-1], 24))
    assert same_bits(replace(p, x=p.x[4]).run(), whole[4])
    for shape in ((0, 32), (2, 0, 32)):
        for dtype in DTYPES:
            empty = replace(p, x=torch.empty(shape, dtype=dtype))
            for y in (empty.run(), empty.run_packed(packed)):
                assert y.shape == (*shape[:-1], 24) and y.dtype == dtype
    none = replace(p, x=torch.empty(32, 0), layout="features")
    assert none.run().shape == none.run_packed(packed).shape == (24, 0)
    assert same_bits(dy.dyad_linear(p.x.T.contiguous().T, *p.arguments[1:]), whole)
    assert same_bits(dy.dyad_linear(p.x[::3], *p.arguments[1:]), whole[::3])


# ---- backward ---------------------------------------------------------------------------------------------------------


def check_backward(p: Dyad, seed: int = 0) -> None:
    gy = torch.randn(p.run().shape, generator=torch.Generator().manual_seed(seed)).to(p.x.dtype)
    expected = p.reference_backward(gy)
    grads = p.backward(gy)
    for name, grad, want, allowed in zip(
        ("gx", "gwl", "gwu", "gb"), grads, expected, p.backward_bounds(gy, expected), strict=True
    ):
        check(grad, want.reshape(grad.shape), allowed.reshape(grad.shape), f"{name} of {p}")
    assert [g.dtype for g in grads] == [p.x.dtype, p.wl.dtype, p.wu.dtype, torch.float32]


@pytest.mark.parametrize("layout", dy.LAYOUTS)
@pytest.mark.parametrize("variant", dy.VARIANTS)
def test_backward_matches_reference(tier: str, variant: str, layout: str) -> None:
    small = itertools.product((1, 2, 3, 4, 8), (1, 3, 24), (1, 8, 40), (1, 5, 33))
    for seed, (n, d_out, d_in, tokens) in enumerate(small):
        check_backward(dyad(n, d_out, d_in, tokens, variant, layout, *PAIRS[seed % 9], seed=seed), seed)
    if tier != "scalar":
        for seed, shape in enumerate(((4, 192, 96, 150), (2, 67, 300, 1100), (1, 600, 40, 9), (8, 33, 24, 2100))):
            check_backward(dyad(*shape, variant, layout, *PAIRS[4 * (seed % 2)], seed=seed), seed)


@pytest.mark.parametrize("variant", dy.VARIANTS)
def test_backward_of_no_tokens(variant: str) -> None:
    for layout in dy.LAYOUTS:
        p = dyad(4, 6, 8, 0, variant, layout, torch.bfloat16)
        gx, gwl, gwu, gb = p.backward(p.run())
        assert gx.shape == p.x.shape and gwl.shape == gwu.shape == p.wl.shape and gb.shape == (24,)
        assert not gwl.any() and not gwu.any() and not gb.any()


def test_backward_gives_what_is_asked_for(tier: str) -> None:
    """Every mask: what is wanted has the same bits as with everything wanted, the rest is empty."""
    for variant, layout, dtype in itertools.product(dy.VARIANTS, dy.LAYOUTS, (torch.float32, torch.bfloat16)):
        p = dyad(4, 12, 20, 11, variant, layout, dtype)
        gy = torch.randn(p.run().shape).to(dtype)
        everything = p.backward(gy)
        for mask in itertools.product((False, True), repeat=4):
            for grad, full, wanted in zip(p.backward(gy, mask), everything, mask, strict=True):
                assert same_bits(grad, full) if wanted else grad.shape == (0,), (str(p), mask)
                assert grad.dtype == full.dtype


# ---- feed-forward -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("variant", dy.VARIANTS)
def test_feed_forward(tier: str, variant: str, act: str) -> None:
    """Both layers; the error of the hidden features goes through the second one and adds to its own."""
    for seed, ((n, hidden, side), tokens, dtypes) in enumerate(
        zip(
            ((4, 48, 12), (3, 33, 17), (8, 24, 24), (2, 300, 70)),
            (1, 9, 130, 40),
            (PAIRS[0], PAIRS[4], PAIRS[8], PAIRS[1]),
            strict=True,
        )
    ):
        one = dyad(n, hidden, side, tokens, variant, "tokens", *dtypes, act=act, seed=seed)
        two = dyad(
            n, side, hidden, 1, variant, "tokens", *dtypes, bias=None if seed % 2 else torch.float32, seed=seed + 9
        )
        y = torch.ops.effk.dyad_ff(
            one.x, one.packed(), one.bias, two.packed(), two.bias, one.f_out, two.f_out, act, variant
        )
        assert y.dtype == dtypes[0] and y.shape == one.x.shape
        features = one.reference()
        expected = dy.reference(features, *two.arguments[1:4], variant)
        check(y, expected, feed_forward_bound(one, two, features, expected), f"{one} seed {seed}")


def test_feed_forward_is_the_two_layers(tier: str) -> None:
    """Bit for bit: the same sums, kept in cache in between. And of a token of any batch and number of threads."""
    for variant, dtypes in itertools.product(dy.VARIANTS, PAIRS):
        one, two = (
            dyad(4, *sides, 150, variant, "tokens", *dtypes, act=act)
            for sides, act in (((96, 24), "gelu"), ((24, 96), "none"))
        )
        arguments = (one.packed(), one.bias, two.packed(), two.bias, one.f_out, two.f_out, "gelu", variant)
        y = torch.ops.effk.dyad_ff(one.x, *arguments)
        assert same_bits(y, replace(two, x=one.run()).run())
        for tokens in (1, 7, 64):
            assert same_bits(torch.ops.effk.dyad_ff(one.x[5 : 5 + tokens], *arguments), y[5 : 5 + tokens])
        for threads in (2, 3, 7):
            torch.set_num_threads(threads)
            assert same_bits(torch.ops.effk.dyad_ff(one.x, *arguments), y)
        torch.set_num_threads(1)
    assert torch.ops.effk.dyad_ff(torch.empty(2, 0, 96), *arguments).shape == (2, 0, 96)


def on_every_tier(call) -> dict[str, torch.Tensor]:  # type: ignore[no-untyped-def]
    results = {}
    for name in isa.supported():
        with isa.use(name):
            results[name] = call()
    return results


def test_packed_bytes_do_not_depend_on_the_tier() -> None:
    for variant, dtype in itertools.product(dy.VARIANTS, DTYPES):
        p = dyad(3, 50, 33, 1, variant, dtype=dtype)
        results = on_every_tier(p.packed)
        assert all(torch.equal(packed, results["scalar"]) for packed in results.values())


def test_bounds_are_tight_enough_to_fail() -> None:
    """One wrong weight among 192 is seen: the tolerance is not so wide that anything passes."""
    p = dyad(4, 96, 96, 64)
    expected = p.reference()
    wu = p.wu.clone()
    wu[2, 7, 11] += 0.01
    error = (replace(p, wu=wu).run() - expected).abs()
    assert (error > 10 * p.bound(expected)).any(dim=0).nonzero().flatten().tolist() == [2 * 96 + 7]
