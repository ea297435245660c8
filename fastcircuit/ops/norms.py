"""RMSNorm and LayerNorm over the last axis, fused, and their gradient in place."""

import torch
import torch.nn.functional as F
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
    _check("rms_norm", x, weight)
    if not plain_eager(x):
        return torch.ops.fastcircuit.rms_norm.default(x, weight, eps, backend)
    if torch.is_grad_enabled() and any_requires_grad(x, weight):
        return _RMSNorm.apply(x, weight, eps, backend)
    return choose("rms_norm", backend, x, weight)(x, weight, eps)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, *, backend: str = "auto") -> Tensor:
    """Standardise each row: ``y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias``, variance over ``d``.

    Differentiable as torch's own, which runs when a gradient is recorded or something watches the call; statistics are
    kept in at least float32. Every number of threads gives the same bits.

    Args:
        x: ``[..., d]``. The C++ kernel reads slices and splits of a contiguous tensor where they are.
        weight, bias: ``[d]`` in the dtype of ``x``; no bias is zero.
        eps: added to the variance.
        backend: ``"auto"``, or a name from ``fastcircuit.ops.available_backends()``.

    Returns:
        ``[..., d]``, contiguous, in the dtype of ``x``.

    Raises:
        InputError: shapes, dtypes or devices do not fit, or the backend asked for by name cannot run them.
    """
    _check("layer_norm", x, weight)
    if not plain_eager(x) or (torch.is_grad_enabled() and any_requires_grad(x, weight, bias)):
        return F.layer_norm(x, weight.shape, weight, bias, eps)
    return choose("layer_norm", backend, x, weight)(x, weight, bias, eps)


def norm_backward_(
    grad: Tensor, x: Tensor, weight: Tensor, eps: float, centered: bool, *, backend: str = "auto"
) -> Tensor:
    """Turn ``grad``, of the output of a norm of ``x``, into the gradient of ``x``, in place.

    ``grad_x = rstd * (g - mean(g) - xc * rstd^2 * mean(g * xc))`` with ``g = grad * weight``; ``xc = x - mean(x)`` for
    LayerNorm (``centered``), and without the means of ``x`` and ``g`` for RMSNorm. ``rstd`` is computed again.

    Args:
        grad: ``[..., d]``, contiguous.
        x: ``[..., d]``, as it was normalised.

    Returns:
        ``grad``.
    """
    _check("norm_backward_", x, weight)
    if grad.shape != x.shape or grad.dtype != x.dtype or not grad.is_contiguous():
        raise InputError(
            f"norm_backward_: grad is {grad.dtype} {list(grad.shape)}; accepted is contiguous {x.dtype} {list(x.shape)}"
        )
    if not grad.is_meta:  # where there are only shapes, and the kernels' is that nothing else is needed
        choose("norm_backward_", backend, x, weight)(grad, x, weight, eps, centered)
    return grad


class _RMSNorm(torch.autograd.Function):
    """The op's autograd without torch.library around it, which costs more than the kernel on a small model."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float, backend: str) -> Tensor:
        y = choose("rms_norm", backend, x, weight)(x, weight, eps)
        rms_norm_save(ctx, (x, weight, eps, backend), y)
        return y

    backward = staticmethod(rms_norm_backward)


def _check(op: str, x: Tensor, weight: Tensor) -> None:
    if x.dim() == 0 or weight.shape != x.shape[-1:]:
        raise InputError(
            f"{op}: x has shape {list(x.shape)} and weight {list(weight.shape)}; accepted are [..., d] and [d]"
        )
    if x.dtype not in _DTYPES:
        raise InputError(f"{op}: x is {x.dtype}; accepted are float32, float64, bfloat16, float16")
    if weight.dtype != x.dtype:
        raise InputError(f"{op}: weight is {weight.dtype}; accepted is the dtype of x, {x.dtype}")
    if weight.device != x.device:
        raise InputError(f"{op}: weight is on {weight.device}; accepted is the device of x, {x.device}")
