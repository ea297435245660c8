"""Hard-concrete samples of all masks in one launch, with the probability that each is not 0."""

import math

import torch
from torch import Tensor

from fastcircuit.errors import InputError
from fastcircuit.ops.backends import choose

_DTYPES = (torch.float32, torch.float64)


def hard_concrete(
    log_alpha: Tensor,
    seed: Tensor,
    *,
    temperature: float,
    stretch: tuple[float, float],
    epsilon: float,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Sample every mask: ``z = clamp(low + (high - low) sigmoid((ln u - ln(1 - u) + log_alpha) / T), 0, 1)``.

    u is uniform in ``[epsilon, 1 - epsilon]``. Differentiable once in ``log_alpha``; the gradient through ``z`` is 0
    where the clamp holds. Computed in the dtype of ``log_alpha``. Nothing is copied to the host, so a captured graph
    that adds 1 to ``seed[1]`` draws anew at every replay.

    The numbers are Philox-4x32-10's, with key ``seed[0]``, counter ``(index, seed[1])`` and 23 bits each: the same u
    in every backend and on every device. ``z`` may differ in its last bits.

    Args:
        log_alpha: ``[n]``, float32 or float64; edges and writers one after the other.
        seed: int64 ``[2]`` on the device of ``log_alpha``: the run's seed, and which draw of the run this is.
        temperature, stretch, epsilon: T, (low, high) with low < 0 < 1 < high, and how far u keeps from 0 and 1.
        backend: ``"auto"``, or a name from ``fastcircuit.ops.available_backends()``.

    Returns:
        ``z`` and ``on``, ``[n]`` each; ``on = P(z > 0) = sigmoid(log_alpha - T ln(-low / high))``, whose sum is the
        expected L0 norm of the masks.

    Raises:
        InputError: shapes, dtypes, devices or numbers do not fit, or the backend asked for by name cannot run them.

    Source: Louizos, Welling and Kingma, 2018, section 2.2; Edge Pruning (Bhaskar et al., 2024), appendix A.
    """
    low, high = stretch
    if log_alpha.dim() != 1 or log_alpha.dtype not in _DTYPES:
        raise InputError(
            f"hard_concrete: log_alpha is {log_alpha.dtype} {list(log_alpha.shape)}; accepted is [n] of float32 or"
            " float64"
        )
    if seed.shape != (2,) or seed.dtype != torch.int64 or seed.device != log_alpha.device:
        raise InputError(
            f"hard_concrete: seed is {seed.dtype} {list(seed.shape)} on {seed.device}; accepted is int64 [2] on the"
            f" device of log_alpha, {log_alpha.device}"
        )
    if not (low < 0 and high > 1 and temperature > 0 and 0 <= epsilon < 0.5):
        raise InputError(
            f"hard_concrete: got stretch {stretch}, temperature {temperature}, epsilon {epsilon}; accepted are"
            " low < 0 and high > 1, a positive temperature, and 0 <= epsilon < 0.5"
        )
    z, on = torch.ops.fastcircuit.hard_concrete.default(log_alpha, seed, temperature, low, high, epsilon, backend)
    return z, on


_LIB = torch.library.Library("fastcircuit", "FRAGMENT")
_LIB.define(
    "hard_concrete(Tensor log_alpha, Tensor seed, float temperature, float low, float high, float epsilon,"
    " str backend) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIB.define(
    "hard_concrete_grad(Tensor grad_z, Tensor grad_on, Tensor z, Tensor on, float temperature, float low, float high,"
    " str backend) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.impl(_LIB, "hard_concrete", "CompositeExplicitAutograd")
def _hard_concrete(
    log_alpha: Tensor, seed: Tensor, temperature: float, low: float, high: float, epsilon: float, backend: str
) -> tuple[Tensor, Tensor]:
    zero_level = temperature * math.log(-low / high)
    run = choose("hard_concrete", backend, log_alpha, seed)
    return run(log_alpha.contiguous(), seed.contiguous(), temperature, low, high, epsilon, zero_level)


@torch.library.register_fake("fastcircuit::hard_concrete", lib=_LIB)
def _hard_concrete_fake(
    log_alpha: Tensor, seed: Tensor, temperature: float, low: float, high: float, epsilon: float, backend: str
) -> tuple[Tensor, Tensor]:
    return log_alpha.new_empty(log_alpha.shape), log_alpha.new_empty(log_alpha.shape)


@torch.library.impl(_LIB, "hard_concrete_grad", "CompositeExplicitAutograd")
def _hard_concrete_grad(
    grad_z: Tensor, grad_on: Tensor, z: Tensor, on: Tensor, temperature: float, low: float, high: float, backend: str
) -> Tensor:
    run = choose("hard_concrete_grad", backend, z)
    return run(grad_z.contiguous(), grad_on.contiguous(), z, on, temperature, low, high)


@torch.library.register_fake("fastcircuit::hard_concrete_grad", lib=_LIB)
def _hard_concrete_grad_fake(
    grad_z: Tensor, grad_on: Tensor, z: Tensor, on: Tensor, temperature: float, low: float, high: float, backend: str
) -> Tensor:
    return z.new_empty(z.shape)


def _save(ctx, inputs, output) -> None:
    _, _, temperature, low, high, _, backend = inputs
    ctx.save_for_backward(*output)
    ctx.constants = (temperature, low, high, backend)


def _backward(ctx, grad_z: Tensor, grad_on: Tensor):
    grad = torch.ops.fastcircuit.hard_concrete_grad.default(grad_z, grad_on, *ctx.saved_tensors, *ctx.constants)
    return grad, None, None, None, None, None, None


def _no_second_derivative(ctx, *grads: Tensor):
    raise InputError("hard_concrete: second derivatives are not implemented; accepted is one backward pass")


torch.library.register_autograd("fastcircuit::hard_concrete", _backward, setup_context=_save, lib=_LIB)
torch.library.register_autograd("fastcircuit::hard_concrete_grad", _no_second_derivative, lib=_LIB)
