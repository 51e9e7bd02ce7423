"""The two matrices that the quantisers' golden figures are for."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def golden_matrix(kind: str) -> Tensor:
    """Gaussian, or Gaussian with a rank-4 part and eight large columns."""
    generator = np.random.default_rng(0)
    weight = generator.standard_normal((512, 512)) * 0.02
    if kind == "struct":
        left, right = generator.standard_normal((512, 4)), generator.standard_normal((4, 512))
        weight = weight + 0.004 * left @ right
        weight[:, generator.choice(512, 8, replace=False)] *= 6
    return torch.tensor(weight, dtype=torch.float32)
