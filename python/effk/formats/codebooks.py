"""Fixed tables of code values. A codebook weight is ``w[n, k] = scale[n, g] * table[code[n, k]]``.

* ``normal_float(b)``: quantiles of the normal distribution with an exact zero (NF4 of Dettmers et al., "QLoRA", 2023;
  NF3 and NF2 by the same construction). All values lie in [-1, 1], so the scale is the group's largest magnitude.
* ``FP4``: the E2M1 floating-point values 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives; code bit 3 is the sign.
"""

from __future__ import annotations

import torch
from torch import Tensor

# The outermost quantile: the mean of 1 - 1/(2*15) and 1 - 1/(2*16), the tail masses of 15 and 16 equal bins.
_OUTER_QUANTILE = 0.9677083


def normal_float(bits: int) -> Tensor:
    """The ascending normal-float table, fp32 ``[2**bits]``, for 2, 3 or 4 bits."""
    if bits not in (2, 3, 4):
        raise ValueError(f"normal_float: bits: expected 2, 3 or 4, got {bits!r}")
    half = 1 << (bits - 1)
    normal = torch.distributions.Normal(
        torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64), validate_args=False
    )
    positive = normal.icdf(torch.linspace(_OUTER_QUANTILE, 0.5, half + 1, dtype=torch.float64)[:-1])
    negative = -normal.icdf(torch.linspace(_OUTER_QUANTILE, 0.5, half, dtype=torch.float64)[:-1])
    table = torch.cat((positive, torch.zeros(1, dtype=torch.float64), negative)).sort().values
    return (table / table.max()).float()


NF2 = normal_float(2)
NF3 = normal_float(3)
NF4 = normal_float(4)
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
FP4 = torch.tensor([*_E2M1, 0.0, *(-v for v in _E2M1[1:])])  # code 8, the negative zero, is zero again

CODEBOOKS = {"nf2": NF2, "nf3": NF3, "nf4": NF4, "fp4": FP4}
