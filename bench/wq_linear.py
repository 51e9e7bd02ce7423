"""Our side of the wq_linear table: `torch.ops.effk.wq_linear`, one call per product, and one call over all copies."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import effk
from effk.formats.csr import csr_from_mask
from effk.formats.wq import WqWeight
from effk.ops.wq_linear import PackedWeight, multi_linear, pack

from . import machine
from .backend import Backend, Runner
from .problem import BF16, Oracle, Problem, Rounding
from .report import OURS
from .shapes import Case

OUTLIER_GAIN = 8.0  # an outlier against the largest step of its weight


def backend(case: Case, tier: str) -> Backend:
    """The kernel that `tier` has for this case."""
    shape = case.shape
    if case.compute == "int8":
        rounding = Rounding(act_group=min(shape.group, 128) or 128)
    else:
        rounding = Rounding(out=BF16)
    runner = MultiRunner if case.multi else OneRunner
    return Backend(
        OURS,
        effk.__version__,
        case.label(),
        case.bits,
        shape.group,
        case.dtype,
        rounding,
        lambda problem: runner(problem, case, tier),
        isa=tier,
        outliers=case.outliers,
    )


class EffkRunner(Runner):
    """Packed copies of one weight, and the tier that its calls run on."""

    def __init__(self, problem: Problem, case: Case, tier: str) -> None:
        self._problem, self._case, self._tier = problem, case, tier
        self._copies, self.nbytes, self.oracle = packed_copies(problem, case)

    def bind(self, m: int) -> None:
        self._x = self._problem.x[:m].to(getattr(torch, self._case.dtype)).contiguous()

    def activate(self) -> None:
        effk.isa.use(self._tier)


class OneRunner(EffkRunner):
    """`torch.ops.effk.wq_linear` on the next copy."""

    def __init__(self, problem: Problem, case: Case, tier: str) -> None:
        super().__init__(problem, case, tier)
        op, tail = torch.ops.effk.wq_linear, (None, *self._copies[0].geometry, case.compute)
        self._arguments = [(*copy.tensors, *tail) for copy in self._copies]
        self._op, self._next = op, 0

    def call(self) -> None:
        self._op(self._x, *self._arguments[self._next])
        self._next = (self._next + 1) % len(self._arguments)

    def warm(self) -> Callable[[], None]:
        return lambda: self._op(self._x, *self._arguments[0])

    def outputs(self) -> list[tuple[int, Tensor]]:
        self.activate()
        return [(0, self._op(self._x, *self._arguments[i])) for i in (0, -1)]


class MultiRunner(EffkRunner):
    """`torch.ops.effk.wq_multi_linear` on all copies at once, as baselines run all of theirs in one graph."""

    def __init__(self, problem: Problem, case: Case, tier: str) -> None:
        super().__init__(problem, case, tier)
        self.products = len(self._copies)

    def call(self) -> None:
        multi_linear(self._x, self._copies, compute=self._case.compute)

    def outputs(self) -> list[tuple[int, Tensor]]:
        self.activate()
        ys = multi_linear(self._x, self._copies, compute=self._case.compute)
        return [(0, ys[0]), (0, ys[-1])]


def packed_copies(problem: Problem, case: Case) -> tuple[list[PackedWeight], int, Oracle]:
    """Copies of the weight in kernel layout, the bytes of one, and its oracle; made once for all forms and tiers."""
    key = f"{OURS} {case.bits} {case.outliers}"
    if key not in problem.extras:
        weight = problem.quantized(case.bits, case.shape.group)
        codes, oracle, outliers = weight.codes, weight.oracle, None
        if case.outliers:
            generator = torch.Generator().manual_seed(1)
            mask = torch.rand(codes.shape, generator=generator) < case.outliers
            values = (
                torch.randn(codes.shape, generator=generator) * (OUTLIER_GAIN * float(weight.scales.max()))
            ).half()
            codes = codes.masked_fill(mask, weight.zero)
            outliers = csr_from_mask(values, mask)
            oracle = Oracle(torch.where(mask, values.float(), oracle.weight), problem.x, problem.ms)
        stored = WqWeight.from_codes(
            codes, weight.scales.half(), bits=case.bits, group_size=case.shape.group, outliers=outliers
        )
        one = pack(stored)
        nbytes = sum(t.numel() * t.element_size() for t in one.tensors if t is not None)
        copies = [PackedWeight(*map(clone, one.tensors), *one.geometry) for _ in range(machine.copies(nbytes))]
        problem.extras[key] = copies, nbytes, oracle
    return problem.extras[key]


def clone(t: Tensor | None) -> Tensor | None:
    """A copy of its own, if there is one."""
    return None if t is None else t.clone()
