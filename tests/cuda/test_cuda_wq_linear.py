"""The CUDA kernels of wq_linear and their binding against the float64 reference: on a GPU, and emulated on the CPU.

Both backends run the same tests. The emulated one is ``torch.ops.effk_emu``, the same binding and kernels compiled for CPU
tensors, in three orders of threads; it exists in editable installs on machines with nvcc.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import effk
from effk.formats.wq import GROUP_SIZES, WqWeight
from effk.ops import wq_linear as wq
from wq_cases import BITS, DTYPES, SIGNIFICANT_BITS, bound, check, kinds, random_input, random_weight

EMULATION = Path(effk.__file__).parent / "effk_emu.so"
MAX_ROWS = 64  # cuda::kMaxRows: above it, and for fp32, the weight is dequantised and torch multiplies
SHAPES = ((33, 576), (17, 200), (50, 130), (15, 257), (64, 300), (31, 33), (16, 1), (1, 67), (47, 319))


class Backend:
    """Where the ops live and where their tensors must be."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.device = "cuda" if name == "gpu" else "cpu"
        if name != "gpu":
            torch.ops.load_library(EMULATION)

    @property
    def ops(self) -> Any:
        return torch.ops.effk if self.name == "gpu" else torch.ops.effk_emu

    def move(self, t: Tensor | None) -> Tensor | None:
        return None if t is None else t.to(self.device)

    def linear(self, x: Tensor, weight: wq.PackedWeight, bias: Tensor | None = None, compute: str = "float") -> Tensor:
        tensors = map(self.move, weight.tensors)
        return self.ops.wq_linear(self.move(x), *tensors, self.move(bias), *weight.geometry, compute).cpu()


