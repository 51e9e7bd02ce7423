"""Carry out a plan: compress every layer, replace its module, check the result, and keep account."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..formats import bitmask, quik
from ..formats.bitmask import BitmaskTensor
from ..formats.quik import QuikWeight
from ..formats.wq import WqWeight, weight_bytes
from ..nn import BitmaskLinear, QuikLinear, WqGroupedLinear, WqLinear
from ..ops import bitmask_linear
from .calibrate import LayerStats, stream_blocks
from .layers import Layer, replace_module
from .plan import LayerPlan, Plan, outlier_count
from .registry import Context, Handler
from .report import LayerReport

_COMPRESSED = (WqLinear, WqGroupedLinear, QuikLinear, BitmaskLinear)
_CHECK_ROWS = 2  # rows of x in the self-check: enough to catch a packing error, cheap beside the compression itself
_CHECK_CHUNK = 1024  # rows of W converted to float64 at once


def apply_plan(context: Context, handler: Handler, plan: Plan) -> dict[str, LayerReport]:
    """Replace every planned layer of ``context.model``; block by block and input group by input group when the
    handler reads statistics.

    Each module is replaced as soon as it is compressed, so memory never exceeds the model plus one block, and later
    blocks are calibrated on what the compressed ones before them produce.

    Raises:
        ValueError: the handler's weight contradicts the plan.
        RuntimeError: the kernel and the stored weight disagree (the self-check).
    """
    planned = [layer for layer in context.layers if layer.name in plan.layers]
    wanted = handler.statistics(context.recipe)
    done: dict[str, LayerReport] = {}

    def compress(layers: Sequence[Layer], stats: Mapping[str, LayerStats]) -> None:
        for layer in layers:
            entry = plan.layers[layer.name]
            done[layer.name] = _compress_layer(context, handler, layer, entry, stats.get(layer.name))
            context.progress("apply", len(done), len(planned))

    context.progress("apply", 0, len(planned))
    inside = [layer for layer in planned if layer.block is not None] if wanted else []
    if inside:
        for block in stream_blocks(context.model, inside, context.calib, reference="drift" in wanted):
            members = [layer for layer in inside if layer.block == block.name]
            # One input group at a time, in module order: each sees the compressed layers before it in the same block.
            for _, group in itertools.groupby(members, key=lambda layer: layer.input_group):
                layers = list(group)
                compress(layers, block.statistics(layers, wanted))
    compress([layer for layer in planned if layer.name not in done], {})
    for layer in planned:
        handler.finish(context.model.get_submodule(layer.name), plan.layers[layer.name])
    return {layer.name: done[layer.name] for layer in planned}


def _compress_layer(
    context: Context, handler: Handler, layer: Layer, entry: LayerPlan, stats: LayerStats | None
) -> LayerReport:
    start = time.perf_counter()
    dense = layer.weight()
    weight = handler.quantize(context, layer, dense, entry, stats)
    _check_against_plan(layer, entry, weight)
    module = handler.module(weight, layer.bias, entry)
    report = install_layer(context.model, layer, dense, weight, module, start, None if stats is None else stats.hessian)
    return dataclasses.replace(report, bits_a=entry.options.get("bits_a", 16))


def install_layer(
    model: nn.Module,
    layer: Layer,
    dense: Tensor,
    weight: WqWeight | QuikWeight | BitmaskTensor,
    module: WqLinear | WqGroupedLinear | QuikLinear | BitmaskLinear,
    start: float,
    hessian: Tensor | None = None,
) -> LayerReport:
    """Put ``module``, made from ``weight``, in the place of ``layer`` after comparing its kernel with the stored numbers.

    ``dense`` is the layer's fp32 weight.

    ``start`` is when the work on the layer began (``time.perf_counter``), ``hessian`` ``sum x^T x`` of its inputs.

    Raises:
        RuntimeError: the kernel and the stored weight disagree.
    """
    restored = weight.dequantize()
    _self_check(layer.name, module, weight.stored() if isinstance(weight, QuikWeight) else restored)
    replace_module(model, layer.name, module)
    layer.module = None  # the last reference to the dense weight but for ``dense``
    compute = "float" if isinstance(module, QuikLinear) else module.compute
    report = report_on(weight, dense, restored, compute, layer.nbytes, time.perf_counter() - start, hessian)
    if isinstance(module, WqGroupedLinear):
        parts = zip(dense.chunk(module.experts), restored.chunk(module.experts), strict=True)
        errors = tuple(_ratio((a - b).square().sum(), a.square().sum()) for a, b in parts)
        return dataclasses.replace(report, expert_errors=errors)
    return report


def report_on(
    weight: WqWeight | QuikWeight | BitmaskTensor,
    dense: Tensor,
    restored: Tensor,
    compute: str,
    before: int,
    seconds: float,
    hessian: Tensor | None,
) -> LayerReport:
    """The account of one weight; ``before`` is its size in bytes before."""
    columns = weight.outliers if isinstance(weight, QuikWeight) else 0
    wq = weight.base if isinstance(weight, QuikWeight) else weight
    sparse = isinstance(weight, BitmaskTensor)
    return LayerReport(
        bits=weight.bits,
        true_bits=weight.bits_per_weight(),
        group_size=weight.group if sparse else wq.group_size,
        outliers=0 if sparse or wq.out_val is None else wq.out_val.numel(),
        outlier_columns=columns,
        compute=compute,
        weights=dense.numel(),
        bytes_before=before,
        bytes_after=weight.nbytes(),
        error=_ratio((dense - restored).square().sum(), dense.square().sum()),
        output_error=None if hessian is None else _output_error(dense, restored, hessian),
        seconds=seconds,
    )


def _check_against_plan(layer: Layer, entry: LayerPlan, weight: WqWeight | QuikWeight | BitmaskTensor) -> None:
    weight.validate()
    if isinstance(weight, BitmaskTensor):
        got = {"n": weight.n, "k": weight.k, "bits": weight.bits, "group_size": weight.group}
        expected = {"n": layer.n, "k": layer.k, "bits": entry.bits, "group_size": entry.group_size}
        _expect_planned(layer, expected, got)
        return
    if isinstance(weight, QuikWeight):
        got = {name: getattr(weight, name) for name in ("n", "k", "bits", "outliers", "rotated", "pattern")}
        expected = {"n": layer.n, "k": layer.k, "bits": entry.bits, "outliers": entry.options["outlier_columns"]}
        expected |= {name: entry.options[name] for name in ("rotated", "pattern")}
        _expect_planned(layer, expected, got)
        return
    got = {
        "n": weight.n,
        "k": weight.k,
        "bits": weight.bits,
        "group_size": weight.group_size,
        "zeros": weight.zeros is not None,
        "codebook": weight.codebook is not None,
        "outliers": 0 if weight.out_val is None else weight.out_val.numel(),
    }
    expected = {
        "n": layer.n,
        "k": layer.k,
        "bits": entry.bits,
        "group_size": entry.group_size,
        "zeros": entry.format == "asym",
        "codebook": entry.format not in ("sym", "asym"),
        "outliers": outlier_count(layer.n, layer.k, entry.outliers),
    }
    _expect_planned(layer, expected, got)


def _expect_planned(layer: Layer, expected: Mapping[str, object], got: Mapping[str, object]) -> None:
    if got != expected:
        raise ValueError(f"compress: {layer.name}: expected the planned {expected}, got {got}")


def _self_check(name: str, module: WqLinear | WqGroupedLinear | QuikLinear | BitmaskLinear, restored: Tensor) -> None:
    """Compare the kernel for unrounded activations on random x with the dequantised weight in float64.

    Each output is a sum of at most 2 K products in fp32 (a dense and a sparse one per column), in a fixed order:
    |error| <= (2 K + 4) 2^-24 sum |x w|, the 4 for the roundings of value, zero point, scale and result (Higham,
    "Accuracy and Stability of Numerical Algorithms", section 3.1).
    """
    k = module.in_features
    x = torch.randn(_CHECK_ROWS, k, generator=torch.Generator().manual_seed(0)).to(restored.device)
    if isinstance(module, QuikLinear):
        got = module.product(x, 16, None).double()
    elif isinstance(module, BitmaskLinear):
        got = bitmask_linear.linear(x, module.packed).double()
    elif isinstance(module, WqGroupedLinear):  # the same x for each expert; results side by side, as the stack's rows
        count, exact = module.experts, copy.copy(module)
        exact.compute = "float"
        offsets = torch.arange(count + 1, dtype=torch.int32, device=x.device) * _CHECK_ROWS
        got = exact(x.repeat(count, 1), offsets).double().view(count, _CHECK_ROWS, -1).transpose(0, 1).flatten(1)
    else:
        got = torch.ops.effk.wq_linear(x, *module._weight_args(), None, *module._geometry(), "float").double()
    x = x.double()
    for start in range(0, restored.shape[0], _CHECK_CHUNK):
        rows = slice(start, start + _CHECK_CHUNK)
        w = restored[rows].double()
        expected = x @ w.t()
        bound = (2 * k + 4) * 2.0**-24 * (x.abs() @ w.abs().t())
        bad = ((got[:, rows] - expected).abs() > bound).any(0).nonzero()
        if bad.numel():
            row = int(bad[0])
            raise RuntimeError(
                f"compress: {name}: expected the kernel to match the stored weight, "
                f"got {float(got[0, start + row]):.6g} instead of {float(expected[0, row]):.6g} in row {start + row}"
            )


def _output_error(dense: Tensor, restored: Tensor, hessian: Tensor) -> float:
    difference = dense - restored
    return _ratio(((difference @ hessian) * difference).sum(), ((dense @ hessian) * dense).sum())


def _ratio(error: Tensor, reference: Tensor) -> float:
    return float((error / reference).clamp_min(0).sqrt()) if float(reference) > 0 else float(error.clamp_min(0).sqrt())


def model_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and persistent buffers; compressed layers count as they are stored, not as packed."""
    compressed = {n: module for n, module in model.named_modules() if isinstance(module, _COMPRESSED)}
    total = sum(stored_bytes(module) for module in compressed.values())
    seen: set[int] = set()
    for name, module in model.named_modules():
        tensors = list(module._parameters.values())
        tensors += [b for key, b in module._buffers.items() if key not in module._non_persistent_buffers_set]
        for tensor in [] if name in compressed else tensors:
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                total += tensor.numel() * tensor.element_size()
    return total


