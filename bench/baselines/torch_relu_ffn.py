"""torch beside relu_ffn: dense layers, layers of weights in int8 and int4, rows picked by index, and embedding_bag."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import machine
from ..relu_problem import DOWN, Made, Problem

VERSION = torch.__version__
BF16, FP32, INT8, INT4 = "torch F.linear bf16", "torch F.linear fp32", "torch int8pack", "torch int4pack"
PICKED, BAG, BYTES = "torch rows by index", "torch embedding_bag", "torch quantized embedding_bag"

Linear = Callable[[Tensor, object], Tensor]


def feed_forward(x: Tensor, bias: Tensor, weights: list[object], linear: Linear) -> Tensor:
    """relu(gate + bias) * up, through down."""
    h = linear(x, weights[0]).add_(bias).relu_()
    if len(weights) == 3:
        h *= linear(x, weights[1])
    return linear(h, weights[-1])


def rotation(problem: Problem, convert: Callable[[Tensor], object], nbytes: float) -> list[list[object]]:
    """Copies of all matrices as [outputs, inputs], converted; nbytes: of a weight."""
    plain = problem.weights.plain
    sides = [w.T.contiguous() if name == "down" else w for name, w in plain.items()]
    size = sum(w.numel() for w in sides) * nbytes
    return [[convert(w) for w in sides] for _ in range(machine.copies(int(size)))]


def dense(dtype: torch.dtype) -> Callable[[Problem, str], Made | None]:
    """F.linear in a dtype."""

    def function(problem: Problem, kind: str) -> Made | None:
        copies = rotation(problem, lambda w: w.to(dtype, copy=True), dtype.itemsize)
        if problem.weights.alone:
            inputs = [h.to(dtype) for h in problem.hidden]
            call = lambda i: F.linear(inputs[problem.list_of(i)], copies[i % len(copies)][0])  # noqa: E731
        else:
            x, biases = problem.x.to(dtype), [b.to(dtype) for b in problem.biases]
            call = lambda i: feed_forward(x, biases[problem.list_of(i)], copies[i % len(copies)], F.linear)  # noqa: E731
        return Made(call, problem.match("fp32" if dtype == torch.float32 else "bf16", dtype))

    return function


def int8(problem: Problem, kind: str) -> Made | None:
    """_weight_int8pack_mm: a scale an output, x in bf16."""
    if problem.weights.alone:
        return None

    def convert(w: Tensor) -> tuple[Tensor, Tensor]:
        scales = w.abs().amax(1) / 127
        return (w / scales[:, None]).round().to(torch.int8), scales.bfloat16()

    copies = rotation(problem, convert, 1)
    x, biases = problem.x.bfloat16(), [b.bfloat16() for b in problem.biases]
    linear = lambda x, w: torch.ops.aten._weight_int8pack_mm(x, *w)  # noqa: E731
    call = lambda i: feed_forward(x, biases[problem.list_of(i)], copies[i % len(copies)], linear)  # noqa: E731
    return Made(call, problem.match("int8", torch.bfloat16))


def int4(problem: Problem, kind: str) -> Made | None:
    """_weight_int4pack_mm_for_cpu in groups of 32, x in bf16."""
    if problem.weights.alone:
        return None

    def convert(w: Tensor) -> tuple[Tensor, Tensor]:
        groups = w.view(len(w), -1, 32)
        scales = groups.abs().amax(2) / 7
        codes = (groups / scales[:, :, None]).round().view(w.shape).int() + 8
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        return packed, torch.stack((scales.T, torch.zeros_like(scales.T)), -1).bfloat16().contiguous()

    copies = rotation(problem, convert, 0.5 + 4 / 32)
    x, biases = problem.x.bfloat16(), [b.bfloat16() for b in problem.biases]
    linear = lambda x, w: torch.ops.aten._weight_int4pack_mm_for_cpu(x, w[0], 32, w[1])  # noqa: E731
    call = lambda i: feed_forward(x, biases[problem.list_of(i)], copies[i % len(copies)], linear)  # noqa: E731
    return Made(call, problem.match("int4", torch.bfloat16))


def transposed(problem: Problem, dtype: torch.dtype) -> list[list[Tensor]]:
    """Copies of all matrices as rows of neurons."""
    size = sum(w.numel() for w in problem.weights.plain.values()) * dtype.itemsize
    return [[w.to(dtype, copy=True) for w in problem.weights.plain.values()] for _ in range(machine.copies(size))]


def bag(hidden: Tensor, rows: Tensor, index: Tensor) -> Tensor:
    """Sum of the rows of the index times their inputs."""
    return F.embedding_bag(index[None], rows, mode="sum", per_sample_weights=hidden[None])


def picked(problem: Problem, kind: str) -> Made | None:
    """What skipping takes in torch: the gate, nonzero, rows of up by index, embedding_bag."""
    if problem.weights.alone or problem.tokens > 1:
        return None
    dtype = torch.bfloat16
    copies, x, biases = transposed(problem, dtype), problem.x.to(dtype), [b.to(dtype) for b in problem.biases]

    def call(i: int) -> Tensor:
        first, *up, down = copies[i % len(copies)]
        h = F.linear(x, first).add_(biases[problem.list_of(i)]).relu_()[0]
        index = h.nonzero()[:, 0]
        h = h[index]
        if up:
            h *= up[0][index] @ x[0]
        return bag(h, down, index)

    return Made(call, problem.match("bf16", dtype))


def embedding_bag(problem: Problem, kind: str) -> Made | None:
    """Rows of down in the dtype of the kind; the list of neurons is there already."""
    rows = kind.removeprefix(f"{DOWN} ")
    if not problem.weights.alone or rows not in ("fp32", "bf16"):
        return None
    dtype = torch.float32 if rows == "fp32" else torch.bfloat16
    copies = transposed(problem, dtype)
    inputs = [h[0, part].to(dtype) for h, part in zip(problem.hidden, problem.lists, strict=True)]

    def call(i: int) -> Tensor:
        n = problem.list_of(i)
        return bag(inputs[n], copies[i % len(copies)][0], problem.lists[n])

    return Made(call, problem.match(rows, dtype))


def quantized_bag(problem: Problem, kind: str) -> Made | None:
    """Rows of bytes or nibbles with a scale and an offset a row."""
    rows = kind.removeprefix(f"{DOWN} ")
    if not problem.weights.alone or rows not in ("int8", "int4"):
        return None
    name = "byte" if rows == "int8" else "4bit"
    pack = getattr(torch.ops.quantized, f"embedding_bag_{name}_prepack")
    op = getattr(torch.ops.quantized, f"embedding_bag_{name}_rowwise_offsets")
    packed = pack(problem.weights.plain["down"])
    copies = [packed.clone() for _ in range(machine.copies(packed.numel()))]
    inputs = [h[0, part].contiguous() for h, part in zip(problem.hidden, problem.lists, strict=True)]
    start = torch.zeros(1, dtype=torch.int64)

    def call(i: int) -> Tensor:
        n = problem.list_of(i)
        return op(copies[i % len(copies)], problem.lists[n], start, False, 0, False, inputs[n], None, False)

    return Made(call, problem.match(rows))
