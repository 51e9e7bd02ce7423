"""torch beside quik_linear: F.linear in fp32 and bf16, dynamic int8, int8 products, and the steps of the layer."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..quik_problem import FEW, LAYER, PRODUCT, Made, Problem, rotating

VERSION = torch.__version__
FP32, BF16 = "torch F.linear fp32", "torch F.linear bf16"
DYNAMIC, INT_MM, QLINEAR, STEPS = (
    "torch dynamic int8",
    "torch._int_mm",
    "torch onednn.qlinear",
    "torch operations around torch._int_mm",
)


def linear(dtype: torch.dtype) -> Callable[[Problem, str, int, bool], Made | None]:
    """F.linear in a dtype."""

    def function(problem: Problem, kind: str, bits: int, outliers: bool) -> Made | None:
        if kind != LAYER:
            return None
        x, w = problem.x.to(dtype), problem.w.to(dtype)
        copies = [w.clone() for _ in range(problem.rotation(w.numel() * w.element_size()))]
        return Made(rotating(copies, lambda w: F.linear(x, w)), problem.match_dense(dtype))

    return function


def dynamic(problem: Problem, kind: str, bits: int, outliers: bool) -> Made | None:
    """A dynamically quantised layer: oneDNN, activations and weights by one scale a tensor, x in fp32."""
    if kind != LAYER:
        return None
    if "onednn" in torch.backends.quantized.supported_engines:
        torch.backends.quantized.engine = "onednn"
    n, k = problem.w.shape
    float_layer = torch.nn.Linear(k, n, bias=False)
    with torch.inference_mode(False), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        float_layer.weight.data.copy_(problem.w)
        layers = [
            torch.ao.quantization.quantize_dynamic(torch.nn.Sequential(float_layer), dtype=torch.qint8)
            for _ in range(problem.rotation(n * k))
        ]
    return Made(rotating(layers, lambda layer: layer(problem.x)), problem.match_dense(torch.float32, 127))


def int_mm(problem: Problem, kind: str, bits: int, outliers: bool) -> Made | None:
    """int8 times int8 to int32."""
    if kind != PRODUCT or bits != 8 or problem.m <= FEW:
        return None
    w = problem.int_weight(8).T.contiguous()
    return Made(lambda i: torch._int_mm(problem.codes, w), problem.match_product(8))


def qlinear(problem: Problem, kind: str, bits: int, outliers: bool) -> Made | None:
    """oneDNN's quantised layer on codes, weight packed for this number of rows; sums come back in fp32."""
    if kind != PRODUCT or bits != 8:
        return None
    n, k = problem.w.shape
    unsigned = (problem.codes.short() + 128).to(torch.uint8)
    packed = torch.ops.onednn.qlinear_prepack(problem.int_weight(8).T, [problem.m, k])
    ones, zeros = torch.ones(n), torch.zeros(n, dtype=torch.int32)
    run = torch.ops.onednn.qlinear_pointwise

    def call(i: int) -> Tensor:
        return run(unsigned, 1.0, 128, packed, ones, zeros, None, 1.0, 0, torch.float32, "none", [], "")

    try:
        call(0)
    except RuntimeError:  # oneDNN has no such primitive for small sides
        return None
    return Made(call, problem.match_product(8))


def steps(problem: Problem, kind: str, bits: int, outliers: bool) -> Made | None:
    """What quik_linear does, written in torch."""
    if kind != LAYER or not outliers or bits != 8 or problem.m <= FEW:
        return None
    base, x = problem.base(8, True), problem.x.bfloat16()
    codes = (base.weight.codes().short() - 128).to(torch.int8)
    w, scales, reduced = codes.T.contiguous(), base.weight.scales[:, 0].float(), base.packed.w_reduced
    columns, outlier, w_out = base.int_idx.long(), base.fp_idx.long(), base.w_out

    def call(i: int) -> Tensor:
        part = x.index_select(1, columns).float()
        lo, hi = torch.aminmax(part, dim=1, keepdim=True)
        s = ((hi - lo) / 255).clamp(min=1e-6)
        q = ((part - lo) / s).round_().clamp_(0, 255).sub_(128).to(torch.int8)
        acc = torch._int_mm(q, w)
        y = acc.float().mul_(s).mul_(scales).add_((lo + 128 * s) * reduced)
        return y.add_(F.linear(x.index_select(1, outlier), w_out)).bfloat16()

    # A quotient next to a half may round to the other side: one step of s sw |q| in some elements.
    return Made(call, problem.match_quik(base, torch.bfloat16, False))
