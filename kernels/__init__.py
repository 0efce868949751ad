"""Tensor functions, one file per operation: the eager reference (the definition of right), the Triton kernel, and the
public function that picks one of the two by device. Nothing here knows of models.

    from minem.kernels import linear_cross_entropy, sample
"""

from minem.kernels.attention import decode_attention
from minem.kernels.cross_entropy import linear_cross_entropy
from minem.kernels.gating import swiglu
from minem.kernels.norm import rms_norm
from minem.kernels.rope import rotary
from minem.kernels.sampling import sample

__all__ = ["decode_attention", "linear_cross_entropy", "rms_norm", "rotary", "sample", "swiglu"]
