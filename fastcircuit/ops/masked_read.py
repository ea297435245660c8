"""The masked read of the disentangled stream, x_r = base + sum_j z_rj D_j, and its in-place backward."""

import torch
from torch import Tensor

from fastcircuit.errors import InputError
from fastcircuit.ops import schema  # noqa: F401  (registers the ops)
from fastcircuit.ops.backends import choose
from fastcircuit.ops.eager import any_requires_grad, plain_eager

_STREAM_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_HALF = (torch.bfloat16, torch.float16)


def masked_read(
    stream: Tensor,
    mask: Tensor,
    base: Tensor | None = None,
    *,
    live: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Read a stream of writers through a mask: ``reads[r] = base + sum_j mask[r, j] * stream[j]``.

    Differentiable once in ``stream``, ``mask`` and ``base``. Sums are kept in at least float32 and rounded once.

    Args:
        stream: ``[W, T, d]``, one row per writer (the clean run minus the corrupted one). Compiled backends want
            each row contiguous; the rows may be any distance apart, so ``stream[:w]`` and ``stream[::k]`` are
            read where they are.
        mask: ``[R, W]``, one row per reader, in the dtype of ``stream``, or float32 if that is a half precision.
        base: ``[T, d]`` in the dtype of ``stream``, what every reader sees with all masks 0. None is zero.
        live: what :func:`live_writers` says of ``mask``: only rows of live writers are touched, whatever the others
            hold (NaN included). The reads are the same up to the order of their sums. The gradient of a row that is
            not live is 0, and so is that of a mask which is not strictly between 0 and 1, as a clamped hard-concrete
            sample's is. A reader that is not wanted is left out: its reads may hold anything (NaN included), their
            gradient is not looked at, and that of its masks is 0. None: every row is read, for every reader.
        backend: ``"auto"``, or a name from ``fastcircuit.ops.available_backends()``.

    Returns:
        ``[R, T, d]``, contiguous, in the dtype of ``stream``.

    Raises:
        InputError: shapes, dtypes or devices do not fit, or the backend asked for by name cannot run them.

    Equivalent to::

        base + torch.einsum("rw,wtd->rtd", mask, stream)

    Source: the interpolated read of Edge Pruning (Bhaskar et al., 2024, section 3), in terms of differences.
    """
    check_operands("masked_read", stream, mask, base)
    check_live("masked_read", live, stream, mask)
    if plain_eager(stream) and not (torch.is_grad_enabled() and any_requires_grad(stream, mask, base)):
        return choose("masked_read", backend, stream, mask, base, live)(stream, mask, base, live)
    return torch.ops.fastcircuit.masked_read.default(stream, mask, base, live, backend)


def masked_read_backward_(
    grad_reads: Tensor,
    stream: Tensor,
    mask: Tensor,
    grad_stream: Tensor | None,
    *,
    needs_mask_grad: bool = True,
    live: Tensor | None = None,
    backend: str = "auto",
) -> Tensor | None:
    """Add the gradient of :func:`masked_read` to ``grad_stream`` in place and return the mask's gradient.

    ``grad_stream[w] += sum_r mask[r, w] * grad_reads[r]`` and ``grad_mask[r, w] = <grad_reads[r], stream[w]>``.
    For a caller that keeps one gradient buffer for many reads, inside its own autograd node. The result is the
    same in every run with the same number of threads.

    Args:
        grad_reads: ``[R, T, d]`` in the dtype of ``stream``.
        stream: ``[W, T, d]``, as it was read.
        mask: ``[R, W]``, as it was read.
        grad_stream: ``[W, T, d]``, float32 or in the dtype of ``stream``, sharing no memory with the other
            arguments; None if no gradient of the stream is wanted.
        needs_mask_grad: whether to compute ``grad_mask``.
        live: as in :func:`masked_read`: other rows are neither read nor added to, those of ``grad_reads`` included, and
            ``grad_mask`` is 0 where the mask is not strictly between 0 and 1 or its reader not wanted.
        backend: as in :func:`masked_read`.

    Returns:
        ``grad_mask [R, W]`` in the dtype of ``mask``, summed in at least float32; None without ``needs_mask_grad``.

    Raises:
        InputError: shapes, dtypes or devices do not fit, the backend asked for by name cannot run them, or a
            tensor requires grad outside ``no_grad`` (this op is itself a backward).

    Equivalent to::

        grad_stream += torch.einsum("rw,rtd->wtd", mask, grad_reads)
        return torch.einsum("rtd,wtd->rw", grad_reads, stream)
    """
    check_operands("masked_read_backward_", stream, mask, None)
    _check_gradients("masked_read_backward_", grad_reads, stream, mask, grad_stream)
    if torch.is_grad_enabled() and any_requires_grad(grad_reads, stream, mask, grad_stream):
        raise InputError("masked_read_backward_: a tensor requires grad; call it under torch.no_grad()")
    check_live("masked_read_backward_", live, stream, mask)
    if plain_eager(stream):
        run = choose("masked_read_backward_", backend, grad_reads, stream, mask, grad_stream, live)
        return run(grad_reads, stream, mask, grad_stream, needs_mask_grad, live)
    grad_mask = torch.ops.fastcircuit.masked_read_backward_.default(
        grad_reads, stream, mask, grad_stream, needs_mask_grad, live, backend
    )
    return grad_mask if needs_mask_grad else None


def live_writers(mask: Tensor, wanted: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """Order the writers by what their masks ask for; nothing is copied to the host.

    A writer is live if a wanted reader's mask of it is not 0, and open if one is strictly between 0 and 1: only its
    masks have a gradient.

    Args:
        mask: ``[R, W]``, floating point.
        wanted: int32 ``[R]``, 0 for readers whose reads nothing needs; None: all are needed.
        backend: as in :func:`masked_read`.

    Returns:
        int32 ``[W + 2 + R]``: how many writers are open, how many are live, then the writers: first the open ones, then
        the other live ones, then the rest, each in ascending order; then 1 for every wanted reader, 0 for the others.

    Raises:
        InputError: ``mask`` is not a matrix of floating point numbers, or ``wanted`` does not fit it.
    """
    if mask.dim() != 2 or mask.dtype not in _STREAM_DTYPES:
        raise InputError(
            f"live_writers: mask is {mask.dtype} {list(mask.shape)}; accepted is [R, W] of float32, float64, bfloat16"
            " or float16"
        )
    if wanted is not None:
        _check_like("live_writers", "wanted", wanted, mask.shape[:1], (torch.int32,), mask)
    return torch.ops.fastcircuit.live_writers.default(mask, wanted, backend)


def check_live(op: str, live: Tensor | None, stream: Tensor, mask: Tensor) -> None:
    if live is not None:
        _check_like(op, "live", live, (stream.shape[0] + 2 + mask.shape[0],), (torch.int32,), stream)


def check_operands(op: str, stream: Tensor, mask: Tensor, base: Tensor | None) -> None:
    if stream.dim() != 3:
        raise InputError(f"{op}: stream has shape {list(stream.shape)}; accepted is [W, T, d]")
    if mask.dim() != 2 or mask.shape[1] != stream.shape[0]:
        raise InputError(
            f"{op}: mask has shape {list(mask.shape)}; accepted is [R, {stream.shape[0]}], one column per stream row"
        )
    if stream.dtype not in _STREAM_DTYPES:
        raise InputError(f"{op}: stream is {stream.dtype}; accepted are float32, float64, bfloat16, float16")
    if mask.dtype != stream.dtype and not (mask.dtype == torch.float32 and stream.dtype in _HALF):
        raise InputError(
            f"{op}: mask is {mask.dtype} with a {stream.dtype} stream; accepted is the dtype of the stream,"
            " or float32 with a half-precision one"
        )
    _check_like(op, "mask", mask, None, (mask.dtype,), stream)
    if base is not None:
        _check_like(op, "base", base, stream.shape[1:], (stream.dtype,), stream)


def _check_gradients(op: str, grad_reads: Tensor, stream: Tensor, mask: Tensor, grad_stream: Tensor | None) -> None:
    _check_like(op, "grad_reads", grad_reads, (mask.shape[0], *stream.shape[1:]), (stream.dtype,), stream)
    if grad_stream is not None:
        dtypes = (stream.dtype, torch.float32) if stream.dtype in _HALF else (stream.dtype,)
        _check_like(op, "grad_stream", grad_stream, stream.shape, dtypes, stream)


def _check_like(op: str, name: str, tensor: Tensor, shape, dtypes: tuple[torch.dtype, ...], stream: Tensor) -> None:
    if shape is not None and tensor.shape != tuple(shape):
        raise InputError(f"{op}: {name} has shape {list(tensor.shape)}; accepted is {list(shape)}")
    if tensor.dtype not in dtypes:
        raise InputError(f"{op}: {name} is {tensor.dtype}; accepted is {' or '.join(map(str, dtypes))}")
    if tensor.device != stream.device:
        raise InputError(f"{op}: {name} is on {tensor.device}; accepted is the device of stream, {stream.device}")
