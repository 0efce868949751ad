"""Tensor functions: one file per operation, holding the eager reference (the definition of right), the Triton kernel
and the public function that picks between them by device. Nothing here knows of models.

    from minem.kernels import linear_cross_entropy, sample

Each name is imported on first use, so that `import minem.kernels` loads neither torch nor triton. No file is called
like a function exported here: importing `minem.kernels.x` would put the module in the function's place.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_HOMES = {
    "decode_attention": "minem.kernels.attention",
    "linear_cross_entropy": "minem.kernels.cross_entropy",
    "rms_norm": "minem.kernels.norm",
    "rotary": "minem.kernels.rope",
    "sample": "minem.kernels.sampling",
    "swiglu": "minem.kernels.gating",
}

__all__ = ["decode_attention", "linear_cross_entropy", "rms_norm", "rotary", "sample", "swiglu"]

if TYPE_CHECKING:
    from minem.kernels.attention import decode_attention
    from minem.kernels.cross_entropy import linear_cross_entropy
    from minem.kernels.gating import swiglu
    from minem.kernels.norm import rms_norm
    from minem.kernels.rope import rotary
    from minem.kernels.sampling import sample


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'minem.kernels' has no attribute {name!r}")
