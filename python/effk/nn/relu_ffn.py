"""Feed-forward networks that read only active neurons, on ``torch.ops.effk.relu_ffn``."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ..formats.neuron import check_rows, from_stored, to_stored
from ..ops.relu_ffn import APPROXIMATE, GATES, expand_mask
from .frozen import FrozenDtypes
from .sparse_gate import apply_gate, check_param

MODES = ("auto", "sparse", "dense", "torch")
_PARTS = ("gate", "up", "down")
_DEFAULT_MODES = {1: "auto", 9: "torch"}


@dataclass(frozen=True)
class Density:
    """Shares of active neurons over ``tokens``: mean, median, 95th percentile (which decides latency) and largest."""

    tokens: int
    mean: float
    p50: float
    p95: float
    max: float

    @classmethod
    def of(cls, shares: Tensor) -> Density:
        """From one share a token."""
        shares = shares.double().flatten()
        if not shares.numel():
            return cls(0, *[float("nan")] * 4)
        p50, p95 = torch.quantile(shares, torch.tensor([0.5, 0.95], dtype=torch.float64)).tolist()
        return cls(shares.numel(), float(shares.mean()), p50, p95, float(shares.max()))


class SparseFFN(FrozenDtypes):
    """``y = down(h) + bd``, ``h = gate(Wg x + bg) (Wu x + bu)`` or ``gate(Wu x + bu)``, over neurons whose gate is not
    zero.

    Frozen, made by :meth:`from_weights`; x fp32, bf16 or fp16 ``[..., d]``. Buffers are packed neuron rows
    (csrc/formats/neuron.h), their scales, fp32 biases and the gate's ``param``; all keep their dtype under
    ``.to(dtype)``.

    Few tokens run on the kernel. Where inputs need gradients, with :attr:`reference`, and from the number of tokens
    that :attr:`modes` says (9), the layer is computed by PyTorch from unpacked weights: the same function up to
    summation order. What is done depends on the number of tokens alone, never on the values.

    A ``selector`` (:mod:`effk.nn.neuron_selector`) says before the gate is computed which neurons may be active, per
    token; :meth:`set_mask` fixes it for all. Either makes the layer approximate, and so does gate ``silu_threshold``:
    see :attr:`exact`.

    Attributes:
        modes: tokens -> "sparse", "dense" (the kernel reading every neuron) or "torch", each from that number of
            tokens on.
        reference: compute in fp32 with PyTorch, selector and mask obeyed.
        counting: keep the number of active neurons of every token for :meth:`density_report`.
    """

    format_buffers: ClassVar[tuple[str, ...]] = (
        *(f"{part}_{what}" for part in _PARTS for what in ("rows", "scales", "bias")), "param",
    )  # fmt: skip

    def __init__(self, d: int, f: int, gate: str = "relu", rows: str = "fp32", group: int = 0) -> None:
        super().__init__()
        if gate not in GATES:
            raise ValueError(f"SparseFFN: gate: expected one of {GATES}, got {gate!r}")
        check_rows("SparseFFN", rows, group)
        self.d, self.f, self.gate, self.rows, self.group = d, f, gate, rows, group
        for name in self.format_buffers:
            self.register_buffer(name, None)
        self.register_buffer("mask", None, persistent=False)
        self.mask_group = 1
        self.selector: nn.Module | None = None
        self.modes: dict[int, str] = dict(_DEFAULT_MODES)
        self.reference = self.counting = False
        self._counted: list[Tensor] = []

    @classmethod
    def from_weights(
        cls,
        gate: Tensor | None,
        up: Tensor,
        down: Tensor,
        biases: Sequence[Tensor | None] = (None, None, None),
        kind: str = "relu",
        param: Tensor | float | None = None,
        rows: str = "fp32",
        group: int = 0,
    ) -> SparseFFN:
        """Pack gate (or None) and up ``[f, d]``, down ``[d, f]`` with biases of gate, up and down.

        Raises:
            ValueError: shapes that do not belong together, a gate or rows that do not exist.
            RuntimeError: weights that are not finite.
        """
        f, d = up.shape
        if tuple(down.shape) != (d, f) or (gate is not None and gate.shape != up.shape):
            got = [None if w is None else list(w.shape) for w in (gate, up, down)]
            raise ValueError(f"SparseFFN: expected gate and up [f, d] and down [d, f], got {got}")
        module = cls(d, f, kind, rows, group)
        for part, w in zip(_PARTS, (gate, up, down), strict=True):
            if w is not None:
                packed, scales = torch.ops.effk.relu_ffn_pack(w.detach().contiguous(), part == "down", rows, group)
                module._set(part, packed, scales if scales.numel() else None)
        return module.finish(biases, param)

    @classmethod
    def from_stored(
        cls,
        stored: Mapping[str, Mapping[str, Tensor]],
        d: int,
        f: int,
        kind: str,
        rows: str,
        group: int,
        biases: Sequence[Tensor | None],
        param: Tensor | None,
    ) -> SparseFFN:
        """From the stored form (:meth:`stored`) of "gate" (if any), "up" and "down"; exact inverse."""
        module = cls(d, f, kind, rows, group)
        for part, tensors in stored.items():
            module._set(part, *from_stored(dict(tensors), rows, d))
        return module.finish(biases, param)

    def finish(self, biases: Sequence[Tensor | None], param: Tensor | float | None) -> SparseFFN:
        """Check and take biases and the gate's parameter."""
        check_param("SparseFFN", self.gate, param)
        if self.gate == "drelu" and not self.gated:
            raise ValueError("SparseFFN: gate: expected a gated network for 'drelu', got none")
        for part, bias in zip(_PARTS, biases, strict=True):
            width = self.d if part == "down" else self.f
            if bias is not None and (tuple(bias.shape) != (width,) or (part == "gate" and not self.gated)):
                raise ValueError(f"SparseFFN: {part}_bias: expected [{width}], got {list(bias.shape)}")
            setattr(self, f"{part}_bias", None if bias is None else bias.detach().float().contiguous().clone())
        if param is not None:
            self.param = torch.as_tensor(param).detach().float().reshape(-1).clone()
            if self.param.numel() not in (1, self.f):
                raise ValueError(f"SparseFFN: param: expected 1 or {self.f} values, got {self.param.numel()}")
        return self

    def _set(self, part: str, rows: Tensor, scales: Tensor | None) -> None:
        setattr(self, f"{part}_rows", rows)
        setattr(self, f"{part}_scales", scales)

    # ---- what it is ------------------------------------------------------------------------------

    @property
    def gated(self) -> bool:
        """Whether there are gate weights."""
        return self.gate_rows is not None

    @property
    def exact(self) -> bool:
        """Whether skipping loses nothing."""
        return self.gate not in APPROXIMATE and self.selector is None and self.mask is None

    def stored(self) -> dict[str, dict[str, Tensor]]:
        """part -> what a file holds of its weight (:mod:`effk.formats.neuron`); ``down`` is transposed."""
        return {
            part: to_stored(getattr(self, f"{part}_rows"), getattr(self, f"{part}_scales"), self.rows, self.d)
            for part in _PARTS
            if getattr(self, f"{part}_rows") is not None
        }

    def to_dense(self) -> tuple[Tensor | None, Tensor, Tensor]:
        """gate (or None) and up ``[f, d]``, down ``[d, f]``, fp32: lossless for floating-point rows, else
        dequantised."""
        gate, up, down = (
            None
            if (rows := getattr(self, f"{part}_rows")) is None
            else torch.ops.effk.relu_ffn_unpack(rows, getattr(self, f"{part}_scales"), self.rows, self.d)
            for part in _PARTS
        )
        return gate, up, down.t()

    def extra_repr(self) -> str:
        kind = "exact" if self.exact else "approximate"
        return f"d={self.d}, f={self.f}, gated={self.gated}, gate={self.gate}, rows={self.rows}, group={self.group}, {kind}"

    # ---- computing -------------------------------------------------------------------------------

    def mode(self, tokens: int) -> str:
        """What is done with so many tokens."""
        chosen = self.modes[min(self.modes)]
        for least, mode in sorted(self.modes.items()):
            if tokens >= least:
                chosen = mode
        return chosen

    def forward(self, x: Tensor) -> Tensor:
        mask, group = self.mask, self.mask_group
        if self.selector is not None and (chosen := self.selector(x, self)) is not None:
            mask, group = chosen, self.selector.group
        tokens = x.numel() // self.d
        mode = "torch" if self.reference or (x.requires_grad and torch.is_grad_enabled()) else self.mode(tokens)
        if mode == "torch":
            h, active = self.hidden(x, mask, group)
            down = torch.ops.effk.relu_ffn_unpack(self.down_rows, self.down_scales, self.rows, self.d)
            bias = self.down_bias
            y = linear(h, down.t().to(h.dtype), None if bias is None else bias.to(h.dtype)).to(x.dtype)
            nnz = active.sum(-1).flatten() if self.counting else None
        else:
            y, nnz = self.kernel(x, mask, group, mode)
        if self.counting:
            self._counted.append(nnz.to(torch.int32))
        return y

    def kernel(self, x: Tensor, mask: Tensor | None, group: int, mode: str) -> tuple[Tensor, Tensor]:
        """The operation's result: output and number of active neurons a token."""
        b = self._buffers
        gate = b["gate_rows"]
        return torch.ops.effk.relu_ffn.default(
            x.contiguous(), gate, b["up_rows"], b["down_rows"], b["gate_scales"], b["up_scales"], b["down_scales"],
            b["gate_bias"], b["up_bias"], b["down_bias"], self.rows, self.gate, b["param"], mask, group, mode,
        )  # fmt: skip

    def gates(self, x: Tensor) -> Tensor:
        """Pre-activations ``[..., f]`` by PyTorch, of x's dtype (fp32 with ``reference``)."""
        return self._project(x, "gate" if self.gated else "up")

    def activity(self, x: Tensor) -> Tensor:
        """Which neurons are active (bool ``[..., f]``), mask and selector aside."""
        return apply_gate(self.gates(x), self.gate, self.param)[1]

    def hidden(self, x: Tensor, mask: Tensor | None = None, group: int = 1) -> tuple[Tensor, Tensor]:
        """``h`` ``[..., f]`` and activity by PyTorch; gradients reach x."""
        g = self.gates(x)
        allowed = None
        if mask is not None:
            allowed = expand_mask(mask, group, self.f)
            allowed = allowed.expand(g.shape) if len(allowed) == 1 else allowed.reshape(g.shape)
        a, active = apply_gate(g, self.gate, self.param, allowed)
        if self.gated:
            u = self._project(x, "up")
            a = a * (u.relu() if self.gate == "drelu" else u)
        if allowed is not None:
            a, active = a.masked_fill(~allowed, 0.0), active & allowed
        return a, active

    def _project(self, x: Tensor, part: str) -> Tensor:
        x = x.float() if self.reference else x
        w = torch.ops.effk.relu_ffn_unpack(
            getattr(self, f"{part}_rows"), getattr(self, f"{part}_scales"), self.rows, self.d
        )
        bias = getattr(self, f"{part}_bias")
        return linear(x, w.to(x.dtype), None if bias is None else bias.to(x.dtype))

    # ---- masks, statistics, tuning ---------------------------------------------------------------

    def set_mask(self, allowed: Tensor | None, group: int = 1) -> None:
        """Let only some neurons be active, from now on and for every token.

        Args:
            allowed: bool ``[ceil(f / group)]``, one a group of ``group`` neighbouring neurons; None: all.
        """
        if allowed is None:
            self.mask, self.mask_group = None, 1
            return
        if allowed.dtype != torch.bool or tuple(allowed.shape) != (-(-self.f // group),):
            raise ValueError(
                f"SparseFFN: mask: expected bool [{-(-self.f // group)}], got {allowed.dtype} {list(allowed.shape)}"
            )
        self.mask, self.mask_group = pack_mask(allowed[None]), group

    def density_report(self, clear: bool = True) -> Density:
        """Of the tokens that came while :attr:`counting` was set; ``clear`` starts anew."""
        counts = torch.cat(self._counted) if self._counted else torch.zeros(0)
        if clear:
            self._counted = []
        return Density.of(counts.double() / self.f)

    def autotune(
        self,
        density: Mapping[int, float],
        margin: float = 0.1,
        rounds: int = 9,
        table: Mapping[int, tuple[float, float, float]] | None = None,
    ) -> dict[int, str]:
        """Choose :attr:`modes` from static data: ``sparse`` where ``alpha + beta u < (1 - margin) dense``.

        Args:
            density: tokens of a call -> the share u of neurons that any of them activates, from calibration.
            margin: how much faster skipping has to be.
            rounds: timed calls of each kind; medians count.
            table: tokens -> (alpha, beta, seconds of the dense layer), instead of timing.

        Returns:
            The modes: a function of the number of tokens, whatever the values are.
        """
        chosen = {}
        for tokens, share in sorted(density.items()):
            alpha, beta, dense = self._fit(tokens, rounds) if table is None else table[tokens]
            best = "sparse" if alpha + beta * share < (1 - margin) * dense else "dense"
            chosen[tokens] = best if tokens <= 8 or best == "sparse" else "torch"
        self.modes = {1: "sparse", **chosen} if 1 not in chosen else chosen
        self.modes.setdefault(max(9, max(self.modes) + 1), "torch")
        return dict(self.modes)

    @torch.no_grad()
    def _fit(self, tokens: int, rounds: int) -> tuple[float, float, float]:
        """alpha, beta and the dense time, from two shares of neurons that random tokens agree on (a shifted ReLU makes
        them)."""
        x = torch.randn(1, self.d, generator=torch.Generator().manual_seed(0)).repeat(tokens, 1)
        g = self.gates(x[:1]).flatten().float().sort(descending=True).values
        b = self._buffers

        def timed(share: float, mode: str) -> float:
            cut = g[min(self.f - 1, int(share * self.f))].reshape(1)
            seconds = []
            for _ in range(rounds):
                start = time.perf_counter()
                torch.ops.effk.relu_ffn(
                    x, b["gate_rows"], b["up_rows"], b["down_rows"], b["gate_scales"], b["up_scales"], b["down_scales"],
                    b["gate_bias"], b["up_bias"], b["down_bias"], self.rows, "shifted_relu", cut, None, 1, mode,
                )  # fmt: skip
                seconds.append(time.perf_counter() - start)
            return sorted(seconds)[rounds // 2]

        low, high = timed(0.05, "sparse"), timed(0.5, "sparse")
        beta = (high - low) / 0.45
        return low - 0.05 * beta, beta, timed(1.0, "dense")


def pack_mask(allowed: Tensor) -> Tensor:
    """Bits of bool ``[rows, n]`` as the kernels read them: uint8 ``[rows, ceil(n / 8)]``, bit j % 8 of byte j // 8."""
    rows, n = allowed.shape
    bits = torch.nn.functional.pad(allowed, (0, -n % 8)).reshape(rows, -1, 8).to(torch.uint8)
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8)
    return (bits * weights).sum(-1, dtype=torch.uint8)


def sparse_ffns(model: nn.Module) -> dict[str, SparseFFN]:
    """name -> module, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SparseFFN)}
