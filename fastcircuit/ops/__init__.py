"""Operations on the disentangled stream, each with a plain torch specification and compiled backends."""

from fastcircuit.ops.backends import available_backends, unsupported_reasons
from fastcircuit.ops.masked_read import masked_read, masked_read_backward_
from fastcircuit.ops.rms_norm import rms_norm

__all__ = ["available_backends", "masked_read", "masked_read_backward_", "rms_norm", "unsupported_reasons"]
