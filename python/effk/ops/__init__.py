"""The operations, one module each: what it computes, its shape function, gradient and float64 reference.

The operations themselves are ``torch.ops.effk.<op>``; importing :mod:`effk` has registered them.
"""

from . import depthwise_conv1d, fftconv, monarch, wq_linear

__all__ = ["depthwise_conv1d", "fftconv", "monarch", "wq_linear"]
