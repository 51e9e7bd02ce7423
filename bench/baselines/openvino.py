"""OpenVINO CPU plug-in: MatMul with compressed int4 or int8 weights and dynamically quantised activations."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from .. import machine
from ..backend import Backend, Missing, Runner, checkable, distinct
from ..problem import FP16, Problem, Quantized, Rounding
from ..shapes import Shape

NAME = "openvino MatMul"


def backends(shape: Shape, threads: int) -> Iterator[Backend | Missing]:
    """int4 in the shape's groups and in groups of 32, int8 per row; activations in the same groups, at most 128."""
    try:
        import openvino
    except ImportError as error:
        yield Missing(NAME, str(error))
        return
    version = openvino.__version__.split("-")[0]
    for bits, group in dict.fromkeys([(4, shape.group), (4, 32), (8, 0)]):
        if group and shape.k % group:
            yield Missing(f"{NAME} g{group}", f"K = {shape.k} is no multiple of {group}")
            continue
        act = group or 128
        case = f"int8, {f'g{group}' if group else 'per row'}, dynamic quantisation group {act}, all copies in one graph"
        yield Backend(
            NAME,
            version,
            case,
            bits,
            group,
            "float32",
            Rounding(act_group=act, act_scale=FP16),
            lambda p, bits=bits, group=group, act=act: GraphRunner(p, p.quantized(bits, group), act, threads),
        )


class GraphRunner(Runner):
    """One compiled model with a MatMul per copy on one input."""

    def __init__(self, problem: Problem, weight: Quantized, act: int, threads: int) -> None:
        import openvino

        self._x_all, self.oracle, self._tensor = problem.x.numpy(), weight.oracle, openvino.Tensor
        self._n = problem.shape.n
        scales = weight.scales.half().numpy()
        self.nbytes = weight.codes.numel() * weight.bits // 8 + scales.nbytes
        self.products = machine.copies(self.nbytes)
        config = {
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "INFERENCE_PRECISION_HINT": "f32",
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": act,
        }
        model = openvino.Core().compile_model(graph(weight, scales, self.products), "CPU", config)
        self._request = model.create_infer_request()

    def bind(self, m: int) -> None:
        self._request.set_input_tensor(self._tensor(np.ascontiguousarray(self._x_all[:m])))

    def call(self) -> None:
        self._request.infer()

    def outputs(self) -> list[tuple[int, Tensor]]:
        self.call()
        copies = checkable(self._n, self.products)
        return [(i, torch.from_numpy(self._request.get_output_tensor(i).data.copy())) for i in copies]


def graph(weight: Quantized, scales: np.ndarray, copies: int) -> object:
    """A model of `copies` products of x with codes times scales, in the pattern that the plug-in keeps compressed."""
    import openvino
    from openvino import opset13 as ops

    n, k = weight.codes.shape
    group = weight.group or k
    signed = (weight.codes.to(torch.int16) - weight.zero).to(torch.int8).numpy()
    if weight.bits == 4:
        low = signed.view(np.uint8) & 15
        signed = low[:, 0::2] | low[:, 1::2] << 4
    kind = openvino.Type.i4 if weight.bits == 4 else openvino.Type.i8
    x = ops.parameter([-1, k], openvino.Type.f32, name="x")
    products = []
    for i in range(copies):
        raw = np.ascontiguousarray(distinct(signed, i)).reshape(-1)
        tensor = openvino.Tensor(raw, openvino.Shape([n, k // group, group]), kind)
        w = ops.convert(ops.constant(tensor, shared_memory=False), openvino.Type.f16)
        w = ops.multiply(w, ops.constant(np.roll(scales, i, 0).reshape(n, k // group, 1)))
        w = ops.convert(ops.reshape(w, ops.constant(np.array([n, k])), False), openvino.Type.f32)
        products.append(ops.matmul(x, w, False, True))
    return openvino.Model(products, [x], "copies")
