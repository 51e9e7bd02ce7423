"""wq_grouped_linear: every row as wq_linear of its expert gives it, bit for bit, however rows and threads are shared out."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from effk.ops import wq_grouped_linear as grouped
from effk.ops import wq_linear as wq
from wq_cases import BITS, DTYPES, SIGNIFICANT_BITS, bound, check, gamma, random_input, random_weight

COMPUTE = ("float", "int8")
ops = torch.ops.effk
# Rows of each expert: a few everywhere, none at the ends and in the middle, all in one, one row, and no row at all.
SPLITS = (
    (3, 1, 5, 2),
    (0, 9, 0, 0, 4, 0),
    (0, 0, 37),
    (150, 0),
    (1,),
    (0, 0, 0),
    (1, 1, 1, 1, 1, 0, 1, 1),
    (5, 140, 1),
)


def offsets_of(split: tuple[int, ...]) -> torch.Tensor:
    return torch.tensor([0, *itertools.accumulate(split)], dtype=torch.int32)


def experts_weight(
    experts: int, n: int, k: int, bits: int, group: int, kind: str = "symmetric", seed: int = 0, **how: Any
):
    return random_weight(experts * n, k, bits, group, kind, seed=seed, **how)


def loop(x: torch.Tensor, offsets: torch.Tensor, weight: Any, bias: torch.Tensor | None, compute: str) -> torch.Tensor:
    """One call of wq_linear an expert."""
    experts = offsets.numel() - 1
    parts = []
    for e in range(experts):
        own = wq.pack(grouped.expert_of(weight, experts, e))
        parts.append(wq.linear(x[offsets[e] : offsets[e + 1]], own, None if bias is None else bias[e], compute))
    return torch.cat(parts)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    integers = {4: torch.int32, 2: torch.int16}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(integers), b.contiguous().view(integers))


@pytest.mark.emulated
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("compute", COMPUTE)
def test_equals_the_loop_over_experts(tier: str, compute: str, bits: int) -> None:
    """On rows that fill no tile, groups that do not divide the columns, with and without zeros and biases."""
    for seed, split in enumerate(SPLITS):
        n, k = ((19, 200), (32, 130), (50, 67))[seed % 3]
        kind, group = ("symmetric", "asymmetric")[seed % 2], (64, 0, 32, 256)[seed % 4]
        scale_dtype = torch.float32 if seed % 3 == 0 else torch.float16
        weight = experts_weight(len(split), n, k, bits, group, kind, seed, scale_dtype=scale_dtype)
        bias = torch.randn(len(split), n).to(DTYPES[seed % 3]) if seed % 2 else None
        packed, offsets = grouped.pack(weight, len(split)), offsets_of(split)
        for dtype in DTYPES:
            x = random_input(sum(split), k, dtype, seed)
            y = grouped.grouped_linear(x, offsets, packed, bias, compute)
            assert y.shape == (sum(split), n)
            assert same_bits(y, loop(x, offsets, weight, bias, compute)), (split, n, k, dtype)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("compute", COMPUTE)
def test_matches_reference(tier: str, compute: str, bits: int) -> None:
    split, n, k = (4, 0, 17, 1), 37, 203
    weight = experts_weight(4, n, k, bits, 64, "asymmetric")
    bias, offsets = torch.randn(4, n), offsets_of(split)
    for dtype in DTYPES:
        x = random_input(sum(split), k, dtype)
        y = grouped.grouped_linear(x, offsets, grouped.pack(weight, 4), bias, compute)
        expected = grouped.reference(x, offsets.tolist(), weight, bias, compute)
        for e in range(4):
            rows = slice(int(offsets[e]), int(offsets[e + 1]))
            if rows.start == rows.stop:
                continue
            own = grouped.expert_of(weight, 4, e)
            check(y[rows], expected[rows], bound(x[rows], own, expected[rows], bias[e], compute), f"expert {e}")


@pytest.mark.parametrize("compute", COMPUTE)
def test_result_does_not_depend_on_threads(compute: str) -> None:
    """Several shares for each thread, also where one expert holds almost every row, and more threads than cores."""
    for split in ((2, 1, 0, 1), (0, 0, 130, 2), (40, 30, 0, 60)):
        weight = experts_weight(4, 515, 1100, 4, 128, "asymmetric")
        packed, offsets = grouped.pack(weight, 4), offsets_of(split)
        x = random_input(sum(split), 1100, torch.bfloat16)
        torch.set_num_threads(1)
        alone = grouped.grouped_linear(x, offsets, packed, None, compute)
        assert same_bits(alone, loop(x, offsets, weight, None, compute))
        for threads in (2, 3, 7, 64):
            torch.set_num_threads(threads)
            assert same_bits(grouped.grouped_linear(x, offsets, packed, None, compute), alone), (split, threads)


@pytest.mark.parametrize("bits", BITS)
def test_unpack_inverts_pack(bits: int) -> None:
    for kind, n, group in itertools.product(("symmetric", "asymmetric"), (16, 19), (0, 32)):
        weight = experts_weight(3, n, 70, bits, group, kind)
        back = grouped.unpack(grouped.pack(weight, 3))
        for name in ("qweight", "scales", "zeros"):
            ours, theirs = getattr(back, name), getattr(weight, name)
            assert (ours is None and theirs is None) or torch.equal(ours, theirs), name


def test_x_that_is_not_contiguous() -> None:
    weight, offsets = experts_weight(3, 20, 64, 4, 32), offsets_of((2, 0, 4))
    packed, x = grouped.pack(weight, 3), random_input(12, 64)
    assert same_bits(
        grouped.grouped_linear(x[::2], offsets, packed), grouped.grouped_linear(x[::2].contiguous(), offsets, packed)
    )


def arguments(
    x: torch.Tensor, split: tuple[int, ...], bias: torch.Tensor | None = None, compute: str = "float"
) -> tuple:
    packed = grouped.pack(experts_weight(len(split), 20, 70, 3, 32, "asymmetric"), len(split))
    return (x, offsets_of(split), *packed.tensors, bias, *packed.geometry, compute)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    x = random_input(6, 70, dtype)
    bias = torch.randn(3, 20, requires_grad=True)
    torch.library.opcheck(ops.wq_grouped_linear.default, arguments(x, (2, 0, 4), None, "int8"))
    torch.library.opcheck(ops.wq_grouped_linear.default, arguments(x.clone().requires_grad_(), (2, 0, 4), bias))
    grad, offsets, packed, scales, zeros, _, *geometry, _ = arguments(random_input(6, 20, dtype), (2, 0, 4))
    torch.library.opcheck(ops.wq_grouped_linear_backward.default, (grad, offsets, packed, scales, zeros, *geometry))


def test_compile_whole_graph_with_any_number_of_rows() -> None:
    weight = experts_weight(2, 20, 64, 4, 32)
    packed, frames = grouped.pack(weight, 2), 0

    def count(graph: torch.fx.GraphModule, _inputs: list[Any]) -> Callable[..., Any]:
        nonlocal frames
        frames += 1
        return graph

    def layer(x: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        return torch.relu(grouped.grouped_linear(x, offsets, packed))

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=count)
    for split in ((3, 2), (0, 9), (20, 11)):
        x, offsets = random_input(sum(split), 64), offsets_of(split)
        assert torch.equal(compiled(x, offsets), layer(x, offsets))
    assert frames == 1


def test_gradients() -> None:
    """Of x: grad @ W, as fp32 products of n terms with W rounded once; of the bias: sums of grad over the expert's rows."""
    split, n, k = (3, 0, 5), 20, 70
    weight = experts_weight(3, n, k, 3, 32, "asymmetric")
    packed, offsets = grouped.pack(weight, 3), offsets_of(split)
    for dtype in DTYPES:
        x = random_input(8, k, dtype).requires_grad_()
        bias = torch.randn(3, n, requires_grad=True)
        grad = torch.randn(8, n).to(dtype)
        grouped.grouped_linear(x, offsets, packed, bias).backward(grad)
        for e in range(3):
            rows = slice(int(offsets[e]), int(offsets[e + 1]))
            w = grouped.expert_of(weight, 3, e).dequantize().double()
            expected, terms = grad[rows].double() @ w, grad[rows].double().abs() @ w.abs()
            allowed = gamma(n + 2) * terms + 2.0 ** -SIGNIFICANT_BITS[dtype] * (expected.abs() + 1e-6) + 1e-7
            check(x.grad[rows], expected, allowed, f"expert {e} {dtype}")
            sums = grad[rows].double().sum(0)
            slack = (gamma(8) + 8 * 2.0 ** -SIGNIFICANT_BITS[dtype]) * grad[rows].double().abs().sum(0) + 1e-9
            check(bias.grad[e], sums, slack, f"bias {e} {dtype}")