def stored_bytes(module: WqLinear | WqGroupedLinear | QuikLinear | BitmaskLinear) -> int:
    """Bytes of a compressed layer in canonical form, bias included."""
    if isinstance(module, BitmaskLinear):
        bias = 0 if module.bias is None else module.bias.numel() * module.bias.element_size()
        packed = module.packed
        bits = 8 * packed.values.element_size()
        return bias + bitmask.weight_bytes(packed.n, packed.k, bits, packed.stored, module.group)
    if isinstance(module, QuikLinear):
        bias = 0 if module.bias is None else module.bias.numel() * module.bias.element_size()
        return bias + quik.weight_bytes(
            module.out_features, module.in_features, module.bits, module.outliers, module.pattern
        )
    if isinstance(module, WqGroupedLinear):
        rows, scale_bytes = module.experts * module.out_features, module.scales.element_size()
        how = {"zeros": module.zeros is not None, "scale_bytes": scale_bytes}
        return weight_bytes(rows, module.in_features, module.bits, module.group_size, **how)
    table = None if module.codebook is None else "shared" if module.codebook.dim() == 1 else "row"
    dense = weight_bytes(
        module.out_features,
        module.in_features,
        module.bits,
        module.group_size,
        zeros=module.zeros is not None,
        scale_bytes=module.scales.element_size(),
        codebook=table,
    )
    rest = (module.out_ptr, module.out_col, module.out_val, module.bias)
    return dense + sum(t.numel() * t.element_size() for t in rest if t is not None)
