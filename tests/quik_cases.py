"""Random layers of quik_linear, and how far a kernel's result may be from float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from effk.formats.wq import WqWeight
from effk.ops import quik_linear as ql
from wq_cases import SIGNIFICANT_BITS, SMALLEST, gamma

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SPLITS = ("none", "runs", "any")  # no index; base columns in ascending runs; any order
BITS = ((4, 4), (4, 8), (8, 8), (8, 4))  # weights, activations


def signed(qx: Tensor, n_base: int) -> Tensor:
    """Codes of quik_quantize as int8 ``[M, n_base]``, from either form."""
    if qx.dtype == torch.int8:
        return qx
    low, high = (qx << 4).view(torch.int8) >> 4, qx.view(torch.int8) >> 4
    return torch.stack((low, high), 2).flatten(1)[:, :n_base]


def nibbles(codes: Tensor) -> Tensor:
    """The inverse in 4 bits: uint8 ``[M, ceil(n_base / 2)]``."""
    even = torch.nn.functional.pad(codes, (0, codes.shape[1] % 2)).view(torch.uint8) & 15
    return even[:, ::2] | even[:, 1::2] << 4


def weight_from_codes(codes: Tensor, scales: Tensor, bits: int) -> WqWeight:
    """From signed codes ``[n, k]``."""
    unsigned = (codes + (1 << (bits - 1))).to(torch.uint8)
    return WqWeight.from_codes(unsigned, scales.float().reshape(-1, 1), bits=bits, group_size=0)


@dataclass
class Quik:
    """One call of quik_linear."""

    x: Tensor
    base: WqWeight
    w_out: Tensor | None
    bias: Tensor | None
    int_idx: Tensor | None
    fp_idx: Tensor | None
    bits_a: int
    mode: str

    def __str__(self) -> str:
        return (
            f"{self.mode} W{self.base.bits}A{self.bits_a} {self.base.n}x{self.base.k} + "
            f"{0 if self.w_out is None else self.w_out.shape[1]} x {list(self.x.shape)} {self.x.dtype} outliers "
            f"{None if self.w_out is None else self.w_out.dtype} bias {None if self.bias is None else self.bias.dtype} "
            f"index {None if self.int_idx is None else 'given'}"
        )

    @property
    def how(self) -> tuple:
        return self.int_idx, self.fp_idx, self.bits_a, self.mode

    @property
    def rows(self) -> Tensor:
        return self.x.reshape(-1, self.x.shape[-1])

    def packed(self) -> ql.PackedQuik:
        return ql.pack(self.base, self.w_out)

    @property
    def arguments(self) -> tuple:
        p = self.packed()
        return self.x, *p[:4], self.bias, self.int_idx, self.fp_idx, *p[4:], self.bits_a, self.mode

    def run(self) -> Tensor:
        return ql.linear(self.x, self.packed(), self.bias, *self.how)

    def quantized(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Signed codes, scale, zero and outliers as the operation makes them."""
        qx, s, z, x_out = torch.ops.effk.quik_quantize(
            self.x, self.int_idx, self.fp_idx, self.base.k, self.bits_a, self.mode
        )
        return signed(qx, self.base.k), s, z, x_out

    @property
    def weight_only(self) -> bool:
        return self.bits_a == 16 or (self.mode == "kernel" and len(self.rows) <= ql.FEW_ROWS)

    def reference(self) -> Tensor:
        """float64, from the codes that quik_quantize makes (which has tests of its own)."""
        if self.weight_only:
            return ql.reference(self.x, self.base, self.w_out, self.bias, self.int_idx, self.fp_idx, 16)
        return ql.reference(self.x, self.base, self.w_out, self.bias, *self.how, quantized=self.quantized()[:3])

    def bound(self, expected: Tensor) -> Tensor:
        """The largest |kernel - reference| that fp32 arithmetic allows.

        Integers: s sw and float(A) are rounded once each and the fused sum once; z + h s once, R once when it was made
        and their product once: 4 roundings of either term at most. A product of scales, or z + h s, may be subnormal: an
        error of half of 2**-149, times what it is multiplied with. Weight-only: a chain of K_b multiply-adds, the
        correction of the zero point is exact, one scale, 4 more. Then a chain of n_o products (BF16 dot products add
        twice a step, and read and leave no subnormal numbers), the bias, and the rounding to the dtype of x.
        """
        codes = self.base.codes().double() - (1 << (self.base.bits - 1))
        scale = self.base.scales[:, 0].double()
        columns, outlier = ql.columns(self.int_idx, self.fp_idx, self.x.shape[-1], self.base.k)
        if self.weight_only:
            terms = self.rows[:, columns].double().abs() @ (codes.abs() * scale.abs()[:, None]).T
            total = gamma(2 * self.base.k + 6) * terms
            total += self.base.k * 2.0**-126 * 512 * scale.abs().max()
        else:
            q, s, z, _ = self.quantized()
            offset = z.double() + 2 ** (self.bits_a - 1) * s.double()
            terms = s.double()[:, None] * scale.abs() * (q.double() @ codes.T).abs()
            terms = terms + offset.abs()[:, None] * (codes * scale[:, None]).sum(1).abs()
            total = gamma(4) * terms + 2.0**-149 * ((q.double() @ codes.T).abs() + scale.abs() * codes.sum(1).abs())
        chain = 2
        if self.w_out is not None:
            products = self.rows[:, outlier].double().abs() @ self.w_out.double().abs().T
            terms = terms + products
            chain += 2 * len(outlier)
            total += len(outlier) * 2.0**-126 * 512
        if self.bias is not None:
            terms = terms + self.bias.double().abs()
        total = (total + gamma(chain) * terms).reshape(expected.shape)
        dtype = self.x.dtype
        return total + 2.0 ** -SIGNIFICANT_BITS[dtype] * (expected.abs() + total) + SMALLEST[dtype]


def quik(
    m: int = 33,
    n: int = 40,
    n_base: int = 96,
    n_out: int = 16,
    bits_w: int = 4,
    bits_a: int = 8,
    mode: str = "kernel",
    dtype: torch.dtype = torch.float32,
    w_dtype: torch.dtype = torch.bfloat16,
    bias: torch.dtype | None = torch.float32,
    split: str = "runs",
    seed: int = 0,
) -> Quik:
    """A random layer and input; outlier columns are large."""
    rng = torch.Generator().manual_seed(seed)
    k = n_base + n_out
    codes = torch.randint(-(1 << (bits_w - 1)), 1 << (bits_w - 1), (n, n_base), generator=rng)
    scales = (torch.rand(n, generator=rng) + 0.25) * 2.0 ** -(bits_w + 2)
    x = torch.randn(m, k, generator=rng) + torch.randn(m, 1, generator=rng)
    order = torch.randperm(k, generator=rng)
    outlier = order[n_base:] if split != "none" else torch.arange(n_base, k)
    x[:, outlier] *= 30
    int_idx = order[:n_base].sort().values if split == "runs" else order[:n_base]
    return Quik(
        x.to(dtype),
        weight_from_codes(codes, scales, bits_w),
        (torch.randn(n, n_out, generator=rng) * 0.2).to(w_dtype) if n_out else None,
        None if bias is None else torch.randn(n, generator=rng).to(bias),
        None if split == "none" else int_idx.int(),
        None if split == "none" else (outlier.sort().values if split == "runs" else outlier).int(),
        bits_a,
        mode,
    )
