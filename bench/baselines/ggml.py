"""ggml, the kernels of llama.cpp, through the libraries that llama-cpp-python ships (or the folder EFFK_GGML_LIB)."""

from __future__ import annotations

import ctypes
import importlib.util
import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .. import machine
from ..backend import Backend, Missing, Runner
from ..problem import FP16, Oracle, Problem, Rounding
from ..shapes import Shape

NAME = "ggml mul_mat"
# ggml type: (number, class of bits, block of K, activation type's group). Activations are quantised to int8 in blocks.
TYPES = {
    "q8_0": (8, 8, 32, 32),
    "q4_0": (2, 4, 32, 32),
    "q4_K": (12, 4, 256, 256),
    "q3_K": (11, 3, 256, 256),
    "q2_K": (10, 2, 256, 256),
    "tq2_0": (35, 2, 256, 256),
}
PATTERN = 256  # rows that are really quantised, repeated over the matrix: some of ggml's quantisers are slow
GRAPH_SLACK = 8


class GgmlTensor(ctypes.Structure):
    """struct ggml_tensor (ggml.h): `extra` tells whether a weight was repacked. `Library` verifies the layout."""

    _fields_ = [
        ("type", ctypes.c_int32),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
        ("op", ctypes.c_int32),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * 10),
        ("view_src", ctypes.c_void_p),
        ("view_offs", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
        ("name", ctypes.c_char * 64),
        ("extra", ctypes.c_void_p),
    ]


