"""Launches the Triton kernels; the kernels themselves are in kernels/, imported as fastcircuit_kernels."""

import functools
import importlib
import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastcircuit.errors import InputError
from fastcircuit.ops.layout import layout_reasons

_NEEDED = {
    "triton": "pip install 'fastcircuit[gpu]' (Linux)",
    "fastcircuit_kernels.masked_read": "pip install fastcircuit",
}
_WIDEST_HEAD = 128
_Launch = TypeVar("_Launch", bound=Callable[..., Any])
FLOAT32_PRECISIONS = ("ieee", "tf32x3", "tf32")
_forced_precision: str | None = None


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


def force_float32_precision(name: str | None) -> None:
    """How the kernels multiply float32 numbers from now on.

    Args:
        name: ``"ieee"`` (vector units), ``"tf32x3"`` (tensor cores, three products, error near float32's), ``"tf32"``
            (tensor cores, 10 bits of mantissa). None: as ``torch.set_float32_matmul_precision`` says, ``"ieee"`` for
            highest and ``"tf32"`` for high and medium.
    """
    global _forced_precision
    if name is not None and name not in FLOAT32_PRECISIONS:
        raise InputError(f"float32 precision: got {name!r}; accepted are {', '.join(FLOAT32_PRECISIONS)}")
    _forced_precision = name


def float32_precision() -> str:
    """How the kernels multiply float32 numbers now."""
    return _forced_precision or ("ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32")


def unsupported(op: str, *tensors: Tensor | None) -> list[str]:
    """Why the kernels cannot take these tensors, given in the order of the op."""
    first = next(t for t in tensors if t is not None)
    # Ops that read the stream, and where it is among their tensors.
    of_stream = {"read_norm": "masked_read", "read_norm_grad": "masked_read_grads"}.get(op, op)
    reasons = layout_reasons(of_stream, tensors) if of_stream.startswith("masked_read") else []
    if op.startswith("packed_attention"):
        reasons += attention_reasons(first.dtype, first.shape[-1])
    if first.device.type != "cuda" and not _interpreted():
        reasons.append(f"the tensors are on {first.device}, not on a CUDA device")
    return reasons


def attention_reasons(dtype: torch.dtype, width: int) -> list[str]:
    """Why packed attention does not take heads of so many numbers in this dtype, whatever the device."""
    reasons = []
    if width > _WIDEST_HEAD:
        reasons.append(f"a head has {width} numbers; the kernel is for at most {_WIDEST_HEAD}")
    if dtype.itemsize != 2 and not _interpreted():
        reasons.append(f"query is {dtype}, for which registers spill; the kernel has float16 and bfloat16")
    return reasons


def _on_its_device(launch: _Launch) -> _Launch:
    """Triton launches on the current device: make that the one of the first tensor."""

    @functools.wraps(launch)
    def launched(first: Tensor, *rest: Any, **named: Any) -> Any:
        if first.device.type != "cuda":
            return launch(first, *rest, **named)
        with torch.cuda.device(first.device):
            return launch(first, *rest, **named)

    return launched  # type: ignore[return-value]


@_on_its_device
def masked_read(stream: Tensor, mask: Tensor, base: Tensor | None, live: Tensor | None = None) -> Tensor:
    """``base + sum_j mask[r, j] * stream[j]``."""
    from fastcircuit_kernels import masked_read as kernels

    base = None if base is None else base.contiguous()
    return kernels.masked_read(stream, mask, base, live, float32_precision())


@_on_its_device
def masked_read_backward_(
    grad_reads: Tensor,
    stream: Tensor,
    mask: Tensor,
    grad_stream: Tensor | None,
    needs_mask_grad: bool,
    live: Tensor | None = None,
) -> Tensor | None:
    """Add ``mask^T grad_reads`` to ``grad_stream`` and return ``<grad_reads[r], stream[w]>``."""
    return _backward(grad_reads, stream, mask, grad_stream, needs_mask_grad, live, accumulate=True)