@pytest.fixture(params=["fwd", "rev", "7", "gpu"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Backend]:
    """A GPU, or the emulation in one of three orders of threads."""
    if request.param == "gpu":
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        yield Backend("gpu")
        return
    if "EFFK_TEST_GPU_ONLY" in os.environ or not EMULATION.exists():
        pytest.skip("the emulated kernels were not built (an editable install with nvcc builds them)")
    monkeypatch.setenv("CUEMU_ORDER", request.param)
    yield Backend("emulated")


def allowed(x: Tensor, weight: WqWeight, expected: Tensor, bias: Tensor | None) -> Tensor:
    """The CPU's bound for fp32 sums in any order, plus what only CUDA rounds.

    Codebook entries are carried as two 16-bit parts. Above MAX_ROWS rows the weight and the bias are rounded to the type
    of x, a weight with an outlier twice, and torch's GEMM may round partial sums to it and the sum before the bias: each
    by at most one unit of sum |w x| + |bias|.
    """
    total = bound(x, weight, expected, bias, "float")
    rows = x.reshape(-1, weight.k).double().abs()
    scales = wq.expand_groups(weight.scales.double().abs(), weight)
    if weight.codebook is not None:
        entries = wq.dense_values(weight).abs()
        split = entries * 2.0**-21 + 2.0**-25 if x.dtype == torch.float16 else entries * 2.0**-16
        total = total + (rows @ (scales * split).T).reshape(total.shape)
    if x.dtype != torch.float32 and rows.shape[0] > MAX_ROWS:
        values = scales * wq.dense_values(weight).abs()
        if weight.out_ptr is not None:
            values = values + wq.outlier_matrix(weight).abs()
        sums = (rows @ values.T).reshape(total.shape)
        total = total + 4 * 2.0 ** -SIGNIFICANT_BITS[x.dtype] * (sums if bias is None else sums + bias.double().abs())
    return total


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", BITS)
def test_matches_reference(backend: Backend, bits: int, dtype: torch.dtype) -> None:
    """Kinds x groups x outliers, on shapes and row counts in turn, every kernel shape among them."""
    shapes, rows = itertools.cycle(SHAPES), itertools.cycle((1, 9, 17, 33, 3, 64, 8, 65, 16, 5, 32))
    for seed, (kind, group, sparse) in enumerate(itertools.product(kinds(bits), GROUP_SIZES, (0.0, 0.02))):
        (n, k), m = next(shapes), next(rows)
        scale_dtype = torch.float32 if seed % 3 == 0 else torch.float16
        weight = random_weight(n, k, bits, group, kind, outliers=sparse, scale_dtype=scale_dtype, seed=seed)
        bias = torch.randn(n).to(DTYPES[seed % 3]) if seed % 2 else None
        x = random_input(m, k, dtype, seed)
        y = backend.linear(x, wq.pack(weight), bias)
        assert y.dtype == dtype
        expected = wq.reference(x, weight, bias)
        check(y, expected, allowed(x, weight, expected, bias), f"{kind} group {group} outliers {sparse} {n}x{k} m {m}")


@pytest.mark.parametrize("bits", BITS)
def test_long_rows(backend: Backend, bits: int) -> None:
    """K long enough for several warps a row panel and, with few rows, for clusters of blocks that share it."""
    for n, m, dtype in ((16, 1, torch.float16), (40, 12, torch.bfloat16), (64, 20, torch.float16)):
        weight = random_weight(n, 4160, bits, 128, outliers=0.005)
        x = random_input(m, 4160, dtype)
        expected = wq.reference(x, weight)
        check(backend.linear(x, wq.pack(weight)), expected, allowed(x, weight, expected, None), f"{n} {m}")


@pytest.mark.parametrize("bits", BITS)
def test_integers_are_exact(backend: Backend, bits: int) -> None:
    """Small integers times powers of two: every sum is exact in fp32, so every path agrees to the bit."""
    weight = random_weight(37, 320, bits, 64, "asymmetric")
    weight = WqWeight.from_codes(
        weight.codes(), torch.full_like(weight.scales, 0.125), bits=bits, group_size=64, zeros=weight.zeros
    )
    for m, dtype in ((1, torch.float16), (11, torch.bfloat16), (40, torch.float16), (70, torch.float32)):
        x = torch.randint(-2, 3, (m, 320), generator=torch.Generator().manual_seed(m)).to(dtype)
        expected = wq.reference(x, weight).to(dtype)
        assert torch.equal(backend.linear(x, wq.pack(weight)), expected)


def test_rows_and_calls_do_not_matter(backend: Backend) -> None:
    """A row's bits are the same whatever stands beside it, within one kernel; and the same in every call."""
    for bits, dtype in itertools.product(BITS, (torch.float16, torch.bfloat16)):
        packed = wq.pack(random_weight(50, 640, bits, 64, outliers=0.02))
        x = random_input(64, 640, dtype)
        for rows in ((1, 3, 8), (9, 16), (17, 32), (33, 64)):
            whole = backend.linear(x[: rows[-1]], packed)
            assert torch.equal(whole, backend.linear(x[: rows[-1]], packed))
            for m in rows[:-1]:
                assert torch.equal(backend.linear(x[:m], packed), whole[:m])


def test_x_of_any_shape_and_place(backend: Backend) -> None:
    weight = random_weight(20, 96)
    packed = wq.pack(weight)
    x = random_input(12, 96, torch.float16)
    y = backend.linear(x, packed)
    assert torch.equal(backend.linear(x.reshape(3, 4, 96), packed), y.reshape(3, 4, 20))
    assert torch.equal(backend.linear(x[0], packed), backend.linear(x[:1], packed)[0])
    assert torch.equal(backend.linear(x.T.contiguous().T, packed), y)
    # off 16-byte alignment
    shifted = torch.empty(12 * 96 + 1, dtype=x.dtype, device=backend.device)[1:].view(12, 96).copy_(x)
    tensors = [backend.move(t) for t in packed.tensors]
    assert torch.equal(backend.ops.wq_linear(shifted, *tensors, None, *packed.geometry, "float").cpu(), y)
    assert backend.linear(x[:0], packed).shape == (0, 20)


def test_weight_cut_by_rows(backend: Backend) -> None:
    """Tiles are the outer index of every array, so a cut is a view, whose start may be less aligned."""
    weight = random_weight(64, 130, 3, 32, "asymmetric", outliers=0.05)
    x = random_input(5, 130, torch.bfloat16)
    whole, part = wq.pack(weight), wq.pack(weight.rows(16, 48))
    views = [None if t is None else t[1:3] for t in whole.tensors[:3]]
    cut = part._replace(packed=views[0], scales=views[1], zeros=views[2])
    assert torch.equal(backend.linear(x, cut), backend.linear(x, whole)[:, 16:48])


@pytest.mark.parametrize("bits", BITS)
def test_dequantize_and_backward(backend: Backend, bits: int) -> None:
    for kind in kinds(bits):
        weight = random_weight(37, 203, bits, 64, kind, outliers=0.02)
        packed = wq.pack(weight)
        tensors = [backend.move(t) for t in packed.tensors]
        w = backend.ops.wq_dequantize(*tensors, *packed.geometry).cpu()
        expected = weight.dequantize(torch.float64)
        check(w, expected, expected.abs() * 2.0**-22 + wq.outlier_matrix(weight).abs() * 2.0**-23 + 1e-30)
        for dtype in DTYPES:
            grad = random_input(6, 37, dtype)
            got = backend.ops.wq_linear_backward(backend.move(grad), *tensors, *packed.geometry).cpu()
            magnitude = grad.double().abs() @ expected.abs() + grad.double().abs() @ wq.outlier_matrix(weight).abs()
            check(
                got,
                grad.double() @ expected,
                6 * 2.0 ** -SIGNIFICANT_BITS[dtype] * magnitude + 40 * 2.0**-23 * magnitude + 1e-7,
            )


def test_multi_linear(backend: Backend) -> None:
    weights = [random_weight(n, 160, bits, 32, seed=n) for n, bits in ((33, 4), (16, 3), (48, 8))]
    packed = [wq.pack(w) for w in weights]
    biases = [torch.randn(33), None, torch.randn(48).half()]
    for m in (2, 66):
        x = random_input(m, 160, torch.float16)
        columns = [[backend.move(t) for t in column] for column in zip(*(p.tensors for p in packed), strict=True)]
        ys = backend.ops.wq_multi_linear(
            backend.move(x), *columns, [backend.move(b) for b in biases], [p.n for p in packed], 160,
            [p.bits for p in packed], [p.group_size for p in packed], "float",
        )  # fmt: skip
        for y, p, b in zip(ys, packed, biases, strict=True):
            assert torch.equal(y.cpu(), backend.linear(x, p, b))


def test_non_finite_rows_stay_apart(backend: Backend) -> None:
    packed = wq.pack(random_weight(20, 96))
    x = random_input(4, 96, torch.float16)
    bad = x.clone()
    bad[1, 5], bad[2, 90] = torch.nan, torch.inf
    y, good = backend.linear(bad, packed), backend.linear(x, packed)
    assert y[1].isnan().all() and not y[2].isfinite().any()
    assert torch.equal(y[[0, 3]], good[[0, 3]])


def test_wild_outlier_indices_give_nan(backend: Backend) -> None:
    """Indices on a device cannot be checked before the launch: they are not followed, and the row says so."""
    if backend.name != "gpu":
        pytest.skip("indices in host memory are refused before the launch")
    packed = wq.pack(random_weight(20, 96, outliers=0.1))
    columns = packed.out_col.to(torch.int32)
    columns[int(packed.out_ptr[3])] = 60000
    y = backend.linear(random_input(2, 96, torch.float16), packed._replace(out_col=columns.to(torch.uint16)))
    assert y[:, 3].isnan().all() and not y[:, :3].isnan().any() and not y[:, 4:].isnan().any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"compute": "int8"}, "compute: expected 'float' for CUDA"),
        ({"compute": "fp8"}, "compute: expected 'float' or 'int8', got 'fp8'"),
        ({"x": torch.zeros(2, 95)}, r"x: expected \[\.\.\., 96\]"),
        ({"x": torch.zeros(2, 96, dtype=torch.float64)}, "x: expected float32, bfloat16 or float16, got float64"),
        ({"bits": 5}, "bits: expected 2, 3, 4 or 8, got 5"),
        ({"group_size": 48}, "group_size: expected 32, 64, 128, 256"),
        ({"n": 40}, r"packed: expected uint8 \[3, 12, 64\]"),
    ],
)
def test_bad_arguments(backend: Backend, change: dict[str, Any], message: str) -> None:
    packed = wq.pack(random_weight(20, 96))
    values = packed._asdict() | {"x": torch.zeros(2, 96), "bias": None, "compute": "float"} | change
    order = ("x", *packed._fields[:7], "bias", *packed._fields[7:], "compute")
    arguments = [backend.move(v) if isinstance(v, Tensor) else v for v in (values[name] for name in order)]
    with pytest.raises(RuntimeError, match=message):
        backend.ops.wq_linear(*arguments)


