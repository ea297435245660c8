"""RMSNorm over the last axis, y = x / sqrt(mean(x^2) + eps) * weight, fused forward and backward."""

import torch
from torch import Tensor

from fastcircuit.errors import InputError
from fastcircuit.ops.backends import choose
from fastcircuit.ops.eager import any_requires_grad, plain_eager
from fastcircuit.ops.schema import rms_norm_backward, rms_norm_save

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, backend: str = "auto") -> Tensor:
    """Divide each row by its root mean square: ``y = x / sqrt(mean(x^2, -1) + eps) * weight``.

    Differentiable once in ``x`` and, if it requires grad, in ``weight``. Statistics are kept in at least float32;
    in a half precision the normalised row is rounded before it meets ``weight``, as in Hugging Face's models.
    Backward saves ``x`` alone: ``grad_x = rstd * (g - x * rstd^2 * mean(g * x))`` with ``g = grad * weight`` and
    ``rstd`` computed again. Every number of threads gives the same bits in ``y`` and ``grad_x``.

    Args:
        x: ``[..., d]``. Compiled backends read slices and splits of a contiguous tensor where they are.
        weight: ``[d]`` in the dtype of ``x``.
        eps: added to the mean square.
        backend: ``"auto"``, or a name from ``fastcircuit.ops.available_backends()``.

    Returns:
        ``[..., d]``, contiguous, in the dtype of ``x``.

    Raises:
        InputError: shapes, dtypes or devices do not fit, or the backend asked for by name cannot run them.

    Equivalent to::

        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight

    Source: Zhang and Sennrich, 2019, equation 4.
    """
    _check(x, weight)
    if not plain_eager(x):
        return torch.ops.fastcircuit.rms_norm.default(x, weight, eps, backend)
    if torch.is_grad_enabled() and any_requires_grad(x, weight):
        return _RMSNorm.apply(x, weight, eps, backend)
    return choose("rms_norm", backend, x, weight)(x, weight, eps)


class _RMSNorm(torch.autograd.Function):
    """The op's autograd without torch.library around it, which costs more than the kernel on a small model."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float, backend: str) -> Tensor:
        y = choose("rms_norm", backend, x, weight)(x, weight, eps)
        rms_norm_save(ctx, (x, weight, eps, backend), y)
        return y

    backward = staticmethod(rms_norm_backward)


def _check(x: Tensor, weight: Tensor) -> None:
    if x.dim() == 0 or weight.shape != x.shape[-1:]:
        raise InputError(
            f"rms_norm: x has shape {list(x.shape)} and weight {list(weight.shape)}; accepted are [..., d] and [d]"
        )
    if x.dtype not in _DTYPES:
        raise InputError(f"rms_norm: x is {x.dtype}; accepted are float32, float64, bfloat16, float16")
    if weight.dtype != x.dtype:
        raise InputError(f"rms_norm: weight is {weight.dtype}; accepted is the dtype of x, {x.dtype}")
    if weight.device != x.device:
        raise InputError(f"rms_norm: weight is on {weight.device}; accepted is the device of x, {x.device}")