class InitParams(ctypes.Structure):
    """struct ggml_init_params (ggml.h)."""

    _fields_ = [("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]


def backends(shape: Shape, threads: int) -> Iterator[Backend | Missing]:
    """Each type that K is a multiple of, as stored and, where ggml has kernels for it, repacked to interleaved rows."""
    try:
        lib = library()
    except (ImportError, OSError, AttributeError) as error:
        yield Missing(NAME, str(error))
        return
    for kind, (_, bits, block, act) in TYPES.items():
        if shape.k % block:
            yield Missing(f"{NAME} {kind}", f"K = {shape.k} is no multiple of {block}")
            continue
        for repack in (False, True):
            if repack and not repacks(kind, shape):
                continue
            case = f"int8, {kind}{' repacked' if repack else ''}, all copies in one graph"
            yield Backend(
                NAME,
                lib.version,
                case,
                bits,
                32,
                "float32",
                Rounding(act_group=act, act_scale=FP16),
                lambda p, kind=kind, repack=repack: GraphRunner(p, kind, repack, threads),
            )


LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
SILENT = LOG(lambda level, text, data: None)


class Library:
    """The functions used here, with their types."""

    def __init__(self, folder: Path) -> None:
        parts = [
            ctypes.CDLL(str(folder / name), ctypes.RTLD_GLOBAL)
            for name in ("libggml-base.so", "libggml-cpu.so", "libggml.so")
        ]
        pointer, size, i64, integer = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64, ctypes.c_int
        signatures = {
            "ggml_version": (ctypes.c_char_p,),
            "ggml_log_set": (None, LOG, pointer),
            "ggml_init": (pointer, InitParams),
            "ggml_free": (None, pointer),
            "ggml_tensor_overhead": (size,),
            "ggml_graph_overhead_custom": (size, size, ctypes.c_bool),
            "ggml_row_size": (size, integer, i64),
            "ggml_new_tensor_2d": (pointer, pointer, integer, i64, i64),
            "ggml_set_name": (pointer, pointer, ctypes.c_char_p),
            "ggml_mul_mat": (pointer, pointer, pointer, pointer),
            "ggml_quantize_chunk": (size, integer, pointer, pointer, i64, i64, i64, pointer),
            "ggml_new_graph_custom": (pointer, pointer, size, ctypes.c_bool),
            "ggml_build_forward_expand": (None, pointer, pointer),
            "ggml_backend_cpu_init": (pointer,),
            "ggml_backend_cpu_set_n_threads": (None, pointer, integer),
            "ggml_backend_cpu_buffer_type": (pointer,),
            "ggml_backend_alloc_ctx_tensors_from_buft": (pointer, pointer, pointer),
            "ggml_backend_buffer_free": (None, pointer),
            "ggml_backend_free": (None, pointer),
            "ggml_backend_tensor_set": (None, pointer, pointer, size, size),
            "ggml_backend_tensor_get": (None, pointer, pointer, size, size),
            "ggml_backend_graph_compute": (integer, pointer, pointer),
            "ggml_backend_dev_by_type": (pointer, integer),
            "ggml_backend_dev_backend_reg": (pointer, pointer),
            "ggml_backend_buft_name": (ctypes.c_char_p, pointer),
            "ggml_backend_reg_get_proc_address": (pointer, pointer, ctypes.c_char_p),
        }
        for name, (result, *arguments) in signatures.items():
            function = next((getattr(part, name) for part in parts if hasattr(part, name)), None)
            if function is None:
                raise AttributeError(f"{folder}: no function {name}; this version of ggml is not supported")
            function.restype, function.argtypes = result, arguments
            setattr(self, name.removeprefix("ggml_"), function)
        self.version = self.version().decode()
        self.log_set(SILENT, None)
        context = self.context(1)
        tensor = self.new_tensor_2d(context, 0, 32, 2)
        self.set_name(tensor, b"layout")
        seen = GgmlTensor.from_address(tensor)
        if seen.name != b"layout" or list(seen.ne) != [32, 2, 1, 1]:
            raise AttributeError(f"{folder}: struct ggml_tensor differs from the known layout")
        self.free(context)

    def context(self, tensors: int, graph: int = 0) -> int:
        """A context for that many tensors without data and, if graph > 0, a graph of that size."""
        nbytes = self.tensor_overhead() * (tensors + GRAPH_SLACK)
        return self.init(InitParams(nbytes + (self.graph_overhead_custom(graph, False) if graph else 0), None, True))

    def repack_type(self) -> int | None:
        """The buffer type that stores weights as interleaved rows, if this build has it."""
        registry = self.backend_dev_backend_reg(self.backend_dev_by_type(0))
        address = self.backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
        if not address:
            return None
        listed = ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)(address)(
            self.backend_dev_by_type(0)
        )
        for i in range(16):
            if not listed or not listed[i]:
                return None
            if self.backend_buft_name(listed[i]) == b"CPU_REPACK":
                return listed[i]
        return None


@cache
def library() -> Library:
    """Loads ggml. ImportError that says where it was looked for; OSError or AttributeError when it does not fit."""
    if importlib.util.find_spec("gguf") is None:
        raise ImportError("the package gguf is needed to check ggml's results")
    folder = os.environ.get("EFFK_GGML_LIB")
    if folder is None:
        package = importlib.util.find_spec("llama_cpp")
        if package is None or package.origin is None:
            raise ImportError("llama-cpp-python is not installed and EFFK_GGML_LIB is not set")
        folder = Path(package.origin).parent / "lib"
    return Library(Path(folder))


@cache
def repacks(kind: str, shape: Shape) -> bool:
    """Whether ggml interleaves the rows of a weight of this type and shape on this CPU."""
    lib = library()
    buffer_type = lib.repack_type()
    if buffer_type is None:
        return False
    context = lib.context(1)
    tensor = lib.new_tensor_2d(context, TYPES[kind][0], shape.k, shape.n)
    buffer = lib.backend_alloc_ctx_tensors_from_buft(context, buffer_type)
    interleaved = bool(buffer and GgmlTensor.from_address(tensor).extra)
    if buffer:
        lib.backend_buffer_free(buffer)
    lib.free(context)
    return interleaved


class GraphRunner(Runner):
    """One graph with a product per copy on one input."""

    def __init__(self, problem: Problem, kind: str, repack: bool, threads: int) -> None:
        lib = self._lib = library()
        n, k = problem.shape.n, problem.shape.k
        number = TYPES[kind][0]
        self._problem = problem
        raw, self.oracle = quantized(problem, kind)
        self.nbytes = raw.nbytes
        self.products = machine.copies(self.nbytes)
        self._cpu = lib.backend_cpu_init()
        lib.backend_cpu_set_n_threads(self._cpu, threads)
        self._weights_context = lib.context(self.products)
        self._weights = [lib.new_tensor_2d(self._weights_context, number, k, n) for _ in range(self.products)]
        buffer_type = lib.repack_type() if repack else lib.backend_cpu_buffer_type()
        self._weights_buffer = lib.backend_alloc_ctx_tensors_from_buft(self._weights_context, buffer_type)
        if not self._weights_buffer:
            raise MemoryError(f"ggml: no memory for {self.products} weights of {self.nbytes} bytes")
        for weight in self._weights:
            lib.backend_tensor_set(weight, raw.ctypes.data, 0, raw.nbytes)
        self._context = self._buffer = None

    def bind(self, m: int) -> None:
        self._release()
        lib, size = self._lib, 2 * self.products + GRAPH_SLACK
        self._context = lib.context(size + GRAPH_SLACK, 2 * size)
        x = lib.new_tensor_2d(self._context, 0, self._problem.shape.k, m)
        self._graph, self._single = (lib.new_graph_custom(self._context, size, False) for _ in range(2))
        self._ys = [lib.mul_mat(self._context, weight, x) for weight in self._weights]
        for y in self._ys:
            lib.build_forward_expand(self._graph, y)
        lib.build_forward_expand(self._single, self._ys[0])
        self._buffer = lib.backend_alloc_ctx_tensors_from_buft(self._context, lib.backend_cpu_buffer_type())
        rows = self._problem.x[:m].contiguous()
        lib.backend_tensor_set(x, rows.data_ptr(), 0, rows.nbytes)
        self._m = m

    def call(self) -> None:
        self._lib.backend_graph_compute(self._cpu, self._graph)

    def warm(self) -> Callable[[], None]:
        return lambda: self._lib.backend_graph_compute(self._cpu, self._single)

    def outputs(self) -> list[tuple[int, Tensor]]:
        self.call()
        out = []
        for y in (self._ys[0], self._ys[-1]):
            out.append((0, torch.empty(self._m, self._problem.shape.n)))
            self._lib.backend_tensor_get(y, out[-1][1].data_ptr(), 0, out[-1][1].nbytes)
        return out

    def _release(self) -> None:
        if self._context:
            self._lib.backend_buffer_free(self._buffer)
            self._lib.free(self._context)
            self._context = None

    def __del__(self) -> None:
        self._release()
        self._lib.backend_buffer_free(self._weights_buffer)
        self._lib.free(self._weights_context)
        self._lib.backend_free(self._cpu)


def quantized(problem: Problem, kind: str) -> tuple[np.ndarray, Oracle]:
    """The weight in ggml's type, and the oracle of what the gguf package says its bytes mean. Kept for the problem."""
    from gguf import GGMLQuantizationType, quants

    if kind not in problem.extras:
        lib, number = library(), TYPES[kind][0]
        n, k = problem.shape.n, problem.shape.k
        rows = problem.dense().oracle.weight[: min(PATTERN, n)].contiguous()
        pattern = np.empty((len(rows), lib.row_size(number, k)), np.uint8)
        lib.quantize_chunk(number, rows.data_ptr(), pattern.ctypes.data, 0, len(rows), k, None)
        values = torch.from_numpy(quants.dequantize(pattern, GGMLQuantizationType(number)).astype(np.float32))
        times = -(-n // len(rows))
        oracle = Oracle(values.repeat(times, 1)[:n], problem.x, problem.ms)
        problem.extras[kind] = np.ascontiguousarray(np.tile(pattern, (times, 1))[:n]), oracle
    return problem.extras[kind]
