"""dyad_wq_linear: quantised blocks on wq_linear's own kernels, against the float64 reference and against wq_linear."""

from __future__ import annotations

import itertools

import pytest
import torch

from dyad_cases import same_bits
from effk.formats.wq import WqWeight
from effk.ops import dyad_linear as dy
from effk.ops import wq_linear as wq
from wq_cases import BITS, DTYPES, bound, check, gamma, kinds, random_input, random_weight

COMPUTE = ("float", "int8")
SHAPES = ((4, 16, 8), (3, 32, 33), (2, 48, 100), (8, 16, 65), (1, 64, 70))  # n, d_out, d_in
ops = torch.ops.effk


def stacked_weight(
    n: int, d_out: int, d_in: int, variant: str, bits: int, group: int, kind: str, **how: object
) -> WqWeight:
    rows, columns = (n * d_out, 2 * d_in) if variant == "it" else (2 * n * d_out, d_in)
    return random_weight(rows, columns, bits, group, kind, **how)  # type: ignore[arg-type]


def run(
    x: torch.Tensor, weight: WqWeight, n: int, variant: str, bias: torch.Tensor | None, compute: str
) -> torch.Tensor:
    packed = wq.pack(weight)
    parts = 1 if variant == "it" else 2
    f_out, f_in = weight.n // parts, weight.k * n * parts // 2
    return ops.dyad_wq_linear(
        x, packed.packed, packed.scales, packed.zeros, packed.codebook, bias, n, f_out, f_in, weight.bits,
        weight.group_size, variant, compute,
    )  # fmt: skip


def products(x: torch.Tensor, weight: WqWeight, n: int, variant: str) -> list[tuple[torch.Tensor, WqWeight, slice]]:
    """The plain products that the layer is the sum of: inputs, rows of the weight, outputs."""
    parts = 1 if variant == "it" else 2
    d_out, d_in = weight.n // (parts * n), weight.k * parts // 2
    found = []
    for d in range(n):
        block, residue, first = x[:, d * d_in : (d + 1) * d_in], x[:, d::n], d * d_out
        outputs = slice(first, first + d_out)
        if variant == "it":
            found.append((torch.cat((block, residue), 1), weight.rows(first, first + d_out), outputs))
            continue
        half = weight.n // 2 + first
        found.append((block.contiguous(), weight.rows(first, first + d_out), outputs))
        second = block if variant == "ot" else residue
        found.append((second.contiguous(), weight.rows(half, half + d_out), slice(d, None, n)))
    return found


def allowed(
    x: torch.Tensor, weight: WqWeight, n: int, variant: str, y: torch.Tensor, bias: torch.Tensor | None, compute: str
) -> torch.Tensor:
    """The bounds of the products, each with a rounding to the dtype of x that may happen, and of their sum."""
    total = 2 * gamma(3) * y.abs() + (0 if bias is None else gamma(3) * bias.double().abs())
    for inputs, rows, outputs in products(x, weight, n, variant):
        part = wq.reference(inputs, rows, None, compute)
        total[:, outputs] += bound(inputs, rows, part, None, compute)
    unit = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[x.dtype]
    return total + unit * (y.abs() + total)


@pytest.mark.parametrize("variant", dy.VARIANTS)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("compute", COMPUTE)
def test_matches_reference(tier: str, compute: str, bits: int, variant: str) -> None:
    for seed, (kind, (n, d_out, d_in)) in enumerate(itertools.product(kinds(bits, compute), SHAPES)):
        group = (32, 64, 0, 128)[seed % 4]
        weight = stacked_weight(n, d_out, d_in, variant, bits, group, kind, seed=seed)
        bias = torch.randn(n * d_out) if seed % 2 else None
        for tokens, dtype in (
            (0, torch.float32),
            (1, DTYPES[seed % 3]),
            (4, DTYPES[(seed + 1) % 3]),
            (21, torch.float32),
        ):
            x = random_input(tokens, n * d_in, dtype, seed)
            y = run(x, weight, n, variant, bias, compute)
            assert y.dtype == dtype and y.shape == (tokens, n * d_out)
            if not tokens:
                continue
            expected = dy.reference_wq(x, weight, n, bias, variant, compute)
            limit = allowed(x, weight, n, variant, expected, bias, compute)
            check(y, expected, limit, f"{kind} {n} {d_out}x{d_in} group {group} tokens {tokens} {dtype}")


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("compute", COMPUTE)
def test_blocks_run_the_kernels_of_wq_linear(tier: str, compute: str, bits: int) -> None:
    """ "it": each block of outputs has the bits that wq_linear gives for its rows over both halves of its inputs."""
    for kind, dtype in itertools.product(kinds(bits, compute), DTYPES):
        weight, bias = stacked_weight(4, 32, 40, "it", bits, 32, kind), torch.randn(128)
        x = random_input(9, 160, dtype)
        for tokens in (1, 4, 9):
            y = run(x[:tokens], weight, 4, "it", bias, compute)
            for inputs, rows, outputs in products(x[:tokens], weight, 4, "it"):
                alone = wq.linear(inputs, wq.pack(rows), bias[outputs].contiguous(), compute)
                assert same_bits(y[:, outputs], alone), (kind, dtype, tokens)


