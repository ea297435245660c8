"""A norm and the per-head projection after it, in one op: the normalised input is never in memory."""

from torch import Tensor

from fastcircuit.errors import InputError
from fastcircuit.ops.backends import choose


def norm_projection(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    *,
    centered: bool,
    backend: str = "auto",
) -> Tensor:
    """``y[h] = norm(x[h]) @ weight[h] + bias[h]``: LayerNorm (``centered``) or RMSNorm, then a matrix for each head.

    The norms are those of :func:`layer_norm` and :func:`rms_norm`. Not differentiable: the masked forward loop is one
    autograd node and calls :func:`norm_projection_grad_`. Every number of threads gives the same bits.

    Args:
        x: ``[heads, T, d]``.
        norm_weight, norm_bias: ``[d]``; RMSNorm has no bias.
        eps: added to the variance or mean square.
        weight: ``[heads, d, d_head]``, any strides.
        bias: ``[heads, 1, d_head]``, or None.
        backend: ``"auto"``, or a name from ``fastcircuit.ops.available_backends()``.

    Returns:
        ``[heads, T, d_head]`` in the dtype of ``x``; sums are kept in that dtype too, as a matrix product's are.

    Raises:
        InputError: shapes, dtypes or devices do not fit, or the backend asked for by name cannot run them.
    """
    _check("norm_projection", x, norm_weight, weight)
    if norm_bias is not None and not centered:
        raise InputError("norm_projection: RMSNorm (centered=False) has no bias; accepted is None")
    if bias is not None and bias.shape != (len(weight), 1, weight.shape[2]):
        raise InputError(
            f"norm_projection: bias has shape {list(bias.shape)}; accepted is {[len(weight), 1, weight.shape[2]]}"
        )
    run = choose("norm_projection", backend, x, weight)
    return run(x, norm_weight, norm_bias, eps, weight, bias, centered)


def norm_projection_grad_(
    grad: Tensor,
    x: Tensor,
    norm_weight: Tensor,
    eps: float,
    weight: Tensor,
    grad_x: Tensor,
    *,
    centered: bool,
    backend: str = "auto",
) -> None:
    """Write the gradient of ``x`` into ``grad_x``, given that of :func:`norm_projection`'s result.

    It is :func:`norm_backward_` of ``grad[h] @ weight[h]^T``.

    Args:
        grad: ``[heads, T, d_head]``.
        x, norm_weight, eps, weight, centered, backend: as given to :func:`norm_projection`.
        grad_x: ``[heads, T, d]``, contiguous; overwritten.
    """
    _check("norm_projection_grad_", x, norm_weight, weight)
    if grad.shape != (*x.shape[:2], weight.shape[2]) or grad.dtype != x.dtype:
        raise InputError(
            f"norm_projection_grad_: grad is {grad.dtype} {list(grad.shape)}; accepted is "
            f"{x.dtype} {[*x.shape[:2], weight.shape[2]]}"
        )
    if grad_x.shape != x.shape or grad_x.dtype != x.dtype or not grad_x.is_contiguous():
        raise InputError(
            f"norm_projection_grad_: grad_x is {grad_x.dtype} {list(grad_x.shape)}; accepted is contiguous "
            f"{x.dtype} {list(x.shape)}"
        )
    choose("norm_projection_grad_", backend, x, weight)(grad, x, norm_weight, eps, weight, grad_x, centered)


def _check(op: str, x: Tensor, norm_weight: Tensor, weight: Tensor) -> None:
    if x.dim() != 3 or weight.dim() != 3 or weight.shape[:2] != (x.shape[0], x.shape[2]):
        raise InputError(
            f"{op}: x has shape {list(x.shape)} and weight {list(weight.shape)}; accepted are [heads, T, d] and "
            "[heads, d, d_head]"
        )
    if norm_weight.shape != x.shape[2:]:
        raise InputError(f"{op}: norm_weight has shape {list(norm_weight.shape)}; accepted is {[x.shape[2]]}")
    for name, tensor in (("norm_weight", norm_weight), ("weight", weight)):
        if tensor.dtype != x.dtype or tensor.device != x.device:
            raise InputError(
                f"{op}: {name} is {tensor.dtype} on {tensor.device}; accepted is {x.dtype} on {x.device}, as x"
            )
