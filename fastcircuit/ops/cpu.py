"""Launches the C++ kernels: checks that tensors lie as they want, and passes addresses, shapes and strides."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastcircuit.ops import extension, reference
from fastcircuit.ops.extension import missing_reason as missing_reason
from fastcircuit.ops.layout import layout_reasons
from fastcircuit.ops.mlp import ACTIVATIONS, Affine
from fastcircuit.ops.recycling import POOL

CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2}
# A head's weights are read once for every few tokens: they must stay in the second-level cache.
_HEAD_BYTES = 2**20


def unsupported(op: str, *tensors: Tensor | None) -> list[str]:
    """Why the kernels cannot take these tensors, given in the order of the op."""
    if op.startswith("norm_projection"):
        return _unsupported_projection(*tensors)
    if op.startswith("packed_attention"):
        return _unsupported_attention(*tensors)
    if op in ("mlp", "mlp_grad"):
        return _unsupported_mlp(*tensors)
    if not op.startswith("masked_read"):
        return _unsupported_kind("x", tensors[-2])
    stream = tensors[0 if op == "masked_read" else 1]
    assert stream is not None
    reasons = layout_reasons(op, tensors)
    if tensors[-1] is not None and tensors[-1].dtype == torch.int32:
        reasons.append("the kernels take no live list")
    if stream.device.type != "cpu":
        reasons.append(f"stream is on {stream.device}, not on the CPU")
    if stream.dtype not in CODES:
        reasons.append(f"stream is {stream.dtype}; the kernels have float32, float64 and bfloat16")
    return reasons


def _unsupported_kind(name: str, tensor: Tensor | None) -> list[str]:
    assert tensor is not None
    reasons = []
    if tensor.device.type != "cpu":
        reasons.append(f"{name} is on {tensor.device}, not on the CPU")
    if tensor.dtype not in CODES:
        reasons.append(f"{name} is {tensor.dtype}; the kernels have float32, float64 and bfloat16")
    return reasons


def _unsupported_attention(query: Tensor | None, key: Tensor | None, alive: Tensor | None) -> list[str]:
    reasons = _unsupported_kind("query", query)
    return reasons if alive is None else [*reasons, "the kernel leaves out no heads"]


def _unsupported_projection(x: Tensor | None, weight: Tensor | None) -> list[str]:
    assert x is not None
    assert weight is not None
    reasons = _unsupported_kind("x", x)
    if x.dtype == torch.bfloat16:
        reasons.append("x is torch.bfloat16; the kernel has float32 and float64")
    if x.stride(2) != 1 and x.shape[2] > 1:
        reasons.append("rows of x are not contiguous")
    head_bytes = weight.shape[1] * weight.shape[2] * weight.element_size()
    if head_bytes > _HEAD_BYTES:
        reasons.append(f"a head's weights take {head_bytes} bytes; the kernel is for at most {_HEAD_BYTES}")
    return reasons


def _unsupported_mlp(x: Tensor | None, up: Tensor | None) -> list[str]:
    assert x is not None
    reasons = _unsupported_kind("x", x)
    if x.dtype == torch.bfloat16:
        reasons.append("x is torch.bfloat16; the kernel has float32 and float64")
    return reasons


def masked_read(stream: Tensor, mask: Tensor, base: Tensor | None, live: None = None) -> Tensor:
    """``base + sum_j mask[r, j] * stream[j]``."""
    writers, tokens, width = stream.shape
    readers = mask.shape[0]
    reads = POOL.empty((readers, tokens, width), stream)
    if base is not None and not base.is_contiguous():
        base = base.contiguous()
    extension.kernels.masked_read(
        extension.isa(),
        torch.get_num_threads(),
        CODES[stream.dtype],
        CODES[mask.dtype],
        readers,
        writers,
        tokens * width,
        stream.data_ptr(),
        stream.stride(0),
        mask.data_ptr(),
        *mask.stride(),
        0 if base is None else base.data_ptr(),
        reads.data_ptr(),
    )
    return reads


def masked_read_backward_(
    grad_reads: Tensor,
    stream: Tensor,
    mask: Tensor,
    grad_stream: Tensor | None,
    needs_mask_grad: bool,
    live: None = None,
) -> Tensor | None:
    """Add ``mask^T grad_reads`` to ``grad_stream`` and return ``<grad_reads[r], stream[w]>``."""
    return _backward(grad_reads, stream, mask, grad_stream, needs_mask_grad, accumulate=True)


def masked_read_grads(
    grad_reads: Tensor, stream: Tensor, mask: Tensor, needs_stream: bool, needs_mask: bool, live: None = None
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of ``masked_read`` as new tensors; None for one that is not needed."""
    grad_stream = POOL.empty(stream.shape, stream) if needs_stream else None
    grad_mask = _backward(grad_reads, stream, mask, grad_stream, needs_mask, accumulate=False)
    return grad_stream, grad_mask


