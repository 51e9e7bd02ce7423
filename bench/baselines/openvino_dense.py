"""OpenVINO CPU plug-in: a dense MatMul with a constant weight, in fp32."""

from __future__ import annotations

import numpy as np
import torch

from ..dyad_problem import FORWARD, Made, Problem

NAME = "openvino MatMul"
try:
    import openvino

    VERSION = openvino.__version__.split("-")[0]
except ImportError:
    VERSION = ""


def function(problem: Problem, kind: str, n: int, threads: int) -> Made | None:
    """fp32 forward: one product per copy of the weight on one input."""
    if n or kind != f"{FORWARD} fp32":
        return None
    from openvino import opset13 as ops

    (w,) = problem.weights(0)
    copies = problem.rotation(w.numel() * 4)
    x = ops.parameter([-1, problem.layer.f_in], openvino.Type.f32, name="x")
    rolled = (np.ascontiguousarray(np.roll(w.numpy(), i, 0)) for i in range(copies))
    products = [ops.matmul(x, ops.constant(matrix), False, True) for matrix in rolled]
    config = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    model = openvino.Core().compile_model(openvino.Model(products, [x], "copies"), "CPU", config)
    request = model.create_infer_request()
    inputs = [openvino.Tensor(x.numpy()) for x in problem.inputs]

    def call(i: int) -> tuple[torch.Tensor, ...]:
        request.set_input_tensor(inputs[i % len(inputs)])
        request.infer()
        return (torch.from_numpy(request.get_output_tensor(0).data),)

    return Made(call, copies)
