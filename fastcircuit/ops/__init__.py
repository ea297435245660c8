"""Operations on the disentangled stream, each with a plain torch specification and compiled backends."""

from fastcircuit.ops.backends import available_backends, unsupported_reasons
from fastcircuit.ops.hard_concrete import hard_concrete
from fastcircuit.ops.masked_read import live_writers, masked_read, masked_read_backward_
from fastcircuit.ops.norms import layer_norm, norm_backward_, rms_norm
from fastcircuit.ops.packed_attention import packed_attention

__all__ = [
    "available_backends",
    "hard_concrete",
    "layer_norm",
    "live_writers",
    "masked_read",
    "masked_read_backward_",
    "norm_backward_",
    "packed_attention",
    "rms_norm",
    "unsupported_reasons",
]
