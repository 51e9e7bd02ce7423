"""relu_ffn and input_sparse_linear against float64: gates, types of rows, masks, batches, threads, bad arguments."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from effk.ops import relu_ffn as rf
from relu_cases import OPS, STORE, Layer, check, check_input_sparse, value_of


def threads(n: int) -> None:
    torch.set_num_threads(n)


FIXTURE = (
    torch.tensor([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 2, -1], [1, 1, 2, 1.0]]),
    torch.tensor([[2, 1, 0, 0], [1, 1, 1, 1], [0, 0, 4, 0], [0, 1, 0, 1.0]]),
    torch.tensor([[1, 2, 3, 4], [9, 9, 9, 9], [5, 5, 5, 5], [1, -1, 0, 2.0]]),
)
FIXTURE_X = torch.tensor([[1, -2, 0.5, 3, 0], [-1, 1, 1, 0, 0]])


def fixture(rows: str, gated: bool = True) -> Layer:
    """The layer of section 8.2, with a fifth column that meets a zero in x and holds the largest code: scales are 1 and codes
    exact, but for the row of nines in int4 (scale 9 / 7)."""
    layer = Layer(5, 4, rows, gated=gated, biases=False)
    for i in range(0 if gated else 1, 3):
        wide = torch.nn.functional.pad(FIXTURE[i], (0, 1), value=127 if rows == "int8" else 7)
        w, scales = OPS.relu_ffn_pack(wide, False, rows, 0)
        layer.packed[i] = w, scales if scales.numel() else None
    return layer


@pytest.mark.parametrize("rows", rf.ROWS)
@pytest.mark.parametrize("gate", rf.GATES)
def test_fixture_of_the_specification(tier: str, gate: str, rows: str) -> None:
    param = {"shifted_relu": 0.5, "fatrelu": 1.5, "silu_threshold": 0.25, "gelu_gauss": 0.6744898, "top_k": 1.0}.get(
        gate
    )
    y, nnz = fixture(rows).run(FIXTURE_X, gate, None if param is None else torch.tensor([param]), mode="auto")
    want = {
        "relu": ([3, -3, 0, 6], 2), "relu2": ([9, -9, 0, 18], 2), "shifted_relu": ([2.5, -2.5, 0, 5], 2), "fatrelu": ([3, -3, 0, 6], 1),
        "drelu": ([3, -3, 0, 6], 2), "silu_threshold": ([2.857722, -2.857722, 0, 5.715445], 2),
        "gelu_gauss": ([1.477508, -1.477508, 0, 2.955016], 1), "top_k": ([3, -3, 0, 6], 1),
    }[gate]  # fmt: skip
    assert torch.allclose(y[0, :4], torch.tensor(want[0]).float(), atol=1e-5)
    assert nnz[0] == want[1]
    if gate == "relu":
        assert torch.allclose(y[1, :4], torch.tensor([51.0, 47, 49, 53]), atol=1e-5) and nnz[1] == 3


@pytest.mark.parametrize("rows", rf.ROWS)
def test_fixture_with_biases_and_without_a_gate(tier: str, rows: str) -> None:
    layer = fixture(rows)
    layer.biases = [torch.tensor(b) for b in ([-2.0, 0, 0, 0], [0.0, 0, 0, 1], [1.0, 1, 1, 1, 0])]
    y, nnz = layer.run(FIXTURE_X[:1], "relu", None)
    assert y[0, :4].tolist() == [7, -5, 1, 13] and nnz[0] == 1  # g = (-1, -2, -2, 3), u_3 = 2
    y, nnz = fixture(rows, gated=False).run(FIXTURE_X[:1], "relu", None)  # h = u = (0, 2.5, 2, 1)
    assert torch.allclose(y[0, :4], torch.tensor([33.5, 31.5, 32.5, 34.5]), atol=1e-5) and nnz[0] == 3


def threshold_at(gates: Tensor, density: float) -> Tensor:
    """A threshold that lets the share of all gates through, in the middle of the widest gap near there."""
    order = gates.flatten().sort().values
    cut, n = round((1 - density) * order.numel()), order.numel()
    if density in (0.0, 1.0) or not 0 < cut < n:
        return order[-1:] + 1 if density < 0.5 else order[:1] - 1
    low, high = max(0, cut - 1 - n // 50), min(n - 1, cut + n // 50)
    at = low + int(order[low : high + 1].diff().argmax())
    return (order[at : at + 1] + order[at + 1]) / 2


def test_sweep_of_sizes(tier: str) -> None:
    """Odd and large sides, no token to eight, no neuron active to all of them."""
    sizes = [*itertools.product((64, 100, 128, 768, 2048, 4096, 4100), (1, 7, 16, 17, 64))]
    sizes += [(64, 3072), (100, 3072), (64, 11008)]
    for i, (d, f) in enumerate(sizes):
        tokens, density = (0, 1, 2, 3, 5, 8)[i % 6], (0.0, 1 / f, 0.05, 0.33, 0.9, 1.0)[(i + i // 6) % 6]
        rows = rf.ROWS[i % 5]
        layer = Layer(d, f, rows, 32 if rows == "int4" and i % 2 else 0, gated=i % 3 != 1)
        x = torch.randn(tokens, d).to((torch.float32, torch.bfloat16, torch.float16)[i % 3])
        w, bias = (layer.plain[1], layer.biases[1]) if layer.plain[0] is None else (layer.plain[0], layer.biases[0])
        gates = torch.nn.functional.linear(x.double(), w.double(), bias.double())
        param = threshold_at(gates, density).float() if tokens else torch.zeros(1)
        assert layer.far_from_cuts(x, "shifted_relu", param)
        y = check(layer, x, "shifted_relu", param)
        if density == 0:
            assert torch.equal(y, layer.biases[2].to(x.dtype).expand(tokens, -1)), "the bias of down, exactly"


def test_extreme_quantiles(tier: str) -> None:
    """A cut 20 deviations below the mean lets all through, above it none."""
    layer, x = Layer(96, 300), torch.randn(3, 96)
    for z, active in ((-20.0, 300), (20.0, 0)):
        check(layer, x, "gelu_gauss", torch.tensor([z]))
        y, nnz = layer.run(x, "gelu_gauss", torch.tensor([z]))
        assert nnz.tolist() == [active] * 3
    assert torch.equal(y, layer.biases[2].expand(3, -1))
    plain = Layer(96, 300, biases=False)
    for mode in ("sparse", "dense"):  # a sum of nothing is +0, whatever the signs of what is left out
        y, _ = plain.run(-x, "gelu_gauss", torch.tensor([20.0]), mode=mode)
        assert not y.any() and not y.signbit().any()


@pytest.mark.parametrize("rows", rf.ROWS)
def test_the_order_of_neurons_is_free(tier: str, rows: str) -> None:
    """Rows, their scales and biases permuted alike: the same up to the order of the sum over neurons."""
    layer, x, param = Layer(96, 300, rows, 32 if rows == "int4" else 0), torch.randn(3, 96), torch.rand(300)
    y, nnz = layer.run(x, "fatrelu", param)
    order = torch.randperm(300)
    layer.packed = [(w[order].contiguous(), None if s is None else s[order].contiguous()) for w, s in layer.packed]
    layer.biases = [layer.biases[0][order], layer.biases[1][order], layer.biases[2]]
    again, count = layer.run(x, "fatrelu", param[order])
    assert torch.equal(nnz, count)
    bound = layer.bound(x, "fatrelu", param)  # does not depend on the order
    assert bool(((y - again).abs() <= 2 * (bound + STORE[x.dtype] * y.abs())).all())


@pytest.mark.emulated
@pytest.mark.parametrize("rows", rf.ROWS)
def test_gates_and_rows(tier: str, rows: str) -> None:
    """Every gate with every type of rows; sizes, groups, biases, dtypes and numbers of tokens in turn."""
    sizes = itertools.cycle(((64, 48), (100, 33), (4, 7), (132, 1), (768, 300)))
    turn = itertools.count()
    for gate, gated in itertools.product(rf.GATES, (True, False)):
        if gate == "drelu" and not gated:
            continue
        i, (d, f) = next(turn), next(sizes)
        group = (0, 32, 64, 128)[i % 4] if rows in ("int8", "int4") else 0
        layer = Layer(d, f, rows, group, gated, biases=i % 3 != 0)
        dtype = (torch.float32, torch.bfloat16, torch.float16)[i % 3]
        check(layer, torch.randn((1, 2, 3, 5, 8, 9)[i % 6], d).to(dtype), gate, value_of(gate, f, each=i % 2 == 1))


@pytest.mark.parametrize("rows", ("bf16", "int4"))
def test_densities(tier: str, rows: str) -> None:
    layer = Layer(128, 600, rows, 32 if rows == "int4" else 0)
    x = torch.randn(3, 128)
    for b in (-1e9, -1.0, 0.0, 1.0, 1.5, 1e9):
        y = (
            check(layer, x, "shifted_relu", torch.tensor([b]))
            if abs(b) < 1e8
            else layer.run(x, "shifted_relu", torch.tensor([b]))[0]
        )
        if b > 1e8:
            assert torch.equal(y, layer.biases[2].expand(3, -1))


def test_thresholds_of_neurons(tier: str) -> None:
    layer = Layer(128, 600)
    check(layer, torch.randn(2, 128), "fatrelu", torch.rand(600))


def test_ties_of_top_k(tier: str) -> None:
    """Of equal gates the first are kept, in blocks and across them."""
    layer = Layer(64, 600, biases=False)
    wg = torch.randn(1, 64).expand(600, 64) * torch.tensor([1.0, -1.0]).repeat(300)[:, None]
    layer.packed[0], layer.plain[0] = (OPS.relu_ffn_pack(wg.contiguous(), False, "fp32", 0)[0], None), wg
    x = torch.randn(1, 64)
    for k in (1, 5, 300, 599):
        y, nnz = layer.run(x, "top_k", torch.tensor([float(k)]))
        layer.packed[1][0].view(torch.float32)[k:] = torch.nan
        again, _ = layer.run(x, "top_k", torch.tensor([float(k)]))
        layer.packed[1] = OPS.relu_ffn_pack(layer.plain[1], False, "fp32", 0)[0], None
        assert nnz == k and torch.equal(y, again), k


def test_inactive_rows_are_not_read(tier: str) -> None:
    """NaN in rows of up and down that no gate lets through reaches nothing."""
    layer = Layer(64, 40, biases=False)
    x = torch.randn(1, 64)
    y, nnz = layer.run(x, "relu", None)
    active = (x @ layer.plain[0].T)[0] > 0
    for place in (1, 2):
        layer.packed[place][0].view(torch.float32)[~active] = torch.nan
    again, _ = layer.run(x, "relu", None)
    assert torch.equal(y, again) and 0 < nnz < 40


def test_auto_reads_all_where_most_are_active(tier: str) -> None:
    """With the same bits; NaN in rows that need not be read shows which were."""
    layer = Layer(64, 400)
    x = torch.randn(1, 64)
    gates = (x @ layer.plain[0].T)[0] + layer.biases[0]
    for density, all_read in ((0.5, False), (0.9, True)):
        param = gates.quantile(1 - density).reshape(1)
        y = layer.run(x, "shifted_relu", param, mode="auto")[0]
        assert torch.equal(y, layer.run(x, "shifted_relu", param)[0])
        good = layer.packed[2][0].clone()
        layer.packed[2][0].view(torch.float32)[gates <= param] = torch.nan
        assert layer.run(x, "shifted_relu", param, mode="auto")[0].isnan().any() == all_read, density
        layer.packed[2][0].copy_(good)


def test_nan_is_active(tier: str) -> None:
    layer = Layer(64, 40)
    x = torch.randn(2, 64)
    good = layer.run(x[1:], "relu", None)[0]
    x[0, 3] = torch.nan
    y, nnz = layer.run(x, "relu", None)
    assert bool(y[0].isnan().all()) and nnz[0] == 40 and torch.equal(y[1:], good)


@pytest.mark.parametrize("gate", ("relu", "gelu_gauss", "top_k", "fatrelu"))
def test_masks(tier: str, gate: str) -> None:
    layer = Layer(96, 300)
    for tokens, shared, group in ((1, True, 1), (3, True, 4), (3, False, 16), (8, False, 128), (2, True, 1000)):
        bits = math.ceil(300 / group)
        width = math.ceil(bits / 8)
        mask = torch.randint(0, 256, (1 if shared else tokens, width), dtype=torch.uint8)
        spare = bits % 8
        if spare:
            mask[:, -1] &= (1 << spare) - 1
        x = torch.randn(tokens, 96)
        y = check(layer, x, gate, value_of(gate, 300), mask, group)
        if shared:
            each = mask.expand(tokens, -1).contiguous()
            assert torch.equal(layer.run(x, gate, value_of(gate, 300), each, group)[0], y), "a mask a token"
    x = torch.randn(2, 96)
    ones = torch.full((1, 38), 255, dtype=torch.uint8)
    ones[0, -1] = (1 << 300 % 8) - 1
    assert torch.equal(layer.run(x, gate, value_of(gate, 300), ones)[0], layer.run(x, gate, value_of(gate, 300))[0])
    none, nnz = layer.run(x, gate, value_of(gate, 300), torch.zeros_like(ones))
    assert torch.equal(none, layer.biases[2].expand(2, -1)) and nnz.sum() == 0


@pytest.mark.parametrize("rows", rf.ROWS)
def test_same_bits_whatever_the_threads_and_the_batch(tier: str, rows: str) -> None:
    layer = Layer(520, 900, rows, 64 if rows in ("int8", "int4") else 0)
    x = torch.randn(11, 520)
    first = layer.run(x, "relu", None)[0]
    for n in (1, 2, 3, 5, 8, 16):
        threads(n)
        assert torch.equal(layer.run(x, "relu", None)[0], first), n
    threads(1)
    assert torch.equal(torch.cat([layer.run(row[None], "relu", None)[0] for row in x]), first)


@pytest.mark.parametrize("rows", rf.ROWS)
def test_a_token_in_a_prompt_has_the_bits_of_the_token_alone(tier: str, rows: str) -> None:
    """Prompts go through other loops, in groups of up to 32; every size of group of columns, rows longer than a slab."""
    for d, f, tokens in ((1100, 70, 5), (96, 35, 33), (150, 300, 70)):
        for group in (0, 32, 64, 128) if rows in ("int8", "int4") else (0,):
            layer = Layer(d, f, rows, group)
            x = torch.randn(tokens, d)
            y, nnz = layer.run(x, "relu", None)
            assert torch.equal(layer.run(x, "relu", None, mode="dense")[0], y)
            for i in (0, 3, tokens - 1):
                alone = layer.run(x[i : i + 1], "relu", None)
                assert torch.equal(alone[0][0], y[i]) and alone[1] == nnz[i], (d, group, i)
            threads(3)
            assert torch.equal(layer.run(x, "relu", None)[0], y)
            threads(1)


@pytest.mark.parametrize("gate", rf.GATES)
def test_prompts(tier: str, gate: str) -> None:
    for rows, tokens in (("bf16", 40), ("int4", 33)):
        layer = Layer(140, 90, rows, 32 if rows == "int4" else 0)
        check(layer, torch.randn(tokens, 140), gate, value_of(gate, 90))
        mask = torch.randint(0, 256, (tokens, 12), dtype=torch.uint8)
        mask[:, -1] &= (1 << 90 % 8) - 1
        check(layer, torch.randn(tokens, 140), gate, value_of(gate, 90), mask, 1)


@pytest.mark.parametrize("rows", rf.ROWS)
def test_packing(rows: str) -> None:
    w = torch.randn(9, 150)
    for group in (0, 32, 64, 128) if rows in ("int8", "int4") else (0,):
        packed, scales = OPS.relu_ffn_pack(w, False, rows, group)
        other = OPS.relu_ffn_pack(w.T.contiguous(), True, rows, group)
        assert torch.equal(packed, other[0]) and torch.equal(scales, other[1])
        assert packed.shape == (9, rf.row_bytes(rows, 150))
        back = OPS.relu_ffn_unpack(packed, scales if scales.numel() else None, rows, 150)
        if scales.numel():
            step = scales.repeat_interleave(group or 150, dim=1)[:, :150]
            assert bool(((back - w).abs() <= step * 0.5001).all())
        else:
            dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[rows]
            assert torch.equal(back, w.to(dtype).float())


@pytest.mark.emulated
@pytest.mark.parametrize("rows", rf.ROWS)
def test_input_sparse_linear(tier: str, rows: str) -> None:
    for i, (d_in, d_out, tokens) in enumerate(((64, 48, 1), (100, 130, 3), (7, 5, 9), (600, 260, 2))):
        check_input_sparse(OPS.input_sparse_linear, rows, d_in, d_out, tokens, i)


def test_empty_batch_and_leading_dimensions() -> None:
    layer = Layer(32, 16)
    y, nnz = layer.run(torch.zeros(0, 32), "relu", None)
    assert y.shape == (0, 32) and nnz.shape == (0,)
    x = torch.randn(2, 3, 32)
    assert torch.equal(layer.run(x, "relu", None)[0].reshape(6, 32), layer.run(x.reshape(6, 32), "relu", None)[0])


def test_bad_arguments() -> None:
    layer = Layer(32, 16, "int8", 32)
    x = torch.randn(1, 32)
    (wg, sg), (wu, su), (wd, sd) = layer.packed
    good = dict(x=x, wg=wg, wu=wu, wd=wd, sg=sg, su=su, sd=sd, bg=None, bu=None, bd=None, rows="int8", gate="relu", param=None, mask=None,
                mask_group=1, mode="auto")  # fmt: skip
    OPS.relu_ffn(**good)
    for change, message in (
        ({"x": torch.randn(1, 65)}, r"relu_ffn: wu: expected uint8 \[16, 128\]"),
        ({"wd": wd[:-1].contiguous()}, r"relu_ffn: wd: expected"),
        ({"su": None}, r"relu_ffn: su: expected scales"),
        ({"rows": "int5"}, r"relu_ffn: rows: expected"),
        ({"gate": "gelu"}, r"relu_ffn: gate: expected one of"),
        ({"gate": "fatrelu"}, r"relu_ffn: param: expected one"),
        ({"param": torch.ones(1)}, r"relu_ffn: param: expected none"),
        ({"gate": "fatrelu", "param": -torch.ones(1)}, r"relu_ffn: param: expected finite values of at least 0"),
        ({"gate": "top_k", "param": torch.tensor([17.0])}, r"relu_ffn: param: expected a whole number up to 16"),
        ({"gate": "drelu", "wg": None, "sg": None}, r"relu_ffn: gate: expected a layer with wg"),
        ({"mask": torch.zeros(1, 3, dtype=torch.uint8)}, r"relu_ffn: mask: expected"),
        (
            {"mask": torch.full((1, 1), 255, dtype=torch.uint8), "mask_group": 3},
            r"relu_ffn: mask: expected zeros beyond bit 6",
        ),
        ({"mask_group": 0, "mask": torch.zeros(1, 2, dtype=torch.uint8)}, r"relu_ffn: mask_group: expected at least 1"),
        ({"mode": "fast"}, r"relu_ffn: mode: expected"),
        ({"bd": torch.zeros(31)}, r"relu_ffn: bd: expected"),
    ):
        with pytest.raises(RuntimeError, match=message):
            OPS.relu_ffn(**(good | change))
    with pytest.raises(RuntimeError, match="relu_ffn_pack: w: expected finite values"):
        OPS.relu_ffn_pack(torch.full((2, 2), torch.inf), False, "fp32", 0)


def test_shapes_for_compilers() -> None:
    layer = Layer(64, 48, "int4", 32)
    x = torch.randn(2, 64)
    (wg, sg), (wu, su), (wd, sd) = layer.packed
    arguments = (x, wg, wu, wd, sg, su, sd, *layer.biases, "int4", "relu", None, None, 1, "auto")
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(OPS.relu_ffn.default, arguments, test_utils=tests)
    torch.library.opcheck(OPS.relu_ffn_pack.default, (torch.randn(4, 40), False, "int8", 32), test_utils=tests)
    torch.library.opcheck(
        OPS.input_sparse_linear.default, (torch.randn(2, 48), wd, sd, None, None, "int4", 64), test_utils=tests
    )
    compiled = torch.compile(lambda x: OPS.relu_ffn(x, *arguments[1:])[0] + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), OPS.relu_ffn(*arguments)[0] + 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # leaves it alone
        assert torch.equal(OPS.relu_ffn(*arguments)[0] + 1, compiled(x))


def test_no_gradient() -> None:
    layer = Layer(32, 16)
    x = torch.randn(1, 32, requires_grad=True)
    with pytest.raises(RuntimeError, match="relu_ffn: expected inputs without gradients"):
        layer.run(x, "relu", None)[0].sum().backward()