@pytest.mark.parametrize("variant", dy.VARIANTS)
@pytest.mark.parametrize("compute", COMPUTE)
def test_independent_of_threads_and_batch(tier: str, compute: str, variant: str) -> None:
    weight = stacked_weight(4, 64, 100, variant, 4, 64, "asymmetric")
    for dtype in (torch.float32, torch.bfloat16):
        x = random_input(33, 400, dtype)
        torch.set_num_threads(1)
        whole = run(x, weight, 4, variant, None, compute)
        for tokens, first in itertools.product((1, 4, 5, 16), (0, 7)):
            assert same_bits(
                run(x[first : first + tokens], weight, 4, variant, None, compute), whole[first : first + tokens]
            )
        for threads in (2, 3, 7):
            torch.set_num_threads(threads)
            assert same_bits(run(x, weight, 4, variant, None, compute), whole)
            assert same_bits(run(x[:1], weight, 4, variant, None, compute), whole[:1])


def test_stacked_and_back() -> None:
    wl, wu = torch.randn(3, 4, 5), torch.randn(3, 4, 5)
    for variant, shape in (("it", (12, 10)), ("ot", (24, 5)), ("dt", (24, 5))):
        w = dy.stacked(wl, wu, variant)
        assert w.shape == shape
        again = dy.unstacked(w, 3, variant)
        assert torch.equal(again[0], wl) and torch.equal(again[1], wu)
    assert dy.stacked(wl, wu, "it")[2 * 4 + 1].tolist() == [*wl[2, 1].tolist(), *wu[2, 1].tolist()]
    assert dy.stacked(wl, wu, "dt")[12 + 2 * 4 + 1].tolist() == wu[2, 1].tolist()


@pytest.mark.parametrize("variant", dy.VARIANTS)
def test_gradient(variant: str) -> None:
    for dtype, compute in itertools.product((torch.float32, torch.bfloat16), COMPUTE):
        weight = stacked_weight(4, 16, 20, variant, 4, 32, "asymmetric")
        x, bias = random_input(6, 80, dtype).requires_grad_(), torch.randn(64, requires_grad=True)
        y = run(x, weight, 4, variant, bias, compute)
        gy = torch.randn(y.shape).to(dtype)
        y.backward(gy)
        wl, wu = dy.unstacked(weight.dequantize(), 4, variant)
        expected = dy.reference_backward(gy, x.detach(), wl, wu, variant)
        close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2**-7, "atol": 2**-7}
        torch.testing.assert_close(x.grad.double(), expected[0], **close)
        torch.testing.assert_close(bias.grad.double(), expected[3], **close)


def test_opcheck_and_compile() -> None:
    for variant, kind in (("it", "symmetric"), ("ot", "asymmetric"), ("dt", "row_tables")):
        weight = stacked_weight(2, 16, 20, variant, 4, 32, kind)
        packed, x = wq.pack(weight), random_input(3, 40)
        rest = (
            packed.packed,
            packed.scales,
            packed.zeros,
            packed.codebook,
            torch.randn(32),
            2,
            32,
            40,
            4,
            32,
            variant,
            "float",
        )
        torch.library.opcheck(ops.dyad_wq_linear.default, (x, *rest))
        torch.library.opcheck(ops.dyad_wq_linear.default, (x.clone().requires_grad_(), *rest))
        compiled = torch.compile(lambda x, rest=rest: ops.dyad_wq_linear(x, *rest), fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), ops.dyad_wq_linear(x, *rest))


WEIGHT = stacked_weight(2, 16, 20, "it", 4, 32, "asymmetric")
PACKED = wq.pack(WEIGHT)
GOOD = (random_input(3, 40), *PACKED.tensors[:4], torch.randn(32), 2, 32, 40, 4, 32, "it", "float")
BAD = {
    "x dtype": (0, GOOD[0].double(), r"x: expected float32.* got .*float64"),
    "x features": (0, GOOD[0][:, 1:].contiguous(), r"x: expected .*40.* got .*\[3, 39\]"),
    "packed dtype": (1, PACKED.packed.char(), r"packed: expected uint8 .* got int8"),
    "packed shape": (1, PACKED.packed[1:].contiguous(), r"packed: expected uint8 .* got uint8"),
    "scales": (2, PACKED.scales.bfloat16(), r"scales: expected float16 or float32 .* got bfloat16"),
    "zeros": (3, PACKED.zeros.int(), r"zeros: expected uint8 .* got int32"),
    "codebook": (4, torch.zeros(15), r"(zeros|codebook): expected"),
    "bias": (5, GOOD[5][1:].contiguous(), r"bias: expected .*\[32\].* got .*\[31\]"),
    "n": (6, 3, r"(n_dyad|n|f_out|f_in): expected .* got"),
    "n zero": (6, 0, r"n_dyad: expected .* got 0"),
    "n negative": (6, -2, r"n_dyad: expected .* got -2"),
    "blocks of 8 outputs": (6, 4, r"(n_dyad|f_out|d_out): expected .*16.* got"),
    "f_out": (7, 64, r"(packed|f_out): expected .* got"),
    "f_in": (8, 80, r"(x|packed|f_in): expected .* got"),
    "bits": (9, 5, r"bits: expected 2, 3, 4 or 8, got 5"),
    "group": (10, 48, r"group_size: expected .* got 48"),
    "variant": (11, "cat", r"variant: expected .* got 'cat'"),
    "another variant": (11, "ot", r"packed: expected .* got"),
    "compute": (12, "int4", r"compute: expected 'float' or 'int8', got 'int4'"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_argument(case: str) -> None:
    place, value, message = BAD[case]
    assert ops.dyad_wq_linear(*GOOD).shape == (3, 32)
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"^dyad_wq_linear: " + message):
        ops.dyad_wq_linear(*GOOD[:place], value, *GOOD[place + 1 :])
