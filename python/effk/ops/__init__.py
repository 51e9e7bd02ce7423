"""The operations, one module each: what it computes, its shape function, gradient and float64 reference.

The operations themselves are ``torch.ops.effk.<op>``; importing :mod:`effk` has registered them.
"""

from . import (
    attention,
    bitmask_linear,
    decoder,
    dense_linear,
    depthwise_conv1d,
    dyad_linear,
    fftconv,
    monarch,
    neuron_lists,
    quik_linear,
    relu_ffn,
    sp24,
    wq_grouped_linear,
    wq_linear,
)

__all__ = [
    "attention", "bitmask_linear", "decoder", "dense_linear", "depthwise_conv1d", "dyad_linear", "fftconv", "monarch",
    "neuron_lists", "quik_linear", "relu_ffn", "sp24", "wq_grouped_linear", "wq_linear",
]  # fmt: skip