def _backward(
    grad_reads: Tensor,
    stream: Tensor,
    mask: Tensor,
    grad_stream: Tensor | None,
    needs_mask_grad: bool,
    accumulate: bool,
) -> Tensor | None:
    writers, tokens, width = stream.shape
    if not grad_reads.is_contiguous():
        grad_reads = grad_reads.contiguous()
    grad_mask = mask.new_empty(mask.shape) if needs_mask_grad else None
    extension.kernels.masked_read_backward(
        extension.isa(),
        torch.get_num_threads(),
        CODES[stream.dtype],
        CODES[mask.dtype],
        CODES[stream.dtype if grad_stream is None else grad_stream.dtype],
        mask.shape[0],
        writers,
        tokens * width,
        grad_reads.data_ptr(),
        stream.data_ptr(),
        stream.stride(0),
        mask.data_ptr(),
        *mask.stride(),
        0 if grad_stream is None else grad_stream.data_ptr(),
        0 if grad_stream is None else grad_stream.stride(0),
        accumulate,
        0 if grad_mask is None else grad_mask.data_ptr(),
    )
    return grad_mask


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight``."""
    return _norm(x, weight, None, eps, centered=False)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """``(x - mean(x)) / sqrt(var(x) + eps) * weight + bias``."""
    return _norm(x, weight, bias, eps, centered=True)


def _norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, centered: bool) -> Tensor:
    x, x_strides = _rows(x)
    weight = weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    y = POOL.empty(x.shape, x)
    width = x.shape[-1]
    extension.kernels.norm(
        extension.isa(),
        torch.get_num_threads(),
        CODES[x.dtype],
        centered,
        x.numel() // max(width, 1),
        width,
        x.data_ptr(),
        x_strides,
        weight.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        eps,
        y.data_ptr(),
    )
    return y


def rms_norm_grads(
    grad: Tensor, x: Tensor, weight: Tensor, eps: float, needs_x: bool, needs_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of ``rms_norm`` as new tensors; None for one that is not needed."""
    # Weights are frozen in circuit discovery, so their gradient has no kernel of its own.
    _, grad_weight = reference.rms_norm_grads(grad, x, weight, eps, False, True) if needs_weight else (None, None)
    return _rms_norm_grad_x(grad, x, weight, eps) if needs_x else None, grad_weight


