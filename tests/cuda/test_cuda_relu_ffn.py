"""The CUDA kernels of relu_ffn and input_sparse_linear and their binding against float64: on a GPU, and emulated."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from cuda_backend import ORDERS, Backend, offered
from effk.ops import relu_ffn as rf
from relu_cases import OPS, Layer, check, check_input_sparse, value_of


class Ffns(Backend):
    def layer(self, *arguments: Any, **named: Any) -> Layer:
        """A layer of ``relu_cases`` whose calls run here."""
        layer = Layer(*arguments, **named)
        layer.call = lambda *a: self.call(self.ops.relu_ffn, *a)  # type: ignore[method-assign]
        return layer

    def call(self, op: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        moved = [self.move(a)[0] if isinstance(a, Tensor) else a for a in arguments]
        y, nnz = op(*moved)
        return y.cpu(), nnz.cpu()


@pytest.fixture(params=ORDERS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ffns]:
    yield from offered(request.param, monkeypatch, Ffns)


@pytest.mark.parametrize("rows", rf.ROWS)
def test_gates_and_rows(backend: Ffns, rows: str) -> None:
    """Every gate with every type of rows; sizes, groups, biases, dtypes and numbers of tokens in turn."""
    sizes = itertools.cycle(((64, 48), (100, 33), (4, 7), (132, 1), (300, 530)))
    turn = itertools.count()
    for gate, gated in itertools.product(rf.GATES, (True, False)):
        if gate == "drelu" and not gated:
            continue
        i, (d, f) = next(turn), next(sizes)
        group = (0, 32, 64, 128)[i % 4] if rows in ("int8", "int4") else 0
        layer = backend.layer(d, f, rows, group, gated, biases=i % 3 != 0)
        dtype = (torch.float32, torch.bfloat16, torch.float16)[i % 3]
        check(layer, torch.randn((1, 2, 3, 5, 8, 9)[i % 6], d).to(dtype), gate, value_of(gate, f, each=i % 2 == 1))


@pytest.mark.parametrize(("rows", "d", "tokens"), (("bf16", 8448, 1), ("fp32", 2304, 3), ("int4", 1180, 8)))
def test_several_panels(backend: Ffns, rows: str, d: int, tokens: int) -> None:
    """x in more than one piece of shared memory, with a last one that is not whole; gated, so that it is staged again."""
    layer = backend.layer(d, 35, rows, 32 if rows == "int4" else 0)
    check(layer, torch.randn(tokens, d), "relu", None)
    check(layer, torch.randn(tokens, d), "gelu_gauss", value_of("gelu_gauss", 35))


def test_densities(backend: Ffns) -> None:
    layer = backend.layer(128, 600, "int4", 32)
    x = torch.randn(3, 128)
    for b in (-1.0, 0.0, 1.0, 1.5):
        check(layer, x, "shifted_relu", torch.tensor([b]))
    assert layer.run(x, "shifted_relu", torch.tensor([-1e9]))[1].tolist() == [600] * 3
    y, nnz = layer.run(x, "shifted_relu", torch.tensor([1e9]))
    assert torch.equal(y, layer.biases[2].expand(3, -1)) and nnz.sum() == 0


def test_top_k(backend: Ffns) -> None:
    """Of equal gates the first are kept, within a block of threads and across them; more than there are; none."""
    layer = backend.layer(32, 700, biases=False)
    wg = torch.randn(1, 32).expand(700, 32) * torch.tensor([1.0, -1.0]).repeat(350)[:, None]
    layer.packed[0], layer.plain[0] = (OPS.relu_ffn_pack(wg.contiguous(), False, "fp32", 0)[0], None), wg
    x = torch.randn(1, 32)
    for k in (1, 5, 300, 699):
        y, nnz = layer.run(x, "top_k", torch.tensor([float(k)]))
        layer.packed[1][0].view(torch.float32)[k:] = torch.nan
        again, _ = layer.run(x, "top_k", torch.tensor([float(k)]))
        layer.packed[1] = OPS.relu_ffn_pack(layer.plain[1], False, "fp32", 0)[0], None
        assert nnz == k and torch.equal(y, again), k
    assert layer.run(x, "top_k", torch.tensor([700.0]))[1] == 700
    assert layer.run(x, "top_k", torch.tensor([0.0]))[1] == 0


@pytest.mark.parametrize("gate", ("relu", "gelu_gauss", "top_k", "fatrelu"))
def test_masks(backend: Ffns, gate: str) -> None:
    layer = backend.layer(96, 300)
    for tokens, shared, group in ((1, True, 1), (3, True, 4), (3, False, 16), (11, False, 128), (2, True, 1000)):
        bits = math.ceil(300 / group)
        mask = torch.randint(0, 256, (1 if shared else tokens, math.ceil(bits / 8)), dtype=torch.uint8)
        if spare := bits % 8:
            mask[:, -1] &= (1 << spare) - 1
        check(layer, torch.randn(tokens, 96), gate, value_of(gate, 300), mask, group)
    x = torch.randn(2, 96)
    ones = torch.full((1, 38), 255, dtype=torch.uint8)
    ones[0, -1] = (1 << 300 % 8) - 1
    assert torch.equal(layer.run(x, gate, value_of(gate, 300), ones)[0], layer.run(x, gate, value_of(gate, 300))[0])
    none, nnz = layer.run(x, gate, value_of(gate, 300), torch.zeros_like(ones))
    assert torch.equal(none, layer.biases[2].expand(2, -1)) and nnz.sum() == 0


def test_inactive_rows_are_not_read(backend: Ffns) -> None:
    """NaN in rows of up and down that no gate lets through, and in all rows outside the mask, reaches nothing."""
    layer = backend.layer(64, 70, biases=False)
    x = torch.randn(1, 64)
    active = (x @ layer.plain[0].T)[0] > 0
    y, nnz = layer.run(x, "relu", None)
    for place in (1, 2):
        layer.packed[place][0].view(torch.float32)[~active] = torch.nan
    assert torch.equal(layer.run(x, "relu", None)[0], y) and nnz == active.sum() and 0 < nnz < 70

    layer = backend.layer(64, 70, biases=False)
    inside = torch.rand(70) < 0.5
    mask = (inside[:64].reshape(8, 8) * 2 ** torch.arange(8)).sum(1).to(torch.uint8)
    mask = torch.cat((mask, (inside[64:] * 2 ** torch.arange(6)).sum(0, keepdim=True).to(torch.uint8)))[None]
    y, _ = layer.run(x, "relu", None, mask)
    for packed, _ in layer.packed:
        packed.view(torch.float32)[~inside] = torch.nan
    assert torch.equal(layer.run(x, "relu", None, mask)[0], y)


def test_nan_is_active(backend: Ffns) -> None:
    layer = backend.layer(64, 40)
    for gate in rf.GATES:
        x = torch.randn(2, 64)
        good = layer.run(x[1:], gate, value_of(gate, 40))[0]
        x[0, 3] = torch.nan
        y, nnz = layer.run(x, gate, value_of(gate, 40))
        assert bool(y[0].isnan().all()) and nnz[0] == (5 if gate == "top_k" else 40), gate
        assert torch.equal(y[1:], good), gate


@pytest.mark.parametrize("rows", rf.ROWS)
def test_same_bits_whatever_the_batch(backend: Ffns, rows: str) -> None:
    """Repeated, in batches of every compiled width, behind a full set of 64 tokens, alone."""
    layer = backend.layer(264, 330, rows, 64 if rows in ("int8", "int4") else 0)
    x = torch.randn(67, 264)
    whole = layer.run(x, "relu", None)[0]
    assert torch.equal(layer.run(x, "relu", None)[0], whole)
    for first, last in ((0, 1), (1, 5), (5, 13), (63, 66)):
        assert torch.equal(layer.run(x[first:last].contiguous(), "relu", None)[0], whole[first:last]), (first, last)


@pytest.mark.parametrize("rows", rf.ROWS)
def test_input_sparse_linear(backend: Ffns, rows: str) -> None:
    def op(*arguments: Any) -> tuple[Tensor, Tensor]:
        return backend.call(backend.ops.input_sparse_linear, *arguments)

    for i, (d_in, d_out, tokens) in enumerate(((64, 48, 1), (100, 130, 3), (7, 5, 9), (600, 260, 2))):
        check_input_sparse(op, rows, d_in, d_out, tokens, i)


def test_off_alignment_and_leading_sides(backend: Ffns) -> None:
    layer = backend.layer(40, 33, "bf16")
    x = torch.randn(2, 3, 40)
    whole = layer.run(x, "relu", None)[0]
    (wg, _), (wu, _), (wd, _) = layer.packed
    off = [torch.nn.functional.pad(w.flatten(), (2, 0))[2:].reshape(w.shape) for w in (wg, wu, wd)]
    moved = [torch.nn.functional.pad(t.flatten(), (1, 0)) for t in backend.move(x)]
    arguments = [*(backend.move(t)[0] for t in off), None, None, None, *backend.move(*layer.biases)]
    y, _ = backend.ops.relu_ffn(moved[0][1:].reshape(x.shape), *arguments, "bf16", "relu", None, None, 1, "auto")
    assert torch.equal(y.cpu(), whole) and y.shape == x.shape
    y, nnz = layer.run(torch.zeros(0, 40), "relu", None)
    assert y.shape == (0, 40) and nnz.shape == (0,)


def test_packing(backend: Ffns) -> None:
    if backend.device == "cpu":
        pytest.skip("packing on a device copies to the CPU: nothing of it is emulated")
    w = torch.randn(9, 150)
    for rows in rf.ROWS:
        packed, scales = OPS.relu_ffn_pack(w, False, rows, 32)
        there = OPS.relu_ffn_pack(*backend.move(w), False, rows, 32)
        assert torch.equal(there[0].cpu(), packed) and torch.equal(there[1].cpu(), scales)
        back = OPS.relu_ffn_unpack(there[0], there[1] if scales.numel() else None, rows, 150)
        assert torch.equal(back.cpu(), OPS.relu_ffn_unpack(packed, scales if scales.numel() else None, rows, 150))


def test_in_a_graph(backend: Ffns) -> None:
    """Replays with inputs that change how many neurons are active."""
    if backend.device == "cpu":
        pytest.skip("graphs exist on a GPU only")
    layer = backend.layer(264, 330, "bf16")
    (wg, _), (wu, _), (wd, _) = layer.packed
    weight = (*backend.move(wg, wu, wd), None, None, None, *backend.move(*layer.biases))
    for gate in ("relu", "gelu_gauss", "top_k"):
        (param,) = backend.move(value_of(gate, 330))
        rest = ("bf16", gate, param, None, 1, "auto")
        (x,) = backend.move(torch.randn(3, 264))
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            OPS.relu_ffn(x, *weight, *rest)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y, nnz = OPS.relu_ffn(x, *weight, *rest)
        for _ in range(100):
            x.copy_(torch.randn(3, 264) * torch.rand(3, 1) * 10)
            graph.replay()
            want, count = OPS.relu_ffn(x, *weight, *rest)
            assert torch.equal(y, want) and torch.equal(nnz, count)


def test_errors(backend: Ffns) -> None:
    layer = backend.layer(32, 16, "int8", 32)
    (wg, sg), (wu, su), (wd, sd) = layer.packed
    good = dict(x=torch.randn(1, 32), wg=wg, wu=wu, wd=wd, sg=sg, su=su, sd=sd, bg=None, bu=None, bd=None, rows="int8",
                gate="relu", param=None, mask=None, mask_group=1, mode="auto")  # fmt: skip
    good = {name: backend.move(v)[0] if isinstance(v, Tensor) else v for name, v in good.items()}
    backend.ops.relu_ffn(**good)
    for change, message in (
        ({"x": torch.randn(1, 65)}, r"relu_ffn: wu: expected uint8 \[16, 128\]"),
        ({"su": None}, r"relu_ffn: su: expected scales"),
        ({"rows": "int5"}, r"relu_ffn: rows: expected"),
        ({"gate": "gelu"}, r"relu_ffn: gate: expected one of"),
        ({"gate": "fatrelu"}, r"relu_ffn: param: expected one"),
        ({"mask": torch.zeros(1, 3, dtype=torch.uint8)}, r"relu_ffn: mask: expected"),
        ({"mode": "fast"}, r"relu_ffn: mode: expected"),
        ({"bd": torch.zeros(31)}, r"relu_ffn: bd: expected"),
    ):
        change = {name: backend.move(v)[0] if isinstance(v, Tensor) else v for name, v in change.items()}
        with pytest.raises(RuntimeError, match=message):
            backend.ops.relu_ffn(**(good | change))
