"""ONNX Runtime: a dense fp32 MatMul with a constant weight, which it packs once."""

from __future__ import annotations

import numpy as np
import torch

from ..dyad_problem import FORWARD, Made, Problem
from .onnxruntime import bound

NAME = "onnxruntime MatMul"
try:
    import onnxruntime

    VERSION = onnxruntime.__version__
except ImportError:
    VERSION = ""


def function(problem: Problem, kind: str, n: int, threads: int) -> Made | None:
    """fp32 forward: one node per copy of the weight on one input."""
    if n or kind != f"{FORWARD} fp32":
        return None
    from onnx import TensorProto, helper, numpy_helper

    (w,), layer = problem.weights(0), problem.layer
    copies = problem.rotation(w.numel() * 4)
    wt = w.T.contiguous().numpy()
    constants = [numpy_helper.from_array(np.roll(wt, i, 1), f"w{i}") for i in range(copies)]
    nodes = [helper.make_node("MatMul", ["x", f"w{i}"], [f"y{i}"]) for i in range(copies)]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["T", layer.f_in])
    ys = [helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, ["T", layer.f_out]) for i in range(copies)]
    graph = helper.make_graph(nodes, "copies", [x], ys, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 3
    # Spin within a run, as by default, but not between runs: other backends take turns with this one.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    bindings = [bound(session, x.numpy(), layer.f_out, copies) for x in problem.inputs]

    def call(i: int) -> object:
        binding, results = bindings[i % len(bindings)]
        session.run_with_iobinding(binding)
        return results[0]

    return Made(call, copies, lambda y: (torch.from_numpy(y.numpy()),))
