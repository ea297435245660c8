"""The ops as torch.library knows them: schemas, fake implementations, autograd. Registered once, on import."""

import torch
from torch import Tensor

from fastcircuit.errors import InputError
from fastcircuit.ops.backends import choose
from fastcircuit.ops.eager import any_requires_grad, plain_eager
from fastcircuit.ops.reference import only_wanted

_LIB = torch.library.Library("fastcircuit", "DEF")
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)

_LIB.define("masked_read(Tensor stream, Tensor mask, Tensor? base, Tensor? live, str backend) -> Tensor", tags=_TAGS)
_LIB.define(
    "masked_read_grads(Tensor grad_reads, Tensor stream, Tensor mask, bool needs_stream, bool needs_mask,"
    " Tensor? live, str backend) -> (Tensor, Tensor)",
    tags=_TAGS,
)
_LIB.define(
    "masked_read_backward_(Tensor grad_reads, Tensor stream, Tensor mask, Tensor(a!)? grad_stream,"
    " bool needs_mask_grad, Tensor? live, str backend) -> Tensor",
    tags=_TAGS,
)
_LIB.define("live_writers(Tensor mask, Tensor? wanted, str backend) -> Tensor", tags=_TAGS)


def _absent(like: Tensor) -> Tensor:
    """What stands for None in an op's result: torch.library results cannot be optional."""
    return like.new_empty(0)


@torch.library.impl(_LIB, "masked_read", "CompositeExplicitAutograd")
def _masked_read(stream: Tensor, mask: Tensor, base: Tensor | None, live: Tensor | None, backend: str) -> Tensor:
    return choose("masked_read", backend, stream, mask, base, live)(stream, mask, base, live)


@torch.library.register_fake("fastcircuit::masked_read", lib=_LIB)
def _masked_read_fake(stream: Tensor, mask: Tensor, base: Tensor | None, live: Tensor | None, backend: str) -> Tensor:
    return stream.new_empty(mask.shape[0], stream.shape[1], stream.shape[2])


