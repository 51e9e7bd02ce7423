"""Modules that run compressed and block-sparse weights and long convolutions on the kernels: plain ``nn.Module``s.

:class:`FFTConvDecoder` is the exception: the state of one decoding, no part of a model.
"""

from .bitmask_linear import BitmaskLinear
from .depthwise_conv1d import DepthwiseConv1d
from .dyad_linear import DyadLinear, DyadMLP, DyadWqLinear, dyad_state_dict_from_released
from .dyad_lowrank import DyadLowRank
from .fftconv import FFTConv, FlashFFTConv
from .fftconv_decoder import FFTConvDecoder
from .hyena import HyenaOperator
from .input_sparse_linear import InputSparseLinear
from .long_filter import BandLimitedFilter, ExplicitFilter, LongFilter
from .neuron_selector import ActiveSetReuse, ExpertRouter, LowRankPredictor, SignPredictor
from .quik_linear import QuikLinear, QuikMultiLinear
from .relu_ffn import SparseFFN
from .relu_norm import ReluNorm
from .sparse_gate import SparseGate
from .wq_embedding import WqEmbedding, WqTiedHead
from .wq_experts import GroupedExperts, WqGroupedLinear
from .wq_linear import WqLinear, WqMultiLinear

__all__ = [
    "ActiveSetReuse",
    "BandLimitedFilter",
    "BitmaskLinear",
    "DepthwiseConv1d",
    "DyadLinear",
    "DyadLowRank",
    "DyadMLP",
    "DyadWqLinear",
    "ExpertRouter",
    "ExplicitFilter",
    "FFTConv",
    "FFTConvDecoder",
    "FlashFFTConv",
    "GroupedExperts",
    "HyenaOperator",
    "InputSparseLinear",
    "LongFilter",
    "LowRankPredictor",
    "QuikLinear",
    "QuikMultiLinear",
    "ReluNorm",
    "SignPredictor",
    "SparseFFN",
    "SparseGate",
    "WqEmbedding",
    "WqGroupedLinear",
    "WqLinear",
    "WqMultiLinear",
    "WqTiedHead",
    "dyad_state_dict_from_released",
]
