"""torch's weight-only linears: int4 in groups (_weight_int4pack_mm_for_cpu), int8 per row (_weight_int8pack_mm)."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .. import machine
from ..backend import Backend, CallRunner, Missing, Runner
from ..problem import BF16, Problem, Rounding
from ..shapes import Shape


def backends(shape: Shape, threads: int) -> Iterator[Backend | Missing]:
    """bf16 activations, the only type with vector code behind these ops; int4 where the group divides K."""
    for group in dict.fromkeys((shape.group, 32)):
        if shape.k % group == 0:
            yield Backend(
                "torch int4pack",
                torch.__version__,
                f"float, g{group}",
                4,
                group,
                "bfloat16",
                Rounding(weight=BF16, out=BF16),
                lambda p, group=group: int4(p, group),
            )
        else:
            yield Missing(f"torch int4pack g{group}", f"K = {shape.k} is no multiple of {group}")
    yield Backend("torch int8pack", torch.__version__, "float, per row", 8, 0, "bfloat16", Rounding(out=BF16), int8)


def int4(problem: Problem, group: int) -> Runner:
    """Weight s (q - 8) + z with z = 0."""
    weight = problem.quantized(4, group)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(weight.codes.int(), 1)
    scales = weight.scales.T.contiguous()
    scales_zeros = torch.stack((scales, torch.zeros_like(scales)), -1).bfloat16()
    nbytes = weight.codes.numel() // 2 + scales_zeros.numel() * 2
    copies = [(packed.clone(), scales_zeros.clone()) for _ in range(machine.copies(nbytes))]
    op = torch.ops.aten._weight_int4pack_mm_for_cpu
    return CallRunner(problem, weight.oracle, nbytes, copies, lambda x, c: op(x, c[0], group, c[1]), torch.bfloat16)


def int8(problem: Problem) -> Runner:
    """Weight s q with one bf16 scale per row."""
    weight = problem.quantized(8, 0)
    signed = (weight.codes.to(torch.int16) - weight.zero).to(torch.int8)
    scales = weight.scales[:, 0].bfloat16()
    nbytes = signed.numel() + scales.numel() * 2
    copies = [signed.clone() for _ in range(machine.copies(nbytes))]
    op = torch.ops.aten._weight_int8pack_mm
    return CallRunner(problem, weight.oracle, nbytes, copies, lambda x, w: op(x, w, scales), torch.bfloat16)
