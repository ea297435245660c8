"""Launches the Triton kernels; the kernels themselves are in kernels/, imported as fastcircuit_kernels."""

import importlib
import os

import torch
from torch import Tensor

from fastcircuit.ops.layout import layout_reasons

_NEEDED = {
    "triton": "pip install 'fastcircuit[gpu]' (Linux)",
    "fastcircuit_kernels.masked_read": "pip install fastcircuit",
}


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def missing_reason() -> str | None:
    """Why Triton cannot be used on this machine, or None."""
    for module, mend in _NEEDED.items():
        try:
            importlib.import_module(module)
        except ImportError as error:
            return f"{module} cannot be imported ({error}). Install it: {mend}"
    if not torch.cuda.is_available() and not _interpreted():
        return "there is no CUDA device (TRITON_INTERPRET=1 runs the kernels, slowly, on the CPU)"
    return None


def unsupported(op: str, *tensors: Tensor | None) -> list[str]:
    """Why the kernels cannot take these tensors, given in the order of the op."""
    if not op.startswith("masked_read"):
        return ["there is no Triton kernel for it yet"]
    first = next(t for t in tensors if t is not None)
    reasons = layout_reasons(op, tensors)
    if first.device.type != "cuda" and not _interpreted():
        reasons.append(f"stream is on {first.device}, not on a CUDA device")
    return reasons


def masked_read(stream: Tensor, mask: Tensor, base: Tensor | None) -> Tensor:
    """``base + sum_j mask[r, j] * stream[j]``."""
    from fastcircuit_kernels import masked_read as kernels

    return kernels.masked_read(stream, mask, None if base is None else base.contiguous())


def masked_read_backward_(
    grad_reads: Tensor, stream: Tensor, mask: Tensor, grad_stream: Tensor | None, needs_mask_grad: bool
) -> Tensor | None:
    """Add ``mask^T grad_reads`` to ``grad_stream`` and return ``<grad_reads[r], stream[w]>``."""
    from fastcircuit_kernels import masked_read as kernels

    grad_reads = grad_reads.contiguous()
    if grad_stream is not None:
        kernels.add_stream_gradient(grad_reads, mask, grad_stream)
    return kernels.mask_gradient(grad_reads, stream).to(mask.dtype) if needs_mask_grad else None


def masked_read_grads(
    grad_reads: Tensor, stream: Tensor, mask: Tensor, needs_stream: bool, needs_mask: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of ``masked_read`` as new tensors; None for one that is not needed."""
    grad_stream = stream.new_zeros(stream.shape) if needs_stream else None
    return grad_stream, masked_read_backward_(grad_reads, stream, mask, grad_stream, needs_mask)
