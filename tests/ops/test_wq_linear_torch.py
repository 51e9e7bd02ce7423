"""wq_linear as a citizen of PyTorch: schema, compile, export, gradients, autocast; packing; and bad input."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from effk.formats.wq import GROUP_SIZES, WqWeight
from effk.ops import wq_linear as wq
from wq_cases import (
    BITS,
    DTYPES,
    SIGNIFICANT_BITS,
    assert_close,
    bound,
    check,
    gamma,
    kinds,
    random_input,
    random_weight,
)

ops = torch.ops.effk


def arguments(weight: WqWeight, x: torch.Tensor, bias: torch.Tensor | None = None, compute: str = "float") -> tuple:
    packed = wq.pack(weight)
    return (x, *packed.tensors, bias, *packed.geometry, compute)


def multi_arguments(weights: list[WqWeight], x: torch.Tensor, compute: str = "float") -> tuple:
    packed = [wq.pack(w) for w in weights]
    columns = [list(c) for c in zip(*(p.tensors for p in packed), strict=True)]
    return (x, *columns, [None] * len(weights), [w.n for w in weights], weights[0].k,
            [w.bits for w in weights], [w.group_size for w in weights], compute)  # fmt: skip


# ---- packing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", BITS)
def test_unpack_inverts_pack(bits: int) -> None:
    for kind, group, (n, k) in itertools.product(kinds(bits), GROUP_SIZES, ((33, 576), (17, 67), (1, 1), (0, 40))):
        weight = random_weight(n, k, bits, group, kind, scale_dtype=torch.float32 if n % 2 else torch.float16)
        packed = wq.pack(weight)
        qweight, scales, zeros = ops.wq_unpack(packed.packed, packed.scales, packed.zeros, *packed.geometry)
        assert torch.equal(qweight, weight.qweight)
        assert torch.equal(scales, weight.scales)
        assert torch.equal(zeros, torch.empty(0, dtype=torch.uint8) if weight.zeros is None else weight.zeros)


@pytest.mark.parametrize("bits", BITS)
def test_dequantize_is_the_canonical_weight(bits: int) -> None:
    """Both round the one product in fp32 (and the one addition of an outlier), so they agree in every bit."""
    for kind, group, outliers in itertools.product(kinds(bits), GROUP_SIZES, (0.0, 0.05)):
        weight = random_weight(37, 130, bits, group, kind, outliers=outliers)
        assert torch.equal(ops.wq_dequantize(*wq.pack(weight)), weight.dequantize())


def test_results_do_not_alias_arguments() -> None:
    weight = random_weight(16, 32, 4, 32, "table")
    packed = wq.pack(weight)
    assert packed.codebook.data_ptr() != weight.codebook.data_ptr()


# ---- schema, shapes, compile, export ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("compute", ("float", "int8"))
def test_opcheck_linear(compute: str, dtype: torch.dtype) -> None:
    for kind in kinds(3, compute):
        weight = random_weight(20, 70, 3, 32, kind, outliers=0.05)
        x = random_input(6, 70, dtype).reshape(2, 3, 70)
        torch.library.opcheck(ops.wq_linear.default, arguments(weight, x, torch.randn(20), compute))
        torch.library.opcheck(ops.wq_linear.default, arguments(weight, x.clone().requires_grad_(), None, compute))


def test_opcheck_others() -> None:
    weight = random_weight(20, 70, 4, 32, "asymmetric", outliers=0.05)
    packed = wq.pack(weight)
    torch.library.opcheck(ops.wq_pack.default, (weight.qweight, weight.scales, weight.zeros, None, *packed.geometry))
    torch.library.opcheck(ops.wq_unpack.default, (packed.packed, packed.scales, packed.zeros, *packed.geometry))
    torch.library.opcheck(ops.wq_dequantize.default, tuple(packed))
    torch.library.opcheck(ops.wq_linear_backward.default, (random_input(5, 20), *packed))
    weights = [weight, random_weight(9, 70, 2, 0, "row_tables", seed=1)]
    torch.library.opcheck(ops.wq_multi_linear.default, multi_arguments(weights, random_input(4, 70)))
    for kind in ("table", "row_tables"):
        w = random_weight(20, 70, 4, 32, kind)
        torch.library.opcheck(ops.wq_pack.default, (w.qweight, w.scales, None, w.codebook, 20, 70, 4, 32))


class Layer(torch.nn.Module):
    def __init__(self, packed: wq.PackedWeight) -> None:
        super().__init__()
        for name, value in packed._asdict().items():
            setattr(self, name, value)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        packed = wq.PackedWeight(*(getattr(self, name) for name in wq.PackedWeight._fields))
        return torch.relu(wq.linear(x, packed, None, "int8"))


def test_compile_whole_graph_with_any_number_of_rows() -> None:
    layer = Layer(wq.pack(random_weight(24, 64)))
    frames = 0

    def count(graph: torch.fx.GraphModule, _inputs: list[Any]) -> Callable[..., Any]:
        nonlocal frames
        frames += 1
        return graph

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=count)
    for m in (3, 7, 31):
        x = random_input(m, 64)
        assert torch.equal(compiled(x), layer(x))
    assert frames == 1  # the number of rows is a symbol, not a constant


def test_export_with_any_number_of_rows() -> None:
    layer = Layer(wq.pack(random_weight(24, 64)))
    rows = torch.export.Dim("rows", min=1, max=4096)
    program = torch.export.export(layer, (random_input(5, 64),), dynamic_shapes={"x": {0: rows}})
    for m in (2, 90):
        x = random_input(m, 64)
        assert torch.equal(program.module()(x), layer(x))


# ---- gradient, autocast -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_with_respect_to_x(dtype: torch.dtype) -> None:
    """grad @ W: n products in fp32 (four roundings make an entry of W), then one rounding to the dtype of x."""
    for bits, shape in itertools.product(BITS, ((50,), (4, 50), (2, 3, 50))):
        weight = random_weight(33, 50, bits, 32, "asymmetric", outliers=0.05)
        packed = wq.pack(weight)
        x = random_input(int(torch.tensor(shape[:-1]).prod()), 50, dtype).reshape(shape).requires_grad_()
        bias = torch.randn(33, requires_grad=True)
        grad = torch.randn(*shape[:-1], 33).to(dtype)
        wq.linear(x, packed, bias).backward(grad)
        w = weight.dequantize(torch.float64)
        expected = grad.double() @ w
        allowed = gamma(33 + 4) * (grad.double().abs() @ w.abs()) + 2.0 ** -SIGNIFICANT_BITS[dtype] * 2 * expected.abs()
        assert x.grad.dtype == dtype
        check(x.grad, expected, allowed + 2.0**-24)
        torch.testing.assert_close(bias.grad, grad.float().reshape(-1, 33).sum(0), rtol=2**-7, atol=2**-7)


def test_gradient_of_multi_linear() -> None:
    weights = [random_weight(33, 50, 4, 32, seed=1), random_weight(20, 50, 3, 32, "asymmetric", seed=2)]
    packed = [wq.pack(w) for w in weights]
    x = random_input(6, 50)
    one, several = x.clone().requires_grad_(), x.clone().requires_grad_()
    sum(wq.linear(one, p).square().sum() for p in packed).backward()
    sum(y.square().sum() for y in wq.multi_linear(several, packed)).backward()
    torch.testing.assert_close(several.grad, one.grad)


def test_gradient_flows_through_layers_below() -> None:
    """What adapter training needs: a trainable layer under a frozen one."""
    below = torch.nn.Linear(8, 50)
    wq.linear(below(torch.randn(4, 8)), wq.pack(random_weight(33, 50)), None, "int8").sum().backward()
    assert below.weight.grad.abs().sum() > 0


def test_autocast_casts_x_only() -> None:
    weight = random_weight(33, 64, 4, 32, scale_dtype=torch.float32)
    packed, x = wq.pack(weight), random_input(5, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = wq.linear(x, packed)
        several = wq.multi_linear(x, [packed])
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, wq.linear(x.bfloat16(), packed))
    assert torch.equal(several[0], y)


def test_inference_mode_and_no_grad() -> None:
    weight = random_weight(33, 64)
    packed, x = wq.pack(weight), random_input(5, 64)
    with torch.inference_mode():
        assert_close(wq.linear(x, packed), x, weight, None, "float")
    with torch.no_grad():
        assert not wq.linear(x.requires_grad_(), packed).requires_grad


# ---- bad input: one error that names the op, the argument, what was expected and what came -----------------------------

WEIGHT = random_weight(33, 100, 4, 32, "asymmetric", outliers=0.05)
NAMES = ("x", *wq.PackedWeight._fields[:7], "bias", *wq.PackedWeight._fields[7:], "compute")


def changed(**changes: Any) -> tuple:
    values = dict(zip(NAMES, arguments(WEIGHT, random_input(3, 100), torch.randn(33)), strict=True))
    for name, change in changes.items():
        values[name] = change(values[name]) if callable(change) else change
    return tuple(values.values())


def put(index: int, value: int) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(t: torch.Tensor) -> torch.Tensor:
        wide = t.to(torch.int64)
        wide[index] = value
        return wide.to(t.dtype)

    return change


BAD = {
    "x dtype": (dict(x=lambda x: x.double()), r"^wq_linear: x: expected float32, bfloat16 or float16, got float64$"),
    "x integer": (dict(x=lambda x: x.int()), r"^wq_linear: x: expected float32.* got int32$"),
    "x columns": (dict(x=lambda x: x[:, 1:]), r"^wq_linear: x: expected \[\.\.\., 100\] on cpu, got float32 \[3, 99\]"),
    "x scalar": (dict(x=torch.tensor(1.0)), r"^wq_linear: x: expected \[\.\.\., 100\] on cpu, got float32 \[\]"),
    "packed dtype": (dict(packed=lambda t: t.char()), r"^wq_linear: packed: expected uint8 .* got int8"),
    "packed shape": (dict(packed=lambda t: t[1:]), r"^wq_linear: packed: expected uint8 \[3, 13, 64\].* got uint8 \[2, 13, 64\]"),
    "packed strides": (dict(packed=lambda t: t.mT), r"^wq_linear: packed: expected .* contiguous.* got .* not contiguous"),
    "scales dtype": (dict(scales=lambda t: t.bfloat16()), r"^wq_linear: scales: expected float16 or float32 .* got bfloat16"),
    "scales shape": (dict(scales=lambda t: t[:, :-1].contiguous()), r"^wq_linear: scales: .*\[3, 4, 16\].* got float16 \[3, 3, 16\]"),
    "zeros dtype": (dict(zeros=lambda t: t.int()), r"^wq_linear: zeros: expected uint8 \[3, 4, 16\].* got int32"),
    "codebook and zeros": (dict(codebook=torch.zeros(16)), r"^wq_linear: zeros: expected none with a codebook, got both$"),
    "codebook length": (dict(zeros=None, codebook=torch.zeros(15)), r"^wq_linear: codebook: expected float32 \[16\].* got float32 \[15\]"),
    "codebook dtype": (dict(zeros=None, codebook=torch.zeros(16).half()), r"^wq_linear: codebook: expected float32 .* got float16"),
    "row tables in int8": (dict(zeros=None, codebook=torch.zeros(3, 16, 16), compute="int8"), r"^wq_linear: codebook: expected one table"),
    "some outliers": (dict(out_val=None), r"^wq_linear: out_ptr, out_col, out_val: expected all three or none, got 2$"),
    "out_ptr length": (dict(out_ptr=lambda t: t[1:]), r"^wq_linear: out_ptr: expected int32 \[34\].* got int32 \[33\]"),
    "out_ptr descends": (dict(out_ptr=put(5, 0)), r"^wq_linear: out_ptr: expected ascending offsets from 0 to \d+, got"),
    "out_ptr negative": (dict(out_ptr=put(0, -4)), r"^wq_linear: out_ptr: expected ascending offsets from 0"),
    "out_ptr too far": (dict(out_ptr=put(33, 10**6)), r"^wq_linear: out_ptr: expected ascending offsets from 0 to \d+, got"),
    "out_col dtype": (dict(out_col=lambda t: t.int()), r"^wq_linear: out_col: expected uint16 .* got int32"),
    "out_col too far": (dict(out_col=put(3, 100)), r"^wq_linear: out_col: expected columns below k = 100, got"),
    "out_val dtype": (dict(out_val=lambda t: t.float()), r"^wq_linear: out_val: expected float16 .* got float32"),
    "bias length": (dict(bias=lambda t: t[1:]), r"^wq_linear: bias: expected float32 \[33\].* got float32 \[32\]"),
    "bias dtype": (dict(bias=lambda t: t.double()), r"^wq_linear: bias: expected float32, bfloat16 or float16, got float64$"),
    "bits": (dict(bits=5), r"^wq_linear: bits: expected 2, 3, 4 or 8, got 5$"),
    "bits wrap": (dict(bits=4 + 2**32), r"^wq_linear: bits: expected 2, 3, 4 or 8, got 4294967300$"),
    "group": (dict(group_size=48), r"^wq_linear: group_size: expected 32, 64, 128, 256, or 0 .* got 48$"),
    "n": (dict(n=-1), r"^wq_linear: n: expected 0 to 2147483647, got -1$"),
    "n too large": (dict(n=2**40), r"^wq_linear: n: expected"),
    "n other": (dict(n=49), r"^wq_linear: packed: expected uint8 \[4, 13, 64\]"),
    "k": (dict(k=0), r"^wq_linear: k: expected 1 to 2147483647, got 0$"),
    "compute": (dict(compute="int4"), r"^wq_linear: compute: expected 'float' or 'int8', got 'int4'$"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_argument(case: str) -> None:
    changes, message = BAD[case]
    with torch.inference_mode(), pytest.raises(RuntimeError, match=message):
        ops.wq_linear(*changed(**changes))


def test_bad_argument_of_the_other_ops() -> None:
    packed = wq.pack(WEIGHT)
    with pytest.raises(RuntimeError, match=r"^wq_pack: qweight: expected uint8 \[33, 50\].* got uint8 \[33, 49\]"):
        ops.wq_pack(WEIGHT.qweight[:, :-1].contiguous(), WEIGHT.scales, None, None, *packed.geometry)
    with pytest.raises(RuntimeError, match=r"^wq_pack: codebook: expected none at 8 bits"):
        wide = random_weight(16, 32, 8, 32)
        ops.wq_pack(wide.qweight, wide.scales, None, torch.zeros(256), 16, 32, 8, 32)
    with pytest.raises(RuntimeError, match=r"^wq_unpack: scales: expected"):
        ops.wq_unpack(packed.packed, packed.scales[:1], None, *packed.geometry)
    with pytest.raises(RuntimeError, match=r"^wq_dequantize: bits: expected 2, 3, 4 or 8, got 7$"):
        ops.wq_dequantize(*packed.tensors, 33, 100, 7, 32)
    with pytest.raises(
        RuntimeError, match=r"^wq_linear_backward: grad: expected \[\.\.\., 33\] on cpu, got float32 \[2, 34\]"
    ):
        ops.wq_linear_backward(torch.zeros(2, 34), *packed)
    good = multi_arguments([WEIGHT, WEIGHT], random_input(2, 100))
    with pytest.raises(RuntimeError, match=r"^wq_multi_linear: scales: expected 2 entries as packed has, got 1$"):
        ops.wq_multi_linear(*good[:2], good[2][:1], *good[3:])
    with pytest.raises(RuntimeError, match=r"^wq_multi_linear: bits\[1\]: expected 2, 3, 4 or 8, got 6$"):
        ops.wq_multi_linear(*good[:11], [4, 6], *good[12:])


def test_cuda_tensors_without_cuda_kernels() -> None:
    from effk import _C

    if _C.build_info()["cuda"]:
        pytest.skip("this build has CUDA kernels")
    stub = torch._C._dispatch_has_kernel_for_dispatch_key("effk::wq_linear", "CUDA")
    assert stub, "a CUDA tensor must meet effk's own message"


def test_bound_is_tight_enough_to_fail() -> None:
    """The tolerance catches one wrong code in one of 300 columns: it is not so wide that anything passes."""
    weight = random_weight(16, 300, 4, 32)
    codes = weight.codes()
    codes[3, 17] ^= 1
    wrong = WqWeight.from_codes(codes, weight.scales, bits=4, group_size=32)
    x = random_input(4, 300)
    for compute in ("float", "int8"):
        expected = wq.reference(x, weight, None, compute)
        error = (wq.linear(x, wq.pack(wrong), None, compute) - expected).abs()
        assert (error > 10 * bound(x, weight, expected, None, compute)).any(dim=0).nonzero().flatten().tolist() == [3]
