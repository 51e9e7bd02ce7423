"""quik_linear as a citizen of PyTorch: schema, compile, export, autocast, x of any layout; bad input."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dyad_cases import same_bits
from effk.formats.wq import WqWeight
from effk.ops import quik_linear as ql
from quik_cases import BITS, DTYPES, Quik, quik

ops = torch.ops.effk


def multi_arguments(p: Quik) -> tuple:
    w = p.packed()
    lists = [[t, t] for t in w[:4]]
    return p.x, *lists, [p.bias, None], p.int_idx, p.fp_idx, [w.f_out] * 2, w.n_base, [w.bits_w] * 2, p.bits_a, p.mode


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    for i, (bits_w, bits_a) in enumerate((*BITS, (4, 16))):
        p = quik(10, 20, 30, 4 * (i % 2), bits_w, bits_a, ql.MODES[i % 2], dtype, split=("none", "runs")[i // 2 % 2])
        for x in (p.x, p.x.reshape(2, 5, -1), p.x[:0]):
            q = replace(p, x=x)
            torch.library.opcheck(ops.quik_linear.default, q.arguments)
            torch.library.opcheck(ops.quik_multi_linear.default, multi_arguments(q))
            if bits_a == 16:
                continue
            torch.library.opcheck(ops.quik_quantize.default, (x, p.int_idx, p.fp_idx, 30, bits_a, p.mode))
        if bits_a == 16:
            continue
        w = p.packed()
        qx, s, z, _ = ops.quik_quantize(p.x, p.int_idx, p.fp_idx, 30, bits_a, p.mode)
        acc = ops.quik_int_matmul(qx, w.packed, 20, 30, bits_w, bits_a)
        torch.library.opcheck(ops.quik_int_matmul.default, (qx, w.packed, 20, 30, bits_w, bits_a))
        for y_in, name in ((None, "fp32"), (torch.randn(10, 20).to(dtype), "bf16")):
            torch.library.opcheck(ops.quik_dequantize.default, (acc, s, z, w.w_scale, w.w_reduced, y_in, bits_a, name))


def test_compile_whole_graph() -> None:
    for bits_w, bits_a in (*BITS, (4, 16)):
        p = quik(10, 20, 30, 4, bits_w, bits_a)
        compiled = torch.compile(lambda *a: ops.quik_linear(*a), fullgraph=True, backend="aot_eager")
        assert same_bits(compiled(*p.arguments), p.run())
        compiled = torch.compile(lambda *a: ops.quik_multi_linear(*a), fullgraph=True, backend="aot_eager")
        assert same_bits(compiled(*multi_arguments(p))[0], p.run())
        torch._dynamo.reset()


class Layer(torch.nn.Module):
    def __init__(self, p: Quik) -> None:
        super().__init__()
        self.p = p
        self.weight = p.packed()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ql.linear(x, self.weight, self.p.bias, *self.p.how)


def test_compile_with_any_number_of_rows() -> None:
    layer, frames = Layer(quik(1, 20, 30, 4)), 0

    def count(graph: torch.fx.GraphModule, _inputs: list) -> torch.fx.GraphModule:
        nonlocal frames
        frames += 1
        return graph

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=count)
    for rows in (3, 9, 31):
        x = torch.randn(rows, 34)
        assert same_bits(compiled(x), layer(x))
    assert frames == 1


def test_export() -> None:
    p = quik(9, 20, 30, 4, dtype=torch.bfloat16)
    program = torch.export.export(Layer(p), (p.x,), dynamic_shapes=({0: torch.export.Dim("rows", min=2, max=64)},))
    for rows in (2, 9, 40):
        x = torch.randn(rows, 34).bfloat16()
        assert same_bits(program.module()(x), Layer(p)(x))


def test_x_of_any_layout() -> None:
    p = quik(24, 20, 30, 4)
    y = p.run()
    assert same_bits(replace(p, x=p.x.T.contiguous().T).run(), y)
    assert same_bits(replace(p, x=p.x.reshape(2, 3, 4, 34)).run().reshape(24, 20), y)
    assert same_bits(replace(p, x=p.x[23]).run(), replace(p, x=p.x[23:]).run()[0])
    assert replace(p, x=p.x[:0].reshape(0, 5, 34)).run().shape == (0, 5, 20)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert same_bits(p.run(), replace(p, x=p.x.bfloat16()).run())


def test_gradients_raise() -> None:
    p = quik(10, 20, 30, 4)
    y = replace(p, x=p.x.clone().requires_grad_()).run()
    with pytest.raises(RuntimeError, match="quik_linear: gradients are not implemented"):
        y.sum().backward()


def test_same_bytes_as_wq_linear() -> None:
    """The base weight of wq_linear and ours are the same bytes."""
    p = quik(3, 20, 30, 0, bias=None)
    w = p.packed()
    y = ops.wq_linear(p.x, w.packed, w.w_scale, *[None] * 6, 20, 30, 4, 0, "float")
    assert same_bits(replace(p, x=p.x[:, ql.columns(p.int_idx, None, 30, 30)[0].argsort()]).run(), y)


@pytest.mark.parametrize("field", ("zeros", "codebook", "group", "bits"))
def test_pack_refuses_other_weights(field: str) -> None:
    how = {"bits": 2 if field == "bits" else 4, "group_size": 32 if field == "group" else 0}
    codes = torch.zeros(4, 64, dtype=torch.uint8)
    weight = WqWeight.from_codes(
        codes,
        torch.ones(4, 2 if field == "group" else 1),
        zeros=torch.zeros(4, 1, dtype=torch.uint8) if field == "zeros" else None,
        codebook=torch.ones(16) if field == "codebook" else None,
        **how,
    )
    with pytest.raises(ValueError, match="pack: base: expected a symmetric weight"):
        ql.pack(weight)
    with pytest.raises(ValueError, match="pack: w_out: expected"):
        ql.pack(quik(1, 4).base, torch.zeros(3, 2))


# ---- errors -----------------------------------------------------------------------------------------------------------

NAMES = "x packed w_scale w_reduced w_out bias int_idx fp_idx f_out n_base bits_w bits_a mode".split()  # fmt: skip


def bad(**change: object) -> tuple:
    arguments = dict(zip(NAMES, quik(10, 20, 30, 4).arguments, strict=True))
    for name, value in change.items():
        arguments[name] = value(arguments[name]) if callable(value) else value
    return tuple(arguments.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mode": "fast"}, "mode: expected 'kernel' or 'sim', got 'fast'"),
        ({"bits_a": 5}, "bits_a: expected 4, 8 or 16, got 5"),
        ({"bits_w": 3}, "bits_w: expected 4 or 8, got 3"),
        ({"n_base": 0}, "n_base: expected 1 to 131071, got 0"),
        ({"n_base": 131072}, "n_base: expected 1 to 131071, got 131072"),
        ({"n_base": 35}, "n_base: expected at most the 34 columns of x, got 35"),
        ({"f_out": 0}, "f_out: expected 1 to 2147483647, got 0"),
        ({"f_out": 33}, r"packed: expected uint8 \[3, 4, 64\]"),
        ({"x": lambda t: t.double()}, "x: expected float32, bfloat16 or float16, got float64"),
        ({"x": lambda t: t[0, 0]}, r"x: expected \[..., K\], got float32 \[\]"),
        ({"packed": lambda t: t[:, :3].contiguous()}, r"packed: expected uint8 \[2, 4, 64\]"),
        ({"w_scale": lambda t: t.half()}, r"w_scale: expected float32 \[2, 1, 16\]"),
        ({"w_scale": lambda t: t[0]}, r"w_scale: expected float32 \[2, 1, 16\]"),
        ({"w_reduced": lambda t: t[:19]}, r"w_reduced: expected float32 \[20\]"),
        ({"w_out": None}, r"w_out: expected a packed \[20, 4\] weight, got None"),
        ({"w_out": lambda t: t[:-1]}, "w_out: expected"),
        ({"w_out": lambda t: torch.zeros_like(t)}, "w_out: expected a buffer from dense_pack"),
        ({"w_out": ops.dense_pack(torch.zeros(20, 5), "fp32")}, "w_out: expected panels of f_in = 4, got 5"),
        ({"bias": torch.zeros(19)}, r"bias: expected float32 \[20\]"),
        ({"bias": torch.zeros(20).int()}, "bias: expected float32, bfloat16 or float16, got int32"),
        ({"int_idx": lambda t: t.long()}, r"int_idx: expected int32 \[30\]"),
        ({"int_idx": lambda t: t[:29]}, r"int_idx: expected int32 \[30\]"),
        ({"fp_idx": lambda t: t[:3]}, r"fp_idx: expected int32 \[4\]"),
        ({"int_idx": None}, "int_idx: expected int32"),
        ({"fp_idx": None}, "fp_idx: expected int32"),
        ({"int_idx": lambda t: t - 1}, "expected"),
        ({"int_idx": lambda t: torch.where(t == t.max(), 34, t)}, "int_idx: expected columns of x, 0 to 33, got 34"),
        ({"fp_idx": lambda t: torch.where(t == t.max(), -1, t)}, "fp_idx: expected columns of x, 0 to 33, got -1"),
        ({"fp_idx": lambda t: t[[0, 1, 2, 2]]}, "(int|fp)_idx: expected every column of x once in int_idx and fp_idx, got column"),
        ({"int_idx": lambda t: t.flip(0)[[0, *range(29)]]}, "(int|fp)_idx: expected every column of x once in int_idx and fp_idx, got column"),
    ],
)  # fmt: skip
def test_bad_arguments(change: dict, message: str) -> None:
    with pytest.raises(RuntimeError, match=f"quik_linear: {message}" if message != "expected" else "quik_linear: "):
        ops.quik_linear(*bad(**change))


def test_index_given_twice() -> None:
    p = quik(10, 20, 30, 4)
    with pytest.raises(RuntimeError, match=r"every column of x once in int_idx and fp_idx, got column \d+ twice"):
        replace(p, fp_idx=p.int_idx[:4].contiguous()).run()
    with pytest.raises(RuntimeError, match=r"w_out: expected None, since all columns of x are base columns"):
        q = quik(10, 20, 30, 0)
        ops.quik_linear(*q.arguments[:4], ops.dense_pack(torch.zeros(20, 4), "fp32"), *q.arguments[5:])


def test_bad_arguments_of_the_parts() -> None:
    p = quik(10, 20, 30, 4)
    w = p.packed()
    qx, s, z, _ = ops.quik_quantize(p.x, p.int_idx, p.fp_idx, 30, 4, "sim")
    acc = ops.quik_int_matmul(qx, w.packed, 20, 30, 4, 4)
    for call, message in (
        (lambda: ops.quik_quantize(p.x, p.int_idx, p.fp_idx, 30, 16, "sim"), "quik_quantize: bits: expected 4 or 8, got 16"),
        (lambda: ops.quik_quantize(p.x, p.int_idx, p.fp_idx, 30, 4, ""), "quik_quantize: mode: expected"),
        (lambda: ops.quik_int_matmul(qx, w.packed, 20, 30, 4, 8), r"quik_int_matmul: qx: expected int8 \[M, 30\]"),
        (lambda: ops.quik_int_matmul(qx, w.packed, 20, 28, 4, 4), r"quik_int_matmul: qx: expected uint8 \[M, 14\]"),
        (lambda: ops.quik_int_matmul(qx, w.packed, 40, 30, 4, 4), r"quik_int_matmul: packed: expected uint8 \[3, 4, 64\]"),
        (lambda: ops.quik_int_matmul(qx, w.packed, 20, 30, 8, 4), r"quik_int_matmul: packed: expected uint8 \[2, 8, 64\]"),
        (lambda: ops.quik_int_matmul(qx, w.packed, 20, 30, 4, 16), "quik_int_matmul: bits_a: expected 4 or 8, got 16"),
        (lambda: ops.quik_dequantize(acc.long(), s, z, w.w_scale, w.w_reduced, None, 4, "fp32"), r"quik_dequantize: acc: expected int32 \[M, N\]"),
        (lambda: ops.quik_dequantize(acc, s[:9], z, w.w_scale, w.w_reduced, None, 4, "fp32"), r"quik_dequantize: scale: expected float32 \[10\]"),
        (lambda: ops.quik_dequantize(acc, s, z, w.w_scale[:1], w.w_reduced, None, 4, "fp32"), r"quik_dequantize: w_scale: expected float32 \[2, 1, 16\]"),
        (lambda: ops.quik_dequantize(acc, s, z, w.w_scale, w.w_reduced, p.x, 4, "fp32"), r"quik_dequantize: y_in: expected float32 \[10, 20\]"),
        (lambda: ops.quik_dequantize(acc, s, z, w.w_scale, w.w_reduced, None, 4, "fp64"), "quik_dequantize: dtype: expected 'fp32', 'bf16' or 'fp16', got 'fp64'"),
        (lambda: ql.multi_linear(p.x, [w, w._replace(w_reduced=w.w_reduced[:3])], None, *p.how), r"quik_multi_linear: w_reduced\[1\]: expected float32 \[20\]"),
        (lambda: ql.multi_linear(p.x, [w, w], [None], *p.how), "quik_multi_linear: bias: expected 2 entries as packed has, got 1"),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match=message):
            call()
    with pytest.raises(ValueError, match=r"weights\[1\]: expected n_base = 30 as weights\[0\] has, got 31"):
        ql.multi_linear(p.x, [w, w._replace(n_base=31)])
