"""Modules that run compressed and block-sparse weights and long convolutions on the kernels: plain ``nn.Module``s.

:class:`FFTConvDecoder` is the exception: the state of one decoding, no part of a model.
"""

from .depthwise_conv1d import DepthwiseConv1d
from .dyad_linear import DyadLinear, DyadMLP, DyadWqLinear, dyad_state_dict_from_released
from .dyad_lowrank import DyadLowRank
from .fftconv import FFTConv, FlashFFTConv
from .fftconv_decoder import FFTConvDecoder
from .hyena import HyenaOperator
from .long_filter import BandLimitedFilter, ExplicitFilter, LongFilter
from .quik_linear import QuikLinear, QuikMultiLinear
from .wq_embedding import WqEmbedding, WqTiedHead
from .wq_linear import WqLinear, WqMultiLinear

__all__ = [
    "BandLimitedFilter",
    "DepthwiseConv1d",
    "DyadLinear",
    "DyadLowRank",
    "DyadMLP",
    "DyadWqLinear",
    "ExplicitFilter",
    "FFTConv",
    "FFTConvDecoder",
    "FlashFFTConv",
    "HyenaOperator",
    "LongFilter",
    "QuikLinear",
    "QuikMultiLinear",
    "WqEmbedding",
    "WqLinear",
    "WqMultiLinear",
    "WqTiedHead",
    "dyad_state_dict_from_released",
]
