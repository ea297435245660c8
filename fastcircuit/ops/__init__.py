"""Operations on the disentangled stream, each with a plain torch specification and compiled backends."""

from fastcircuit.ops.answer_kl import answer_kl
from fastcircuit.ops.backends import available_backends, unsupported_reasons
from fastcircuit.ops.hard_concrete import hard_concrete
from fastcircuit.ops.live_product import live_product, live_product_
from fastcircuit.ops.masked_read import live_writers, masked_read, masked_read_backward_
from fastcircuit.ops.mlp import Affine, mlp, mlp_grad
from fastcircuit.ops.norm_projection import norm_projection, norm_projection_grad_
from fastcircuit.ops.norms import layer_norm, norm_backward_, rms_norm
from fastcircuit.ops.packed_attention import packed_attention
from fastcircuit.ops.read_norm import read_norm, read_norm_grad

__all__ = [
    "Affine",
    "answer_kl",
    "available_backends",
    "hard_concrete",
    "layer_norm",
    "live_product",
    "live_product_",
    "live_writers",
    "masked_read",
    "masked_read_backward_",
    "mlp",
    "mlp_grad",
    "norm_backward_",
    "norm_projection",
    "norm_projection_grad_",
    "packed_attention",
    "read_norm",
    "read_norm_grad",
    "rms_norm",
    "unsupported_reasons",
]
