"""torch with unquantised and int8 weights: F.linear, the packed oneDNN linear, dynamic int8 (fbgemm and oneDNN)."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import machine
from ..backend import Backend, CallRunner, Missing, Runner
from ..problem import BF16, Problem, Rounding
from ..shapes import Shape


def backends(shape: Shape, threads: int) -> Iterator[Backend | Missing]:
    """Dense fp32 and bf16, and int8 with per-row weight scales and per-tensor activations quantised in the call."""
    for dtype, bits, out in ((torch.float32, 32, 0.0), (torch.bfloat16, 16, BF16)):
        name = str(dtype).removeprefix("torch.")
        yield Backend(
            "torch F.linear",
            torch.__version__,
            f"float, {name}",
            bits,
            0,
            name,
            Rounding(out=out, weight=out),
            lambda p, dtype=dtype: dense(p, dtype),
        )
    if torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        yield Backend(
            "torch mkldnn linear",
            torch.__version__,
            "float, weight packed for the batch",
            16,
            0,
            "bfloat16",
            Rounding(out=BF16, weight=BF16),
            PackedRunner,
        )
    else:
        yield Missing("torch mkldnn linear", "oneDNN has no bf16 kernels on this CPU")
    for engine in ("fbgemm", "onednn"):
        if engine in torch.backends.quantized.supported_engines:
            yield Backend(
                f"torch dynamic int8 {engine}",
                torch.__version__,
                "int8, activations per tensor",
                8,
                0,
                "float32",
                Rounding(act_group=-1, act_levels=255),
                lambda p, engine=engine: dynamic(p, engine),
            )
        else:
            yield Missing(f"torch dynamic int8 {engine}", "engine not in torch.backends.quantized.supported_engines")


def dense(problem: Problem, dtype: torch.dtype) -> Runner:
    """F.linear: MKL for fp32, oneDNN for bf16; the weight is laid out anew in each call."""
    weight = problem.dense()
    w = weight.oracle.weight.to(dtype)
    nbytes = w.numel() * w.element_size()
    copies = [w.clone() for _ in range(machine.copies(nbytes))]
    return CallRunner(problem, weight.oracle, nbytes, copies, F.linear, dtype)


class PackedRunner(CallRunner):
    """The linear that torch.compile uses when it may freeze weights: oneDNN, the weight laid out for a batch size."""

    def __init__(self, problem: Problem) -> None:
        weight = problem.dense()
        self._dense = weight.oracle.weight.bfloat16()
        nbytes = self._dense.numel() * 2
        super().__init__(
            problem, weight.oracle, nbytes, [None] * machine.copies(nbytes), linear_pointwise, torch.bfloat16
        )

    def bind(self, m: int) -> None:
        super().bind(m)
        self._copies = [torch.ops.mkldnn._reorder_linear_weight(self._dense, m) for _ in self._copies]


def linear_pointwise(x: Tensor, w: Tensor) -> Tensor:
    """x W^T with a reordered weight, no bias and no activation."""
    return torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "")


def dynamic(problem: Problem, engine: str) -> Runner:
    """torch.ops.quantized.linear_dynamic with the weight packed by `engine`."""
    weight = problem.quantized(8, 0)
    torch.backends.quantized.engine = engine
    signed = (weight.codes.to(torch.int16) - weight.zero).to(torch.int8)
    scales = weight.scales[:, 0].double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # quantised tensors are deprecated; the op takes nothing else
        q = torch._make_per_channel_quantized_tensor(signed, scales, torch.zeros(len(scales), dtype=torch.long), 0)
    nbytes = signed.numel() + 4 * len(scales)
    copies = [torch.ops.quantized.linear_prepack(q, None) for _ in range(machine.copies(nbytes))]
    return CallRunner(problem, weight.oracle, nbytes, copies, torch.ops.quantized.linear_dynamic, torch.float32)
