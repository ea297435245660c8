"""The operations in plain torch: the specification every other backend is tested against."""

import torch
from torch import Tensor


def missing_reason() -> str | None:
    """Why this backend cannot be used at all: never, it is plain torch."""
    return None


def unsupported(op: str, *tensors: Tensor | None) -> list[str]:
    """Why this backend cannot take these tensors: it takes everything the op accepts."""
    return []


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums are kept in: float32 for the half precisions, otherwise the dtype itself."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def masked_read(stream: Tensor, mask: Tensor, base: Tensor | None) -> Tensor:
    """``base + sum_j mask[r, j] * stream[j]``, rounded once to the dtype of ``stream``."""
    wide = accumulation_dtype(stream.dtype)
    reads = mask.to(wide) @ stream.flatten(1).to(wide)
    reads = reads.unflatten(1, stream.shape[1:])
    if base is not None:
        reads = reads + base.to(wide)
    return reads.to(stream.dtype)


def masked_read_backward_(
    grad_reads: Tensor, stream: Tensor, mask: Tensor, grad_stream: Tensor | None, needs_mask_grad: bool
) -> Tensor | None:
    """Add ``mask^T grad_reads`` to ``grad_stream`` and return ``<grad_reads[r], stream[w]>``."""
    wide = accumulation_dtype(stream.dtype)
    grad = grad_reads.flatten(1).to(wide)
    if grad_stream is not None:
        update = (mask.to(wide).T @ grad).unflatten(1, stream.shape[1:])
        grad_stream.copy_(grad_stream.to(wide) + update)
    if not needs_mask_grad:
        return None
    return (grad @ stream.flatten(1).to(wide).T).to(mask.dtype)


def masked_read_grads(
    grad_reads: Tensor, stream: Tensor, mask: Tensor, needs_stream: bool, needs_mask: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of ``masked_read`` as new tensors; None for one that is not needed."""
    grad_stream = torch.zeros_like(stream, memory_format=torch.contiguous_format) if needs_stream else None
    grad_mask = masked_read_backward_(grad_reads, stream, mask, grad_stream, needs_mask)
    return grad_stream, grad_mask


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x^2) + eps)``, rounded to the dtype of ``x``, times ``weight``."""
    return (_normalised(x, eps)[0].to(x.dtype) * weight).contiguous()


def rms_norm_grads(
    grad: Tensor, x: Tensor, weight: Tensor, eps: float, needs_x: bool, needs_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of ``rms_norm`` as new tensors, each rounded once; None for one that is not needed."""
    normed, rstd = _normalised(x, eps)
    grad = grad.to(normed.dtype)
    grad_x = grad_weight = None
    if needs_x:
        grad_normed = grad * weight
        along_x = (grad_normed * normed).mean(-1, keepdim=True)
        grad_x = (rstd * (grad_normed - normed * along_x)).to(x.dtype).contiguous()
    if needs_weight:
        grad_weight = (grad * normed.to(x.dtype)).sum_to_size(weight.shape).to(x.dtype)
    return grad_x, grad_weight


def _normalised(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``x * rstd`` and ``rstd = 1 / sqrt(mean(x^2) + eps)``, in the accumulation dtype."""
    wide = x.to(accumulation_dtype(x.dtype))
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return wide * rstd, rstd


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """``(x - mean(x)) / sqrt(var(x) + eps) * weight + bias``, rounded once."""
    return torch.nn.functional.layer_norm(x, weight.shape, weight, bias, eps).contiguous()


def norm_backward_(grad: Tensor, x: Tensor, weight: Tensor, eps: float, centered: bool) -> None:
    """Overwrite ``grad`` with the gradient of ``x``, rounded once."""
    wide = x.to(accumulation_dtype(x.dtype))
    g = grad.to(wide.dtype) * weight
    if centered:
        wide = wide - wide.mean(-1, keepdim=True)
        g = g - g.mean(-1, keepdim=True)
    normed, rstd = _normalised(wide, eps)
    grad.copy_(rstd * (g - normed * (g * normed).mean(-1, keepdim=True)))


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor,
    kv_of_head: Tensor,
    rotary: tuple[Tensor, Tensor] | None,
    scale: float,
    causal: bool,
    window: int | None,
) -> Tensor:
    """Softmax attention, one sequence after the other, written out."""
    if rotary is not None:
        query, key = rotate(query, *rotary), rotate(key, *rotary)
    kv_of_head = kv_of_head.to(key.device)
    key, value = key.index_select(0, kv_of_head), value.index_select(0, kv_of_head)
    out = [
        _attention(query[:, first:last], key[:, first:last], value[:, first:last], scale, causal, window)
        for first, last in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True)
    ]
    return torch.cat(out, dim=1).transpose(0, 1).flatten(1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions in the half-split layout, ``[H, T, d_head]``; the tables ``[T, d_rotary]`` may cover a part."""
    width = cos.shape[-1]
    part, rest = (x, None) if width == x.shape[-1] else (x[..., :width], x[..., width:])
    first, second = part.chunk(2, dim=-1)
    turned = part * cos + torch.cat((-second, first), dim=-1) * sin
    return turned if rest is None else torch.cat((turned, rest), dim=-1)


def _attention(query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool, window: int | None) -> Tensor:
    wide = accumulation_dtype(query.dtype)
    scores = query.to(wide) @ key.to(wide).transpose(1, 2) * scale
    place = torch.arange(query.shape[1], device=query.device)
    distance = place[:, None] - place[None, :]
    hidden = torch.zeros_like(distance, dtype=torch.bool)
    if causal:
        hidden |= distance < 0
    if window is not None:
        hidden |= distance.abs() >= window
    return (scores.masked_fill(hidden, -torch.inf).softmax(-1) @ value.to(wide)).to(value.dtype)
