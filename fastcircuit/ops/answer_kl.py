"""Unembedding at the answers and KL(full model || circuit), in one op."""

import torch
from torch import Tensor

from fastcircuit.errors import InputError
from fastcircuit.ops.backends import choose

_WIDE = {
    torch.float32: torch.float32,
    torch.float64: torch.float64,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
}


def answer_kl(hidden: Tensor, weight: Tensor, reference_log_probs: Tensor, *, backend: str = "auto") -> Tensor:
    """KL divergence of the circuit's answers from the full model's: ``kl_n = sum_v p_nv (ln p_nv - ln q_nv)``, nats.

    ``q_n = softmax(weight @ hidden_n)`` and ``ln p`` is given; a word of probability 0 contributes nothing. Logits and
    sums are kept in at least float32. Differentiable once in ``hidden`` alone: weights are frozen, and the reference
    does not depend on the masks. The Triton kernels hold no logits in forward; backward makes them again and holds
    their gradient, ``[N, V]`` in the dtype of ``hidden``.

    Args:
        hidden: ``[N, d]``, the final norm's output at the answers.
        weight: ``[V, d]`` in the dtype of ``hidden``: the unembedding, or its rows of the task's answer tokens.
        reference_log_probs: ``[N, V]``, float32 (float64 with a float64 ``hidden``): the full model's, over as many
            tokens.
        backend: ``"auto"``, or a name from ``fastcircuit.ops.available_backends()``.

    Returns:
        ``[N]`` in the dtype of ``reference_log_probs``.

    Raises:
        InputError: shapes, dtypes or devices do not fit, ``weight`` or ``reference_log_probs`` requires grad, or the
            backend asked for by name cannot run them.

    Equivalent to::

        F.kl_div((hidden @ weight.T).log_softmax(-1), reference_log_probs, reduction="none", log_target=True).sum(-1)

    Source: the loss of Edge Pruning (Bhaskar et al., 2024, section 3).
    """
    _check(hidden, weight, reference_log_probs)
    kl, _ = torch.ops.fastcircuit.answer_kl.default(hidden, weight, reference_log_probs, backend)
    return kl


def _check(hidden: Tensor, weight: Tensor, reference: Tensor) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or weight.shape[1] != hidden.shape[1] or not weight.shape[0]:
        raise InputError(
            f"answer_kl: hidden has shape {list(hidden.shape)} and weight {list(weight.shape)}; accepted are [N, d] and"
            " [V, d] with V > 0"
        )
    if hidden.dtype not in _WIDE or weight.dtype != hidden.dtype:
        raise InputError(
            f"answer_kl: hidden is {hidden.dtype} and weight {weight.dtype}; accepted is one of float32, float64,"
            " bfloat16, float16 for both"
        )
    shape, wide = (hidden.shape[0], weight.shape[0]), _WIDE[hidden.dtype]
    if reference.shape != shape or reference.dtype != wide:
        raise InputError(
            f"answer_kl: reference_log_probs is {reference.dtype} {list(reference.shape)}; accepted is {wide}"
            f" {list(shape)}"
        )
    if not hidden.device == weight.device == reference.device:
        raise InputError(
            f"answer_kl: hidden, weight and reference_log_probs are on {hidden.device}, {weight.device} and"
            f" {reference.device}; accepted is one device"
        )
    if torch.is_grad_enabled() and (weight.requires_grad or reference.requires_grad):
        raise InputError("answer_kl: weight or reference_log_probs requires grad; only hidden has a gradient")


_LIB = torch.library.Library("fastcircuit", "FRAGMENT")
_LIB.define(
    "answer_kl(Tensor hidden, Tensor weight, Tensor reference, str backend) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIB.define(
    "answer_kl_grad(Tensor grad, Tensor hidden, Tensor weight, Tensor reference, Tensor stats, str backend) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.impl(_LIB, "answer_kl", "CompositeExplicitAutograd")
def _answer_kl(hidden: Tensor, weight: Tensor, reference: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return choose("answer_kl", backend, hidden, weight, reference)(hidden, weight, reference)


@torch.library.register_fake("fastcircuit::answer_kl", lib=_LIB)
def _answer_kl_fake(hidden: Tensor, weight: Tensor, reference: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return reference.new_empty(hidden.shape[0]), reference.new_empty(2, hidden.shape[0])


@torch.library.impl(_LIB, "answer_kl_grad", "CompositeExplicitAutograd")
def _answer_kl_grad(
    grad: Tensor, hidden: Tensor, weight: Tensor, reference: Tensor, stats: Tensor, backend: str
) -> Tensor:
    run = choose("answer_kl_grad", backend, hidden, weight, reference)
    return run(grad.contiguous(), hidden, weight, reference, stats)


@torch.library.register_fake("fastcircuit::answer_kl_grad", lib=_LIB)
def _answer_kl_grad_fake(
    grad: Tensor, hidden: Tensor, weight: Tensor, reference: Tensor, stats: Tensor, backend: str
) -> Tensor:
    return hidden.new_empty(hidden.shape)


def _save(ctx, inputs, output) -> None:
    hidden, weight, reference, ctx.backend = inputs
    ctx.save_for_backward(hidden, weight, reference, output[1])


def _backward(ctx, grad: Tensor, _: Tensor):
    return torch.ops.fastcircuit.answer_kl_grad.default(grad, *ctx.saved_tensors, ctx.backend), None, None, None


def _no_second_derivative(ctx, *grads: Tensor):
    raise InputError("answer_kl: second derivatives are not implemented; accepted is one backward pass")


torch.library.register_autograd("fastcircuit::answer_kl", _backward, setup_context=_save, lib=_LIB)
torch.library.register_autograd("fastcircuit::answer_kl_grad", _no_second_derivative, lib=_LIB)
