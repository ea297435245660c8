"""The masked read and the norm after it, in one op: the reads are never in memory unnormalised."""

import torch
from torch import Tensor

from fastcircuit.errors import InputError
from fastcircuit.ops.backends import choose
from fastcircuit.ops.masked_read import check_live, check_operands
from fastcircuit.ops.reference import only_wanted


def read_norm(
    stream: Tensor,
    mask: Tensor,
    base: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    *,
    centered: bool,
    plain: int = 0,
    live: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Normalised reads ``y_r = norm(base + sum_j mask[r, j] * stream[j])``, rounded as a read and then a norm would be.

    LayerNorm (``centered``) is ``(x - mean(x)) / sqrt(var(x) + eps) * weight + bias``, RMSNorm ``x / sqrt(mean(x^2) +
    eps)``, rounded, times ``weight``; statistics are kept in at least float32. Differentiable once in ``stream``,
    ``mask`` and ``base``: the reads are made again in backward. A caller with an autograd node of its own keeps the
    statistics and uses :func:`read_norm_grad`, then ``masked_read_backward_``.

    Args:
        stream, mask, base, live: as in :func:`fastcircuit.ops.masked_read`.
        weight, bias: ``[d]`` in the dtype of ``stream``, without gradients; RMSNorm has no bias.
        eps: added to the variance or mean square.
        plain: how many of the last readers get their reads as they are: so readers behind another norm share the pass
            over the stream.
        backend: ``"auto"``, or a name from ``fastcircuit.ops.available_backends()``.

    Returns:
        ``y`` ``[R, T, d]`` in the dtype of ``stream``, and ``[2, R, T]`` in the accumulation dtype, without gradient:
        the means (0 for RMSNorm) and ``1 / sqrt(...)``; 0 and 1 for a plain read.

    Raises:
        InputError: shapes, dtypes or devices do not fit, ``weight`` or ``bias`` requires grad, or the backend asked for
            by name cannot run them.
    """
    _check(stream, mask, base, weight, bias, centered, plain)
    check_live("read_norm", live, stream, mask)
    y, stats = torch.ops.fastcircuit.read_norm.default(
        stream, mask, base, weight, bias, eps, centered, plain, live, backend
    )
    return y, stats.detach()


def read_norm_grad(
    grad: Tensor,
    stats: Tensor,
    stream: Tensor,
    mask: Tensor,
    base: Tensor | None,
    weight: Tensor,
    *,
    centered: bool,
    plain: int = 0,
    live: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """The gradient of the reads, ``[R, T, d]``, from ``grad``, that of :func:`read_norm`'s result; not differentiable.

    ``rstd * (g - mean(g) - xn * mean(g * xn))`` with ``g = grad * weight`` and the normalised read ``xn``, without
    ``mean(g)`` for RMSNorm. What the stream and the mask get is ``masked_read_backward_`` of it.
    """
    _check(stream, mask, base, weight, None, centered, plain)
    check_live("read_norm_grad", live, stream, mask)
    shape = (len(mask), *stream.shape[1:])
    if grad.shape != shape or grad.dtype != stream.dtype or stats.shape != (2, *shape[:2]):
        raise InputError(
            f"read_norm_grad: grad is {grad.dtype} {list(grad.shape)} and stats {list(stats.shape)}; accepted are"
            f" {stream.dtype} {list(shape)} and {[2, *shape[:2]]}"
        )
    return torch.ops.fastcircuit.read_norm_grad.default(
        grad, stats, stream, mask, base, weight, centered, plain, live, backend
    )


def _check(
    stream: Tensor, mask: Tensor, base: Tensor | None, weight: Tensor, bias: Tensor | None, centered: bool, plain: int
) -> None:
    check_operands("read_norm", stream, mask, base)
    if not 0 <= plain <= len(mask):
        raise InputError(f"read_norm: plain is {plain}; accepted is 0 to the number of readers, {len(mask)}")
    if bias is not None and not centered:
        raise InputError("read_norm: RMSNorm (centered=False) has no bias; accepted is None")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.shape != stream.shape[2:] or tensor.dtype != stream.dtype or tensor.device != stream.device:
            raise InputError(
                f"read_norm: {name} is {tensor.dtype} {list(tensor.shape)} on {tensor.device}; accepted is"
                f" {stream.dtype} {list(stream.shape[2:])} on {stream.device}"
            )
        if torch.is_grad_enabled() and tensor.requires_grad:
            raise InputError(f"read_norm: {name} requires grad; only stream, mask and base have gradients")


_LIB = torch.library.Library("fastcircuit", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)
_LIB.define(
    "read_norm(Tensor stream, Tensor mask, Tensor? base, Tensor weight, Tensor? bias, float eps, bool centered,"
    " int plain, Tensor? live, str backend) -> (Tensor, Tensor)",
    tags=_TAGS,
)
_LIB.define(
    "read_norm_grad(Tensor grad, Tensor stats, Tensor stream, Tensor mask, Tensor? base, Tensor weight, bool centered,"
    " int plain, Tensor? live, str backend) -> Tensor",
    tags=_TAGS,
)


@torch.library.impl(_LIB, "read_norm", "CompositeExplicitAutograd")
def _read_norm(
    stream: Tensor,
    mask: Tensor,
    base: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    centered: bool,
    plain: int,
    live: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    run = choose("read_norm", backend, stream, mask, base, live)
    return run(stream, mask, base, weight, bias, eps, centered, plain, live)


@torch.library.register_fake("fastcircuit::read_norm", lib=_LIB)
def _read_norm_fake(stream, mask, base, weight, bias, eps, centered, plain, live, backend):
    wide = torch.float64 if stream.dtype == torch.float64 else torch.float32
    readers, (_, tokens, width) = mask.shape[0], stream.shape
    return stream.new_empty(readers, tokens, width), stream.new_empty(2, readers, tokens, dtype=wide)


@torch.library.impl(_LIB, "read_norm_grad", "CompositeExplicitAutograd")
def _read_norm_grad(
    grad: Tensor,
    stats: Tensor,
    stream: Tensor,
    mask: Tensor,
    base: Tensor | None,
    weight: Tensor,
    centered: bool,
    plain: int,
    live: Tensor | None,
    backend: str,
) -> Tensor:
    run = choose("read_norm_grad", backend, grad, stream, mask, base, live)
    return run(grad, stats, stream, mask, base, weight, centered, plain, live)


@torch.library.register_fake("fastcircuit::read_norm_grad", lib=_LIB)
def _read_norm_grad_fake(grad, stats, stream, mask, base, weight, centered, plain, live, backend):
    return grad.new_empty(grad.shape)


def _save(ctx, inputs, output) -> None:
    stream, mask, base, weight, _, _, ctx.centered, ctx.plain, live, ctx.backend = inputs
    ctx.save_for_backward(output[1], stream, mask, base, weight, live)


def _backward(ctx, grad: Tensor, _: Tensor):
    needs_stream, needs_mask, needs_base, *_rest = ctx.needs_input_grad
    stats, stream, mask, base, weight, live = ctx.saved_tensors
    grad_reads = torch.ops.fastcircuit.read_norm_grad.default(
        grad, stats, stream, mask, base, weight, ctx.centered, ctx.plain, live, ctx.backend
    )
    grad_stream = grad_mask = None
    if needs_stream or needs_mask:
        grad_stream, grad_mask = torch.ops.fastcircuit.masked_read_grads.default(
            grad_reads, stream, mask, needs_stream, needs_mask, live, ctx.backend
        )
    return (
        grad_stream if needs_stream else None,
        grad_mask if needs_mask else None,
        only_wanted(grad_reads, live).sum(0) if needs_base and base is not None else None,
        *(None,) * 7,
    )


def _no_second_derivative(ctx, *grads: Tensor):
    raise InputError("read_norm: second derivatives are not implemented; accepted is one backward pass")


torch.library.register_autograd("fastcircuit::read_norm", _backward, setup_context=_save, lib=_LIB)
torch.library.register_autograd("fastcircuit::read_norm_grad", _no_second_derivative, lib=_LIB)