def _rms_norm_grad_x(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    grad_x = POOL.empty(x.shape, x)
    _norm_backward(grad, x, weight, eps, False, grad_x)
    return grad_x


def norm_backward_(grad: Tensor, x: Tensor, weight: Tensor, eps: float, centered: bool) -> None:
    """Overwrite ``grad`` with the gradient of ``x``."""
    _norm_backward(grad, x, weight, eps, centered, grad)


def _norm_backward(grad: Tensor, x: Tensor, weight: Tensor, eps: float, centered: bool, grad_x: Tensor) -> None:
    grad, grad_strides = _rows(grad)
    x, x_strides = _rows(x)
    weight = weight.contiguous()
    width = x.shape[-1]
    extension.kernels.norm_backward(
        extension.isa(),
        torch.get_num_threads(),
        CODES[x.dtype],
        centered,
        x.numel() // max(width, 1),
        width,
        grad.data_ptr(),
        grad_strides,
        x.data_ptr(),
        x_strides,
        weight.data_ptr(),
        eps,
        grad_x.data_ptr(),
    )


def norm_projection(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    centered: bool,
) -> Tensor:
    """The norm and the projection of one tile of tokens after the other."""
    y = x.new_empty(*x.shape[:2], weight.shape[2])
    norm_bias = None if norm_bias is None else norm_bias.contiguous()
    if bias is not None and bias.stride(2) != 1:
        bias = bias.contiguous()
    extension.kernels.norm_projection(
        *_projection(x, norm_weight.contiguous(), eps, weight, centered),
        0 if norm_bias is None else norm_bias.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        0 if bias is None else bias.stride(0),
        y.data_ptr(),
    )
    return y


def norm_projection_grad_(
    grad: Tensor, x: Tensor, norm_weight: Tensor, eps: float, weight: Tensor, grad_x: Tensor, centered: bool
) -> None:
    """Overwrite ``grad_x`` with the gradient of ``x``."""
    grad = grad.contiguous()
    call = _projection(x, norm_weight.contiguous(), eps, weight, centered)
    extension.kernels.norm_projection_backward(*call, grad.data_ptr(), grad_x.data_ptr())


def _projection(x: Tensor, norm_weight: Tensor, eps: float, weight: Tensor, centered: bool) -> tuple[Any, ...]:
    """What forward and backward pass to the kernel."""
    heads, tokens, width = x.shape
    return (
        extension.isa(),
        torch.get_num_threads(),
        CODES[x.dtype],
        centered,
        (heads, tokens, width, weight.shape[2]),
        x.data_ptr(),
        (x.stride(0), x.stride(1)),
        norm_weight.data_ptr(),
        eps,
        weight.data_ptr(),
        weight.stride(),
    )


def mlp(
    x: Tensor, gate: Affine | None, up: Affine, down: Affine, activation: str, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """Both products, the activation between them, and what backward needs of it."""
    slopes = None
    if keep:
        slopes = POOL.empty((1 if gate is None else 2, len(x), up.weight.shape[1]), x)
    return _mlp(x, gate, up, down, activation, slopes, backward=False), slopes


def mlp_grad(grad: Tensor, slopes: Tensor, gate: Affine | None, up: Affine, down: Affine) -> Tensor:
    """The gradient of the input."""
    return _mlp(grad, gate, up, down, ACTIVATIONS[0], slopes.contiguous(), backward=True)


def _mlp(
    x: Tensor,
    gate: Affine | None,
    up: Affine,
    down: Affine,
    activation: str,
    slopes: Tensor | None,
    backward: bool,
) -> Tensor:
    """The output from the input, or ``backward`` the gradient of that from the gradient of this."""
    if x.stride(1) != 1 and x.shape[1] > 1:
        x = x.contiguous()
    y = POOL.empty(x.shape, x)
    biases = [None if part is None or part.bias is None else part.bias.contiguous() for part in (gate, up, down)]
    extension.kernels.mlp(
        backward,
        extension.isa(),
        torch.get_num_threads(),
        CODES[x.dtype],
        ACTIVATIONS.index(activation),
        (*x.shape, up.weight.shape[1]),
        (0, 0, 0, 0) if gate is None else _affine(gate.weight, biases[0]),
        _affine(up.weight, biases[1]),
        _affine(down.weight, biases[2]),
        x.data_ptr(),
        x.stride(0),
        0 if slopes is None else slopes.data_ptr(),
        y.data_ptr(),
    )
    return y


def _affine(weight: Tensor, bias: Tensor | None) -> tuple[int, ...]:
    return weight.data_ptr(), *weight.stride(), 0 if bias is None else bias.data_ptr()


def _rows(tensor: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    """``tensor [..., d]``, copied only if need be, and where its rows lie: rows in a group, group and row stride."""
    if not tensor.is_contiguous():
        strides = _row_strides(tensor)
        if strides is not None:
            return tensor, strides
        tensor = tensor.contiguous()
    width = tensor.shape[-1]
    return tensor, (max(tensor.numel() // max(width, 1), 1), 0, width)


def _row_strides(tensor: Tensor) -> tuple[int, int, int] | None:
    """The leading axes of ``tensor`` merged to at most two; None if it takes more, or rows are not contiguous."""
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        return None
    axes: list[tuple[int, int]] = []  # (size, stride), innermost first
    for size, stride in zip(reversed(tensor.shape[:-1]), reversed(tensor.stride()[:-1]), strict=True):
        if axes and stride == axes[-1][0] * axes[-1][1]:
            axes[-1] = (size * axes[-1][0], axes[-1][1])
        elif size != 1:
            axes.append((size, stride))
    if len(axes) > 2:
        return None
    (rows, row_stride), (_, group_stride) = (*axes, (1, 0), (1, 0))[:2]
    return rows, group_stride, row_stride


def packed_attention(query: Tensor, *rest: Any) -> tuple[Tensor, None]:
    """Softmax attention of packed sequences (see :func:`fastcircuit.ops.packed_attention`)."""
    heads, tokens, width = query.shape
    out = query.new_empty(tokens, heads * width)
    _attention(extension.kernels.packed_attention, (out.data_ptr(),), query, *rest)
    return out, None


def packed_attention_grads(
    grad: Tensor, out: None, lse: None, query: Tensor, key: Tensor, value: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value; the scores are computed again."""
    grads = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    results = grad.data_ptr(), tuple(part.data_ptr() for part in grads)
    _attention(extension.kernels.packed_attention_backward, results, query, key, value, *rest)
    return grads


def _attention(
    kernel: Callable[..., None],
    results: tuple[Any, ...],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor,
    longest: int,
    kv_of_head: Tensor | None,
    alive: None,
    cos: Tensor | None,
    sin: Tensor | None,
    scale: float,
    causal: bool,
    window: int | None,
) -> None:
    """What forward and backward pass to their kernels alike, then ``results``."""
    (heads, tokens, width), kv_heads = query.shape, key.shape[0]
    kv_of_head = _equal_groups(heads, kv_heads) if kv_of_head is None else kv_of_head
    kernel(
        extension.isa(),
        torch.get_num_threads(),
        CODES[query.dtype],
        (heads, kv_heads, tokens, width),
        (len(starts) - 1, longest, starts.data_ptr(), kv_of_head.data_ptr()),
        (query.data_ptr(), key.data_ptr(), value.data_ptr()),
        (0, 0, 0) if cos is None or sin is None else (cos.shape[1], cos.data_ptr(), sin.data_ptr()),
        scale,
        causal,
        window or 0,
        *results,
    )


@functools.lru_cache(maxsize=64)
def _equal_groups(heads: int, kv_heads: int) -> Tensor:
    return torch.arange(heads, device="cpu") * kv_heads // max(heads, 1)