@torch.library.impl(_LIB, "masked_read_grads", "CompositeExplicitAutograd")
def _masked_read_grads(
    grad_reads: Tensor,
    stream: Tensor,
    mask: Tensor,
    needs_stream: bool,
    needs_mask: bool,
    live: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    run = choose("masked_read_grads", backend, grad_reads, stream, mask, live)
    grad_stream, grad_mask = run(grad_reads, stream, mask, needs_stream, needs_mask, live)
    return (
        _absent(stream) if grad_stream is None else grad_stream,
        _absent(mask) if grad_mask is None else grad_mask,
    )


@torch.library.register_fake("fastcircuit::masked_read_grads", lib=_LIB)
def _masked_read_grads_fake(
    grad_reads: Tensor,
    stream: Tensor,
    mask: Tensor,
    needs_stream: bool,
    needs_mask: bool,
    live: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return (
        stream.new_empty(stream.shape) if needs_stream else _absent(stream),
        mask.new_empty(mask.shape) if needs_mask else _absent(mask),
    )


@torch.library.impl(_LIB, "masked_read_backward_", "CompositeExplicitAutograd")
def _masked_read_backward_(
    grad_reads: Tensor,
    stream: Tensor,
    mask: Tensor,
    grad_stream: Tensor | None,
    needs_mask_grad: bool,
    live: Tensor | None,
    backend: str,
) -> Tensor:
    run = choose("masked_read_backward_", backend, grad_reads, stream, mask, grad_stream, live)
    grad_mask = run(grad_reads, stream, mask, grad_stream, needs_mask_grad, live)
    return _absent(mask) if grad_mask is None else grad_mask


@torch.library.register_fake("fastcircuit::masked_read_backward_", lib=_LIB)
def _masked_read_backward_fake(
    grad_reads: Tensor,
    stream: Tensor,
    mask: Tensor,
    grad_stream: Tensor | None,
    needs_mask_grad: bool,
    live: Tensor | None,
    backend: str,
) -> Tensor:
    return mask.new_empty(mask.shape) if needs_mask_grad else _absent(mask)


@torch.library.impl(_LIB, "live_writers", "CompositeExplicitAutograd")
def _live_writers(mask: Tensor, wanted: Tensor | None, backend: str) -> Tensor:
    return choose("live_writers", backend, mask, wanted)(mask, wanted)


@torch.library.register_fake("fastcircuit::live_writers", lib=_LIB)
def _live_writers_fake(mask: Tensor, wanted: Tensor | None, backend: str) -> Tensor:
    return mask.new_empty(mask.shape[1] + 2 + mask.shape[0], dtype=torch.int32)


def _save(ctx, inputs, output) -> None:
    stream, mask, base, live, ctx.backend = inputs
    needs_stream, needs_mask, *_ = ctx.needs_input_grad
    ctx.has_base = base is not None
    # With a live list, the mask says where it has a gradient.
    keeps_mask = needs_stream or live is not None
    ctx.save_for_backward(stream if needs_mask else None, mask if keeps_mask else None, live)
    ctx.stream_like = (stream.shape, stream.dtype)
    ctx.mask_like = (mask.shape, mask.dtype)


def _backward(ctx, grad_reads: Tensor):
    needs_stream, needs_mask, needs_base, *_ = ctx.needs_input_grad
    stream, mask, live = ctx.saved_tensors
    grad_stream = grad_mask = None
    if needs_stream or needs_mask:
        # The op wants both operands; the one nothing reads is a placeholder one row large.
        stream = _placeholder(grad_reads, *ctx.stream_like) if stream is None else stream
        mask = _placeholder(grad_reads, *ctx.mask_like) if mask is None else mask
        grad_stream, grad_mask = torch.ops.fastcircuit.masked_read_grads.default(
            grad_reads, stream, mask, needs_stream, needs_mask, live, ctx.backend
        )
    grad_base = only_wanted(grad_reads, live).sum(0) if needs_base and ctx.has_base else None
    return grad_stream if needs_stream else None, grad_mask if needs_mask else None, grad_base, None, None


def _placeholder(near: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape[1:], dtype=dtype, device=near.device).expand(shape)


def _no_second_derivative(ctx, *grads: Tensor):
    raise InputError("masked_read: second derivatives are not implemented; accepted is one backward pass")


torch.library.register_autograd("fastcircuit::masked_read", _backward, setup_context=_save, lib=_LIB)
torch.library.register_autograd("fastcircuit::masked_read_grads", _no_second_derivative, lib=_LIB)


_LIB.define("rms_norm(Tensor x, Tensor weight, float eps, str backend) -> Tensor", tags=_TAGS)
_LIB.define(
    "rms_norm_grads(Tensor grad, Tensor x, Tensor weight, float eps, bool needs_x, bool needs_weight, str backend)"
    " -> (Tensor, Tensor)",
    tags=_TAGS,
)


@torch.library.impl(_LIB, "rms_norm", "CompositeExplicitAutograd")
def _rms_norm(x: Tensor, weight: Tensor, eps: float, backend: str) -> Tensor:
    return choose("rms_norm", backend, x, weight)(x, weight, eps)


@torch.library.register_fake("fastcircuit::rms_norm", lib=_LIB)
def _rms_norm_fake(x: Tensor, weight: Tensor, eps: float, backend: str) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.impl(_LIB, "rms_norm_grads", "CompositeExplicitAutograd")
def _rms_norm_grads(
    grad: Tensor, x: Tensor, weight: Tensor, eps: float, needs_x: bool, needs_weight: bool, backend: str
) -> tuple[Tensor, Tensor]:
    run = choose("rms_norm_grads", backend, grad, x, weight)
    grad_x, grad_weight = run(grad, x, weight, eps, needs_x, needs_weight)
    return (
        _absent(x) if grad_x is None else grad_x,
        _absent(weight) if grad_weight is None else grad_weight,
    )


@torch.library.register_fake("fastcircuit::rms_norm_grads", lib=_LIB)
def _rms_norm_grads_fake(
    grad: Tensor, x: Tensor, weight: Tensor, eps: float, needs_x: bool, needs_weight: bool, backend: str
) -> tuple[Tensor, Tensor]:
    return (
        x.new_empty(x.shape) if needs_x else _absent(x),
        weight.new_empty(weight.shape) if needs_weight else _absent(weight),
    )


def rms_norm_save(ctx, inputs, output) -> None:
    """Keep what :func:`rms_norm_backward` reads."""
    x, weight, ctx.eps, ctx.backend = inputs
    ctx.save_for_backward(x, weight)


def rms_norm_backward(ctx, grad: Tensor):
    """The gradients of ``(x, weight, eps, backend)``; those of ``x`` and ``weight`` only where needed."""
    needs_x, needs_weight, *_ = ctx.needs_input_grad
    x, weight = ctx.saved_tensors
    arguments = (grad, x, weight, ctx.eps, needs_x, needs_weight)
    if plain_eager(grad) and not (torch.is_grad_enabled() and any_requires_grad(grad, x, weight)):
        grad_x, grad_weight = choose("rms_norm_grads", ctx.backend, grad, x, weight)(*arguments)
    else:
        grad_x, grad_weight = torch.ops.fastcircuit.rms_norm_grads.default(*arguments, ctx.backend)
    return grad_x if needs_x else None, grad_weight if needs_weight else None, None, None


def _no_second_derivative_of_rms_norm(ctx, *grads: Tensor):
    raise InputError("rms_norm: second derivatives are not implemented; accepted is one backward pass")


torch.library.register_autograd("fastcircuit::rms_norm", rms_norm_backward, setup_context=rms_norm_save, lib=_LIB)
torch.library.register_autograd("fastcircuit::rms_norm_grads", _no_second_derivative_of_rms_norm, lib=_LIB)
