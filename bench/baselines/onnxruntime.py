"""ONNX Runtime: MatMulNBits with 2, 4 and 8 bits, accuracy level 4 (activations to int8 by block)."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from .. import machine
from ..backend import Backend, Missing, Runner, checkable, distinct
from ..problem import Problem, Quantized, Rounding
from ..shapes import Shape

NAME = "onnxruntime MatMulNBits"


def backends(shape: Shape, threads: int) -> Iterator[Backend | Missing]:
    """Blocks of the shape's group and, at four and two bits, of 32."""
    try:
        import onnx  # noqa: F401
        import onnxruntime
    except ImportError as error:
        yield Missing(NAME, str(error))
        return
    for bits, group in dict.fromkeys([(8, shape.group), (4, shape.group), (4, 32), (2, shape.group), (2, 32)]):
        case = f"int8, g{group}, accuracy 4, all copies in one graph"
        yield Backend(
            NAME,
            onnxruntime.__version__,
            case,
            bits,
            group,
            "float32",
            Rounding(act_group=group),
            lambda p, bits=bits, group=group: GraphRunner(p, p.quantized(bits, group), threads),
        )


class GraphRunner(Runner):
    """One session with a MatMulNBits node per copy on one input: the call overhead is shared by all products."""

    def __init__(self, problem: Problem, weight: Quantized, threads: int) -> None:
        self._x_all, self.oracle, self._n = problem.x.numpy(), weight.oracle, problem.shape.n
        blocks = pack_blocks(weight)
        scales = weight.scales.numpy()
        self.nbytes = blocks.nbytes + scales.nbytes
        self.products = machine.copies(self.nbytes)
        self._session = session(problem.shape, weight, blocks, scales, self.products, threads)
        self._single = session(problem.shape, weight, blocks, scales, 1, threads)

    def bind(self, m: int) -> None:
        self._binding, self._ys = bound(self._session, self._x_all[:m], self._n, self.products)
        self._single_binding, _ = bound(self._single, self._x_all[:m], self._n, 1)

    def call(self) -> None:
        self._session.run_with_iobinding(self._binding)

    def warm(self) -> Callable[[], None]:
        return lambda: self._single.run_with_iobinding(self._single_binding)

    def outputs(self) -> list[tuple[int, Tensor]]:
        self.call()
        return [(i, torch.from_numpy(self._ys[i].numpy())) for i in checkable(self._n, self.products)]


def pack_blocks(weight: Quantized) -> np.ndarray:
    """The operator's form: uint8 [n, blocks, group * bits / 8], low bits first, K padded with the zero point."""
    codes = torch.nn.functional.pad(weight.codes, (0, -weight.codes.shape[1] % weight.group), value=weight.zero).numpy()
    per_byte = 8 // weight.bits
    parts = codes.reshape(len(codes), -1, weight.group // per_byte, per_byte)
    shifts = (np.arange(per_byte) * weight.bits).astype(np.uint8)
    return np.bitwise_or.reduce(parts << shifts, axis=-1)


def session(
    shape: Shape, weight: Quantized, blocks: np.ndarray, scales: np.ndarray, copies: int, threads: int
) -> object:
    """An InferenceSession of `copies` nodes; x [M, K] with M free, y0 ... [M, N]."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    nodes, constants = [], []
    for i in range(copies):
        constants += [
            numpy_helper.from_array(distinct(blocks, i), f"b{i}"),
            numpy_helper.from_array(np.roll(scales, i, 0).reshape(-1), f"s{i}"),
        ]
        nodes.append(
            helper.make_node(
                "MatMulNBits",
                ["x", f"b{i}", f"s{i}"],
                [f"y{i}"],
                domain="com.microsoft",
                N=shape.n,
                K=shape.k,
                bits=weight.bits,
                block_size=weight.group,
                accuracy_level=4,
            )
        )
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["M", shape.k])
    ys = [helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, ["M", shape.n]) for i in range(copies)]
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(
        helper.make_graph(nodes, "copies", [x], ys, constants), opset_imports=opsets, ir_version=10
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Spin within a run, as by default, but not between runs: other backends take turns with this one.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def bound(session: object, x: np.ndarray, n: int, copies: int) -> tuple[object, list]:
    """An IO binding with x and `copies` outputs allocated once."""
    import onnxruntime

    binding = session.io_binding()
    binding.bind_ortvalue_input("x", onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(x)))
    ys = [onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros((len(x), n), np.float32)) for _ in range(copies)]
    for i, y in enumerate(ys):
        binding.bind_ortvalue_output(f"y{i}", y)
    return binding, ys
