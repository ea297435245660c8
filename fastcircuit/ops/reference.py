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
