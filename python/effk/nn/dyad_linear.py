"""DYAD layers as modules: trainable ones, a feed-forward of two, and one with quantised blocks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..formats.wq import WqWeight
from ..ops import activation
from ..ops import dyad_linear as op
from .derived_cache import DerivedCache
from .frozen import FrozenDtypes
from .wq_linear import COMPUTE_FORMS

INITS = ("paper", "dense_var")
PACKED_FORMS = 2  # of one weight: its own dtype, and that of autocast


class DyadLinear(nn.Module):
    """``y = W x + bias``, W the sum of two permuted block-diagonal matrices: parameters ``wl``, ``wu``, ``bias``.

    ``wl`` and ``wu`` are ``(n_dyad, out_features / n_dyad, in_features / n_dyad)``, bias ``(out_features,)``. 2/n_dyad
    of the parameters and multiply-adds of a dense layer. Formula, variants, dtypes: :mod:`effk.ops.dyad_linear`.

    Where no gradient is wanted (``torch.no_grad``, inference mode, or nothing requires one), the packed weight is kept,
    see :class:`effk.nn.derived_cache.DerivedCache`: writes to ``wl`` or ``wu`` are noticed, but not those through
    ``wl.data``; call :meth:`clear_cache` after them. In a traced graph (compile, export) packing is part of each call.
    Neither training mode nor layout is part of the state: the keys are those of the released code.

    Initialisation: "paper" draws weights and bias from U(-k, k), k = 1/sqrt(in_features), as the released code does;
    outputs then have 2/n_dyad of the variance that ``nn.Linear`` gives. "dense_var" draws the weights from
    U(-k', k'), k' = k sqrt(n_dyad / 2), which restores it. Initialisers that look for ``nn.Linear`` skip this class.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        n_dyad: int = 4,
        variant: str = "it",
        bias: bool = True,
        init: str = "paper",
        layout: str = "tokens",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """
        Args:
            n_dyad: blocks in each component; divides both sides.
            variant: "it", "ot" or "dt".
            init: "paper" or "dense_var".
            layout: "tokens", x ``(..., in_features)``, or "features", x ``(in_features, T)``, as the released module.

        Raises:
            ValueError: sides that n_dyad does not divide; an unknown variant, init or layout.
        """
        super().__init__()
        _check_choices("DyadLinear", variant=(variant, op.VARIANTS), init=(init, INITS), layout=(layout, op.LAYOUTS))
        if n_dyad < 1 or in_features < 1 or out_features < 1 or in_features % n_dyad or out_features % n_dyad:
            raise ValueError(
                "DyadLinear: n_dyad: expected a number that divides in_features and out_features, "
                f"got {n_dyad} for {in_features} and {out_features}"
            )
        self.in_features, self.out_features, self.n_dyad = in_features, out_features, n_dyad
        self.variant, self.init, self.layout = variant, init, layout
        shape = (n_dyad, out_features // n_dyad, in_features // n_dyad)
        self.wl = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.wu = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self._cache = DerivedCache(op.pack, PACKED_FORMS)
        self.reset_parameters()

    @classmethod
    def from_dense(cls, linear: nn.Linear, n_dyad: int = 4, variant: str = "it", layout: str = "tokens") -> DyadLinear:
        """The layer nearest to ``linear`` (Frobenius): its weights at the places that DYAD has, the others dropped.

        A poor approximation of weights that were not trained for it; better conversions are in :mod:`effk.compress`.

        Raises:
            ValueError: as the constructor.
        """
        weight = linear.weight.detach()
        out_features, in_features = weight.shape
        how = {"bias": linear.bias is not None, "device": "meta", "dtype": weight.dtype, "layout": layout}
        module = cls(in_features, out_features, n_dyad, variant, **how)
        wl, wu = op.from_dense(weight, n_dyad, variant)
        module.wl, module.wu = nn.Parameter(wl), nn.Parameter(wu)
        if linear.bias is not None:
            module.bias = nn.Parameter(linear.bias.detach().clone())
        return module

    @torch.no_grad()
    def to_dense(self) -> nn.Linear:
        """An ``nn.Linear`` that computes the same, with weights of its own; it takes tokens, whatever the layout."""
        weight = torch.ops.effk.dyad_to_dense(self.wl, self.wu, self.variant)
        how = {"bias": self.bias is not None, "device": "meta", "dtype": weight.dtype}
        linear = nn.Linear(self.in_features, self.out_features, **how)
        linear.weight = nn.Parameter(weight)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().clone())
        return linear

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all parameters anew."""
        k = 1 / math.sqrt(self.in_features)
        scale = math.sqrt(self.n_dyad / 2) if self.init == "dense_var" else 1.0
        for w in (self.wl, self.wu):
            w.uniform_(-k * scale, k * scale)
        if self.bias is not None:
            self.bias.uniform_(-k, k)

    def forward(self, x: Tensor, act: str = "none") -> Tensor:
        """``(..., in_features)`` to ``(..., out_features)``, dtype of x; or features first, as the layout says.

        act: applied on the way out, see :mod:`effk.ops.activation`.
        """
        if _wants_gradient(x, self.wl, self.wu, self.bias) or torch.compiler.is_compiling():
            return op.dyad_linear(x, self.wl, self.wu, self.bias, self.variant, self.layout, act)
        return torch.ops.effk.dyad_linear_packed(
            x.contiguous(), self.packed(), self.out_features, self.bias, self.variant, self.layout, act
        )

    def packed(self) -> Tensor:
        """The packed weight, for ``dyad_linear_packed`` and ``dyad_ff``: made when first asked for and after writes.

        In the dtype of the weights, or within autocast in autocast's, as ``dyad_linear`` would take them.
        """
        device, dtype = self.wl.device.type, self.wl.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        return self._cache.get((self.wl, self.wu), self.variant, dtype)

    def clear_cache(self) -> None:
        """Forget the packed weight: after writes that PyTorch does not count, such as through ``wl.data``."""
        self._cache.clear()

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, n_dyad={self.n_dyad}, "
            f"variant={self.variant}, bias={self.bias is not None}, layout={self.layout}"
        )


class DyadMLP(nn.Module):
    """``fc2(act(fc1(x)))`` of two :class:`DyadLinear`, tokens first.

    Where no gradient is wanted both layers run as one, ``dyad_ff``: the hidden features of some tokens at a time stay
    in cache. The result has the bits of the two layers one after the other.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        out_features: int | None = None,
        n_dyad: int = 4,
        variant: str = "it",
        act: str = "relu",
        bias: bool = True,
        init: str = "paper",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """
        Args:
            out_features: None for in_features.
            act: one of :data:`effk.ops.activation.ACTS`.

        Raises:
            ValueError: an unknown act, or as :class:`DyadLinear`.
        """
        super().__init__()
        _check_choices("DyadMLP", act=(act, activation.ACTS))
        out_features = in_features if out_features is None else out_features
        how = {"n_dyad": n_dyad, "variant": variant, "bias": bias, "init": init, "device": device, "dtype": dtype}
        self.fc1 = DyadLinear(in_features, hidden_features, **how)
        self.fc2 = DyadLinear(hidden_features, out_features, **how)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        """``(..., in_features)`` to ``(..., out_features)``, dtype of x."""
        if _wants_gradient(x, *self.parameters()) or torch.compiler.is_compiling():
            return self.fc2(self.fc1(x, self.act))
        return torch.ops.effk.dyad_ff(
            x.contiguous(), self.fc1.packed(), self.fc1.bias, self.fc2.packed(), self.fc2.bias,
            self.fc1.out_features, self.fc2.out_features, self.act, self.fc1.variant,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"act={self.act}"


class DyadWqLinear(FrozenDtypes):
    """:class:`DyadLinear` with frozen blocks of 2, 3, 4 or 8 bits, on the quantised kernels of ``wq_linear``.

    Both components are one quantised matrix, :func:`effk.ops.dyad_linear.stacked`, in the packed form that
    :class:`effk.nn.WqLinear` has; buffers ``packed``, ``scales``, ``zeros``, ``codebook`` and ``bias`` as there, no
    outliers. Gradients flow to x only::

        w = op.stacked(layer.wl, layer.wu, layer.variant)
        ... quantise w to a WqWeight, with :mod:`effk.compress.solvers`
        small = DyadWqLinear.from_weight(weight, layer.n_dyad, layer.variant, layer.bias)
    """

    format_buffers: ClassVar[tuple[str, ...]] = ("packed", "scales", "zeros", "codebook")

    def __init__(
        self,
        in_features: int,
        out_features: int,
        n_dyad: int,
        bits: int,
        group_size: int,
        variant: str = "it",
        compute: str = "float",
    ) -> None:
        super().__init__()
        _check_choices("DyadWqLinear", variant=(variant, op.VARIANTS), compute=(compute, COMPUTE_FORMS))
        self.in_features, self.out_features, self.n_dyad = in_features, out_features, n_dyad
        self.bits, self.group_size, self.variant, self.compute = bits, group_size, variant, compute
        for name in (*self.format_buffers, "bias"):
            self.register_buffer(name, None)

    @classmethod
    def from_weight(
        cls, weight: WqWeight, n_dyad: int, variant: str = "it", bias: Tensor | None = None, compute: str = "float"
    ) -> DyadWqLinear:
        """Pack a quantised :func:`effk.ops.dyad_linear.stacked` matrix for the kernels.

        Raises:
            ValueError: the weight is malformed, has outliers, or does not fit n_dyad; bias is not ``[out_features]``;
                ``compute`` does not exist for this weight.
        """
        weight.validate()
        _check_choices("DyadWqLinear", variant=(variant, op.VARIANTS), compute=(compute, COMPUTE_FORMS))
        if weight.out_ptr is not None:
            raise ValueError(f"DyadWqLinear: weight: expected no outliers, got {weight.out_val.numel()}")
        parts = 1 if variant == "it" else 2
        out_features, in_features = weight.n // parts, weight.k * n_dyad * parts // 2
        if n_dyad < 1 or weight.n % (parts * 16 * n_dyad) or (parts == 1 and weight.k % 2):
            expected = "[16 i n_dyad, 2 d_in]" if parts == 1 else "[32 i n_dyad, d_in]"
            raise ValueError(
                f"DyadWqLinear: weight: expected {expected} for variant {variant!r} and n_dyad = {n_dyad}, "
                f"got [{weight.n}, {weight.k}]"
            )
        if bias is not None and (tuple(bias.shape) != (out_features,) or not bias.is_floating_point()):
            raise ValueError(
                f"DyadWqLinear: bias: expected floating point [{out_features}], got {bias.dtype} {list(bias.shape)}"
            )
        if compute == "int8" and weight.codebook is not None and weight.codebook.dim() == 2:
            raise ValueError("DyadWqLinear: compute: expected 'float' for a codebook per row, got 'int8'")
        module = cls(in_features, out_features, n_dyad, weight.bits, weight.group_size, variant, compute)
        packed, scales, zeros, codebook = torch.ops.effk.wq_pack(
            weight.qweight, weight.scales, weight.zeros, weight.codebook, *module._geometry()
        )
        module.packed, module.scales = packed, scales
        module.zeros = None if weight.zeros is None else zeros
        module.codebook = None if weight.codebook is None else codebook
        module.bias = None if bias is None else bias.detach().clone()
        return module

    def to_weight(self) -> WqWeight:
        """The canonical form back; exact inverse of :meth:`from_weight`."""
        n, k, bits, group_size = self._geometry()
        qweight, scales, zeros = torch.ops.effk.wq_unpack(self.packed, self.scales, self.zeros, n, k, bits, group_size)
        codebook = self.codebook
        if codebook is not None and codebook.dim() == 3:  # [tiles, 2**bits, 16] -> [n, 2**bits]
            codebook = codebook.transpose(1, 2).reshape(-1, codebook.shape[1])[:n].contiguous()
        zeros = None if self.zeros is None else zeros
        return WqWeight(n, k, bits, group_size, qweight, scales, zeros, codebook, None, None, None)

    def dequantize(self) -> tuple[Tensor, Tensor]:
        """``wl`` and ``wu`` in fp32."""
        tensors = (self.packed, self.scales, self.zeros, self.codebook, None, None, None)
        weight = torch.ops.effk.wq_dequantize(*tensors, *self._geometry())
        wl, wu = op.unstacked(weight, self.n_dyad, self.variant)
        return wl.contiguous(), wu.contiguous()

    def forward(self, x: Tensor) -> Tensor:
        """``(..., in_features)`` to ``(..., out_features)``, dtype of x."""
        b = self._buffers
        return torch.ops.effk.dyad_wq_linear(
            x.contiguous(), b["packed"], b["scales"], b["zeros"], b["codebook"], b["bias"], self.n_dyad,
            self.out_features, self.in_features, self.bits, self.group_size, self.variant, self.compute,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, n_dyad={self.n_dyad}, "
            f"variant={self.variant}, bias={self.bias is not None}, bits={self.bits}, "
            f"group_size={self.group_size or 'row'}, compute={self.compute}"
        )

    def _geometry(self) -> tuple[int, int, int, int]:
        d_in = self.in_features // self.n_dyad
        rows, columns = (self.out_features, 2 * d_in) if self.variant == "it" else (2 * self.out_features, d_in)
        return rows, columns, self.bits, self.group_size


def dyad_state_dict_from_released(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of the released code, of a layer or of a whole model, as this module's classes load it.

    Wherever ``wl`` and ``wu`` stand side by side, the bias beside them is ``(f_out, 1)`` there, because its layers keep
    features first; here it is ``(f_out,)``. Everything else is passed on as it is.

    Raises:
        ValueError: ``wl`` without a ``wu`` of the same shape or the other way round; a bias of another shape.
    """
    out = dict(state_dict)
    for key, value in state_dict.items():
        prefix, _, name = key.rpartition(".")
        prefix = prefix and prefix + "."
        if name not in ("wl", "wu"):
            continue
        other = prefix + ("wu" if name == "wl" else "wl")
        if value.dim() != 3 or other not in state_dict or state_dict[other].shape != value.shape:
            got = list(state_dict[other].shape) if other in state_dict else "none"
            raise ValueError(f"{other}: expected (n, d_out, d_in) as {key} {list(value.shape)}, got {got}")
        bias, f_out = state_dict.get(prefix + "bias"), value.shape[0] * value.shape[1]
        if bias is not None:
            if tuple(bias.shape) not in ((f_out, 1), (f_out,)):
                raise ValueError(f"{prefix}bias: expected [{f_out}, 1] or [{f_out}], got {list(bias.shape)}")
            out[prefix + "bias"] = bias.reshape(f_out)
    return out


def _wants_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _check_choices(module: str, **choices: tuple[str, tuple[str, ...]]) -> None:
    for name, (value, known) in choices.items():
        if value not in known:
            raise ValueError(f"{module}: {name}: expected one of {known}, got {value!r}")
