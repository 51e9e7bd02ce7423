"""Layers of relu_ffn with their packed rows, float64 references and bounds; shared by the tests of every backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from effk.ops import relu_ffn as rf

OPS = torch.ops.effk
PARAMS = {"shifted_relu": 0.5, "fatrelu": 0.75, "silu_threshold": 0.25, "gelu_gauss": 0.6744898, "top_k": 5.0}
EPS = 2.0**-24
STORE = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


class Layer:
    """Random weights, packed, and the same weights as the kernel sees them."""

    def __init__(
        self, d: int, f: int, rows: str = "fp32", group: int = 0, gated: bool = True, biases: bool = True
    ) -> None:
        self.rows, self.d, self.f = rows, d, f
        plain = [torch.randn(f, d) / d**0.5 for _ in range(3 if gated else 2)]
        packed = [OPS.relu_ffn_pack(w, False, rows, group) for w in plain[:-1]]
        packed.append(OPS.relu_ffn_pack(plain[-1].T.contiguous(), True, rows, group))
        self.packed = [(w, s if s.numel() else None) for w, s in packed]
        self.plain = [OPS.relu_ffn_unpack(w, s, rows, d) for w, s in self.packed]
        if not gated:
            self.packed.insert(0, (None, None))
            self.plain.insert(0, None)
        self.biases = [torch.randn(n) * 0.1 if biases else None for n in (f, f, d)]
        if not gated:
            self.biases[0] = None

    def run(
        self,
        x: Tensor,
        gate: str,
        param: Tensor | None,
        mask: Tensor | None = None,
        group: int = 1,
        mode: str = "sparse",
    ) -> tuple[Tensor, Tensor]:
        (wg, sg), (wu, su), (wd, sd) = self.packed
        weight = (wg, wu, wd, sg, su, sd, *self.biases)
        return self.call(x, *weight, self.rows, gate, param, mask, group, mode)

    def call(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        """The operation; another backend has another."""
        return OPS.relu_ffn(*arguments)

    def reference(
        self, x: Tensor, gate: str, param: Tensor | None, mask: Tensor | None = None, group: int = 1
    ) -> tuple[Tensor, Tensor]:
        wg, wu, wdt = self.plain
        return rf.reference(x, wg, wu, wdt.T, *self.biases, gate, param, mask, group)

    def far_from_cuts(self, x: Tensor, gate: str, param: Tensor | None) -> bool:
        """Whether no gate lies so near its threshold that fp32 may decide otherwise than float64."""
        wg, wu, _ = self.plain
        w, b = (wu, self.biases[1]) if wg is None else (wg, self.biases[0])
        g = torch.nn.functional.linear(x.double(), w.double(), None if b is None else b.double())
        p = 0.0 if param is None else param.double()
        if gate == "silu_threshold":
            g = (g * torch.sigmoid(g)).abs()
        elif gate == "gelu_gauss":
            p = g.mean(-1, keepdim=True) + p * g.std(-1, correction=0, keepdim=True)
        elif gate == "top_k":
            size = g.abs().sort(dim=-1, descending=True).values
            k = int(param)
            return bool((k >= self.f) or ((size[:, k - 1] - size[:, k]) > 1e-5).all())
        return bool(((g - p).abs() > 1e-5).all())

    def bound(self, x: Tensor, gate: str, param: Tensor | None) -> Tensor:
        """Error of h from chains of d products, taken through down, and its own chain of f."""
        wg, wu, wdt = (None if w is None else w.double() for w in self.plain)
        xs = x.double().abs()
        off = (self.d + 4) * EPS
        u, u_size = x.double() @ wu.T, xs @ wu.abs().T + 0.5
        if wg is None:
            g_size = u_size
            h = (u.abs() + 1) ** (2 if gate == "relu2" else 1)
            error = off * g_size * (2 * (u.abs() + 1) if gate == "relu2" else 2)
        else:
            g, g_size = x.double() @ wg.T, xs @ wg.abs().T + 0.5
            a = (g.abs() + 1) ** (2 if gate == "relu2" else 1)
            slope = 2 * (g.abs() + 1) if gate == "relu2" else 2.0
            h = a * (u.abs() + 1)
            error = off * (slope * g_size * (u.abs() + 1) + a * u_size)
        return (error + (self.f + 8) * EPS * h) @ wdt.abs() + 1e-6


def check(
    layer: Layer, x: Tensor, gate: str, param: Tensor | None, mask: Tensor | None = None, group: int = 1
) -> Tensor:
    y, nnz = layer.run(x, gate, param, mask, group)
    want, count = layer.reference(x, gate, param, mask, group)
    assert y.dtype == x.dtype and y.shape == x.shape and nnz.dtype == torch.int32
    if layer.far_from_cuts(x, gate, param):
        assert torch.equal(nnz.long(), count), f"{gate} {layer.rows}"
        bound = layer.bound(x, gate, param)
        allowed = bound + STORE[x.dtype] * (want.abs() + bound)
        assert bool(((y.double() - want).abs() <= allowed).all()), f"{gate} {layer.rows} {x.dtype}"
    dense, dense_nnz = layer.run(x, gate, param, mask, group, "dense")
    assert torch.equal(y, dense) and torch.equal(nnz, dense_nnz), f"{gate} {layer.rows}: sparse and dense differ"
    return y


def value_of(gate: str, f: int, each: bool = False) -> Tensor | None:
    if gate not in PARAMS:
        return None
    return torch.full((f if each and gate not in ("gelu_gauss", "top_k") else 1,), min(PARAMS[gate], float(f)))


def check_input_sparse(
    op: Callable[..., tuple[Tensor, Tensor]], rows: str, d_in: int, d_out: int, tokens: int, i: int
) -> None:
    """input_sparse_linear with and without thresholds; group, bias and dtype vary with ``i``."""
    group = (0, 32, 64, 128)[i] if rows in ("int8", "int4") else 0
    w, scales = OPS.relu_ffn_pack(torch.randn(d_out, d_in), True, rows, group)
    scales = scales if scales.numel() else None
    plain = OPS.relu_ffn_unpack(w, scales, rows, d_out).double()
    bias = torch.randn(d_out) if i % 2 else None
    x = torch.randn(tokens, d_in).to((torch.float32, torch.bfloat16, torch.float16)[i % 3])
    x[:, ::3] = 0
    for threshold in (None, torch.tensor([0.5]), torch.rand(d_in)):
        y, nnz = op(x, w, scales, bias, threshold, rows, d_out)
        kept = x.double().abs() > (0.0 if threshold is None else threshold.double())
        xs = torch.where(kept, x.double(), 0.0)
        want = xs @ plain + (0.0 if bias is None else bias.double())
        bound = (d_in + 4) * EPS * (xs.abs() @ plain.abs() + (0.0 if bias is None else bias.double().abs())) + 1e-12
        assert torch.equal(nnz.long(), kept.sum(1))
        assert bool(((y.double() - want).abs() <= bound + STORE[x.dtype] * (want.abs() + bound)).all())
