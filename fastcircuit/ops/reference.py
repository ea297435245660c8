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
