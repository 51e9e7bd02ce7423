"""Peak memory of a backward beyond its inputs and results, in a process of its own so that nothing is there already."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

import effk

from . import fftconv
from .fftconv_problem import BACKWARD, Problem, Shape
from .measure import Say
from .report import OURS, Row
from .worker import DEFAULT, Worker

OP = "fftconv"
CASE = "backward memory"
# As many rows as channels times eight, one row a channel, and few long rows: each has another reason to take memory.
SHAPES = (Shape(8, 768, 1024), Shape(8, 768, 4096), Shape(1, 768, 8192), Shape(1, 64, 1 << 16), Shape(1, 4, 1 << 20))


def rows(threads: int, say: Say) -> list[Row]:
    """One row per shape without a time; its case says how much was taken, in copies of u."""
    out = []
    for shape in SHAPES:
        worker = Worker(f"{__name__}:make", threads, DEFAULT)
        worker.load(shape.b, shape.h, shape.l)
        extra, nbytes, match = worker.result()[0].tolist()
        worker.close()
        case = f"{CASE}, {extra / nbytes:.3f} copies of u"
        say(f"{shape} {case}")
        tier = effk.isa.active()
        fixed = (OP, case, shape.keys(), "float32", tier, threads, OURS, effk.__version__)
        out.append(Row(*fixed, None, None, None, None, None, None, match))
    return out


def make(b: int, h: int, length: int) -> Callable[[], torch.Tensor]:
    """For `worker.Worker`: one backward of du and dk; gives (extra bytes, bytes of u, match).

    The peak is the largest resident set during the call (Linux: VmHWM, reset before), which counts touched pages
    wherever they come from: tensors, thread stacks, workspaces. Results and what was there before are subtracted.
    """
    problem = Problem(Shape(b, h, length))
    nbytes = 4 * problem.inputs[0].numel()
    assert problem.gy.numel()  # made before the measurement, as the inputs are
    call = fftconv.function(problem, BACKWARD, 0)

    def measure() -> torch.Tensor:
        before = reset_peak()
        grads = call(0)
        extra = peak() - before - sum(t.numel() * t.element_size() for t in grads)
        return torch.tensor([extra, nbytes, problem.match(BACKWARD, grads)], dtype=torch.float64)

    return measure


def status(name: str) -> int:
    """A size from /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status: expected a line {name}, found none")


def reset_peak() -> int:
    """Sets the largest resident set so far to the present one, which is returned."""
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def peak() -> int:
    """The largest resident set since."""
    return status("VmHWM")