def test_autocast_casts_x() -> None:
    call = arguments(random_input(6, 70), (2, 0, 4))
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.wq_grouped_linear(*call)
    assert same_bits(y, ops.wq_grouped_linear(call[0].bfloat16(), *call[1:]))


BAD = (
    ("offsets", lambda a: a | {"offsets": offsets_of((4, 2, 0)).flip(0).contiguous()}, "ascending offsets from 0 to 6"),
    ("offsets", lambda a: a | {"offsets": torch.tensor([0, 4, 3, 6], dtype=torch.int32)}, "ascending"),
    ("offsets", lambda a: a | {"offsets": torch.tensor([0, -2, 3, 6], dtype=torch.int32)}, "ascending"),
    ("offsets", lambda a: a | {"offsets": offsets_of((2, 0, 5))}, "ascending offsets from 0 to 6"),
    ("offsets", lambda a: a | {"offsets": offsets_of((2, 0, 3))}, "ascending offsets from 0 to 6"),
    ("offsets", lambda a: a | {"offsets": offsets_of((2, 0, 4)) + 1}, "ascending offsets from 0 to 6"),
    ("offsets", lambda a: a | {"offsets": offsets_of((2, 4))}, r"int32 \[4\]"),
    ("offsets", lambda a: a | {"offsets": offsets_of((2, 0, 4)).long()}, r"int32 \[4\]"),
    ("x", lambda a: a | {"x": a["x"][:, :69]}, r"\[\.\.\., 70\]"),
    ("x", lambda a: a | {"x": a["x"][None]}, r"\[rows, 70\]"),
    ("x", lambda a: a | {"x": a["x"].double()}, "float32, bfloat16 or float16"),
    ("packed", lambda a: a | {"packed": a["packed"][:, :, :-1].contiguous()}, "uint8"),
    ("packed", lambda a: a | {"packed": a["packed"][0]}, "uint8"),
    ("packed", lambda a: a | {"packed": a["packed"][:0]}, "at least one expert"),
    ("scales", lambda a: a | {"scales": a["scales"][:2]}, r"\[3, 2, 3, 16\]"),
    ("zeros", lambda a: a | {"zeros": a["zeros"][:, :1].contiguous()}, "uint8"),
    ("bias", lambda a: a | {"bias": torch.zeros(20)}, r"\[3, 20\]"),
    ("bits", lambda a: a | {"bits": 5}, "2, 3, 4 or 8"),
    ("group_size", lambda a: a | {"group_size": 48}, "32, 64"),
    ("compute", lambda a: a | {"compute": "fp8"}, "'float' or 'int8'"),
)


@pytest.mark.parametrize(("name", "spoil", "expected"), BAD, ids=[f"{name}-{i}" for i, (name, *_) in enumerate(BAD)])
def test_bad_input(name: str, spoil: Callable[[dict[str, Any]], dict[str, Any]], expected: str) -> None:
    names = [a.name for a in ops.wq_grouped_linear.default._schema.arguments]
    given = dict(zip(names, arguments(random_input(6, 70), (2, 0, 4)), strict=True))
    with pytest.raises(RuntimeError, match=rf"^wq_grouped_linear: {name}: expected .*{expected}.*, got "):
        ops.wq_grouped_linear(**spoil(given))