@_on_its_device
def masked_read_grads(
    grad_reads: Tensor,
    stream: Tensor,
    mask: Tensor,
    needs_stream: bool,
    needs_mask: bool,
    live: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of ``masked_read`` as new tensors; None for one that is not needed."""
    grad_stream = None
    if needs_stream:
        # Rows that are not live are left alone, so they must be 0 before.
        grad_stream = stream.new_empty(stream.shape) if live is None else stream.new_zeros(stream.shape)
    return grad_stream, _backward(grad_reads, stream, mask, grad_stream, needs_mask, live, accumulate=False)


def _backward(
    grad_reads: Tensor,
    stream: Tensor,
    mask: Tensor,
    grad_stream: Tensor | None,
    needs_mask_grad: bool,
    live: Tensor | None,
    accumulate: bool,
) -> Tensor | None:
    from fastcircuit_kernels import masked_read as kernels

    grad_reads, precision = grad_reads.contiguous(), float32_precision()
    if grad_stream is None:
        return kernels.mask_gradient(grad_reads, stream, mask, live, precision) if needs_mask_grad else None
    if needs_mask_grad:
        return kernels.both_gradients(grad_reads, stream, mask, grad_stream, accumulate, live, precision)
    kernels.add_stream_gradient(grad_reads, mask, grad_stream, accumulate, live, precision)
    return None


@_on_its_device
def live_writers(mask: Tensor, wanted: Tensor | None = None) -> Tensor:
    """How many writers are open and live, the rows of the open, other live and dead ones; then 1 per wanted reader."""
    from fastcircuit_kernels import live_writers as kernels

    return kernels.live_writers(mask, None if wanted is None else wanted.contiguous())


@_on_its_device
def live_product_(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, alive: Tensor, zeros: bool) -> None:
    """``x[g] @ weight[g] + bias[g]`` where ``alive[g]`` is not 0; elsewhere 0 with ``zeros``."""
    from fastcircuit_kernels import live_product as kernels

    x, bias = x if x.stride(2) == 1 else x.contiguous(), None if bias is None else bias.contiguous()
    weight = weight if 1 in weight.stride()[1:] else weight.contiguous()
    kernels.live_product(out, x, weight, bias, alive.contiguous(), zeros, float32_precision())


@_on_its_device
def hard_concrete(log_alpha: Tensor, seed: Tensor, *numbers: float) -> tuple[Tensor, Tensor]:
    """Samples, and the probability that each is not 0."""
    from fastcircuit_kernels import hard_concrete as kernels

    return kernels.hard_concrete(log_alpha, seed, *numbers)


@_on_its_device
def hard_concrete_grad(grad_z: Tensor, grad_on: Tensor, z: Tensor, on: Tensor, *numbers: float) -> Tensor:
    """The gradient of ``log_alpha``."""
    from fastcircuit_kernels import hard_concrete as kernels

    return kernels.hard_concrete_grad(grad_z, grad_on, z, on, *numbers)


@_on_its_device
def answer_kl(hidden: Tensor, weight: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Divergence per row, and what backward needs."""
    from fastcircuit_kernels import answer_kl as kernels

    return kernels.answer_kl(_rows(hidden), _rows(weight), _rows(reference), float32_precision())


@_on_its_device
def answer_kl_grad(grad: Tensor, hidden: Tensor, weight: Tensor, reference: Tensor, stats: Tensor) -> Tensor:
    """The gradient of ``hidden``."""
    from fastcircuit_kernels import answer_kl as kernels

    return kernels.answer_kl_grad(grad, _rows(hidden), _rows(weight), _rows(reference), stats, float32_precision())


def _rows(matrix: Tensor) -> Tensor:
    """``matrix`` with contiguous rows, copied only if need be."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


@_on_its_device
def read_norm(
    stream: Tensor,
    mask: Tensor,
    base: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    centered: bool,
    plain: int = 0,
    live: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Normalised reads, the last ``plain`` as they are, and their statistics."""
    from fastcircuit_kernels import read_norm as kernels

    base, bias = (None if tensor is None else tensor.contiguous() for tensor in (base, bias))
    return kernels.read_norm(
        stream, mask, base, weight.contiguous(), bias, eps, centered, plain, live, float32_precision()
    )


@_on_its_device
def read_norm_grad(
    grad: Tensor,
    stats: Tensor,
    stream: Tensor,
    mask: Tensor,
    base: Tensor | None,
    weight: Tensor,
    centered: bool,
    plain: int = 0,
    live: Tensor | None = None,
) -> Tensor:
    """The gradient of the reads."""
    from fastcircuit_kernels import read_norm as kernels

    base = None if base is None else base.contiguous()
    return kernels.read_norm_grad(
        grad.contiguous(),
        stats.contiguous(),
        stream,
        mask,
        base,
        weight.contiguous(),
        centered,
        plain,
        live,
        float32_precision(),
    )


@_on_its_device
def packed_attention(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """Softmax attention of packed sequences, and the logarithms of the sums, ``[H, T]``."""
    return _attention(query, key, *rest).forward(query, key, value)


@_on_its_device
def packed_attention_grads(
    grad: Tensor, out: Tensor, lse: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value; the scores are computed again."""
    return _attention(query, key, *rest).backward(grad, query, key, value, out, lse)


def _attention(
    query: Tensor,
    key: Tensor,
    starts: Tensor,
    longest: int,
    kv_of_head: Tensor | None,
    alive: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    *numbers: Any,
) -> Any:
    from fastcircuit_kernels import packed_attention as kernels

    rotary = None if cos is None else (cos, sin)
    return kernels.Call(query, key, starts, longest, kv_of_head, alive, rotary, *numbers, float32_precision())
