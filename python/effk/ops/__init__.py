"""The operations, one module each: what it computes, its shape function, gradient and float64 reference.

The operations themselves are ``torch.ops.effk.<op>``; importing :mod:`effk` has registered them.
"""

from . import monarch, wq_linear

__all__ = ["monarch", "wq_linear"]