class TestOnGpu:
    """What only a GPU can show."""

    @pytest.fixture(autouse=True)
    def gpu(self) -> None:
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")

    def call(self, weight: WqWeight, x: Tensor) -> Tensor:
        packed = wq.pack(weight)
        self.tensors = [None if t is None else t.cuda() for t in packed.tensors]
        return torch.ops.effk.wq_linear(x, *self.tensors, None, *packed.geometry, "float")

    @pytest.mark.parametrize(
        ("m", "dtype"),
        [(1, torch.float16), (16, torch.bfloat16), (64, torch.float16), (200, torch.float16), (3, torch.float32)],
    )
    def test_graph(self, m: int, dtype: torch.dtype) -> None:
        """A captured call gives the eager result, also for inputs that arrive after the capture."""
        weight = random_weight(256, 1024, 4, 128, outliers=0.005)
        x = random_input(m, 1024, dtype).cuda()
        eager = self.call(weight, x)
        packed, held = wq.pack(weight), torch.zeros_like(x)
        tensors = [None if t is None else t.cuda() for t in packed.tensors]
        run = lambda: torch.ops.effk.wq_linear(held, *tensors, None, *packed.geometry, "float")  # noqa: E731
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = run()
        held.copy_(x)
        graph.replay()
        assert torch.equal(y, eager)

    def test_stream(self) -> None:
        """Work goes to the current stream: it sees what that stream wrote before, with no wait in between."""
        weight = random_weight(512, 2048, 4, 128)
        x = random_input(4, 2048, torch.float16).cuda()
        expected, late = self.call(weight, x), torch.zeros_like(x)
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        geometry = wq.pack(weight).geometry
        with torch.cuda.stream(stream):
            torch.cuda._sleep(100_000_000)
            late.copy_(x)
            y = torch.ops.effk.wq_linear(late, *self.tensors, None, *geometry, "float")
        stream.synchronize()
        assert torch.equal(y, expected)

    def test_chain_of_calls(self) -> None:
        """Kernels that may overlap: each reads what the one before wrote, many times over."""
        weight = random_weight(1024, 1024, 4, 128)
        packed = wq.pack(weight)
        tensors = [None if t is None else t.cuda() for t in packed.tensors]
        step = lambda x: torch.ops.effk.wq_linear(x, *tensors, None, *packed.geometry, "float")  # noqa: E731
        x = random_input(1, 1024, torch.bfloat16).cuda()
        separate = x
        for _ in range(20):
            separate = step(separate)
            torch.cuda.synchronize()
        for _ in range(20):
            together = x
            for _ in range(20):
                together = step(together)
            assert torch.equal(together, separate)

    def test_module_moves(self) -> None:
        from effk.nn import WqLinear

        weight = random_weight(48, 576, 3, 64, "asymmetric", outliers=0.01)
        module = WqLinear.from_weight(weight, torch.randn(48), compute="float").cuda()
        x = random_input(5, 576, torch.float16)
        expected = wq.reference(x, weight, module.bias.cpu())
        check(module(x.cuda()).cpu(), expected, allowed(x, weight, expected, module.bias.cpu()))
        back = module.to_weight()
        assert torch.equal(back.qweight.cpu(), weight.qweight) and torch.equal(back.zeros.cpu(), weight.zeros)

    def test_gradient(self) -> None:
        weight = random_weight(48, 96, 4, 32)
        x = random_input(3, 96).cuda().requires_grad_()
        self.call(weight, x).sum().backward()
        expected = weight.dequantize(torch.float64).sum(0)
        assert torch.allclose(x.grad.cpu().double(), expected.expand(3, -1), rtol=1e-4, atol=1e-4)

    def test_mixed_devices(self) -> None:
        packed = wq.pack(random_weight(20, 96))
        with pytest.raises(RuntimeError, match="on cuda:0, got .*on cpu"):
            torch.ops.effk.wq_linear(
                torch.zeros(2, 96),
                *(None if t is None else t.cuda() for t in packed.tensors),
                None,
                *packed.geometry,
                "float",
            )

    def test_second_device(self) -> None:
        if torch.cuda.device_count() < 2:
            pytest.skip("one CUDA device only")
        weight = random_weight(64, 256)
        packed = wq.pack(weight)
        x = random_input(2, 256, torch.float16)
        ys = [
            torch.ops.effk.wq_linear(x.to(d), *(None if t is None else t.to(d) for t in packed.tensors), None, *packed.geometry, "float").cpu()
            for d in ("cuda:0", "cuda:1")
        ]  # fmt: skip
        assert torch.equal(*ys)
