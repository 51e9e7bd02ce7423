"""ONNX Runtime beside quik_linear: the integer product, and the dynamically quantised layer."""

from __future__ import annotations

import numpy as np
import torch

from ..quik_problem import LAYER, PRODUCT, Made, Problem

INTEGER, DYNAMIC = "onnxruntime MatMulInteger", "onnxruntime DynamicQuantizeMatMul"
try:
    import onnxruntime

    VERSION = onnxruntime.__version__
except ImportError:
    VERSION = ""


def made(
    problem: Problem, node: str, constants: dict[str, np.ndarray], x: np.ndarray, out: type, match, threads: int
) -> Made:
    """One node; the results are allocated once."""
    from onnx import TensorProto, helper, numpy_helper

    dtypes = {np.uint8: TensorProto.UINT8, np.float32: TensorProto.FLOAT, np.int32: TensorProto.INT32}
    m, n = problem.m, problem.layer.n
    graph = helper.make_graph(
        [
            helper.make_node(
                node, ["x", *constants], ["y"], domain="com.microsoft" if node == "DynamicQuantizeMatMul" else ""
            )
        ],
        "layer",
        [helper.make_tensor_value_info("x", dtypes[x.dtype.type], list(x.shape))],
        [helper.make_tensor_value_info("y", dtypes[out], [m, n])],
        [numpy_helper.from_array(c, name) for name, c in constants.items()],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 3
    # Spin within a run, as by default, but not between runs: other backends take turns with this one.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    binding.bind_ortvalue_input("x", onnxruntime.OrtValue.ortvalue_from_numpy(x))
    y = onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros((m, n), out))
    binding.bind_ortvalue_output("y", y)

    def call(i: int) -> object:
        session.run_with_iobinding(binding)
        return y

    return Made(call, match, read=lambda y: torch.from_numpy(y.numpy()))


def product(problem: Problem, kind: str, bits: int, outliers: bool) -> Made | None:
    """Codes times codes, unsigned with a zero point of 128 on the left, as the kernels like it best."""
    if kind != PRODUCT or bits != 8:
        return None
    constants = {
        "w": np.ascontiguousarray(problem.int_weight(8).numpy().T),
        "a0": np.array(128, np.uint8),
        "w0": np.array(0, np.int8),
    }
    x = (problem.codes.short() + 128).to(torch.uint8).numpy()
    return made(problem, "MatMulInteger", constants, x, np.int32, problem.match_product(8), torch.get_num_threads())


def dynamic(problem: Problem, kind: str, bits: int, outliers: bool) -> Made | None:
    """Activations by one scale a tensor, weights by one a row, x in fp32; one copy of the weight only."""
    if kind != LAYER or problem.rotation(1) > 1:
        return None
    scales = problem.w.abs().amax(1) / 127
    codes = (problem.w / scales[:, None]).round().to(torch.int8)
    constants = {
        "w": np.ascontiguousarray(codes.numpy().T),
        "s": scales.numpy(),
        "z": np.zeros(problem.layer.n, np.int8),
    }
    match = problem.match_dense(torch.float32, 127)
    return made(
        problem, "DynamicQuantizeMatMul", constants, problem.x.numpy(), np.float32, match, torch.get_num_threads()
    )
