"""The MLP of a block, plain or gated, and the gradient of its input: both products and the activation in one call."""

from typing import NamedTuple

from torch import Tensor

from fastcircuit.errors import InputError
from fastcircuit.ops import extension
from fastcircuit.ops.backends import choose, is_compiled
from fastcircuit.ops.eager import plain_eager

ACTIVATIONS = ("relu", "silu", "gelu", "gelu_tanh")
# Weights that stay in a core's second-level cache, packed: there torch's calls cost more than its products.
SMALL_BYTES = 2**20


class Affine(NamedTuple):
    """``x @ weight + bias``: a weight ``[in, out]`` of any strides, and ``[out]``, or None for no bias."""

    weight: Tensor
    bias: Tensor | None


def mlp(
    x: Tensor,
    gate: Affine | None,
    up: Affine,
    down: Affine,
    activation: str,
    *,
    keep: bool,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """``act(up(x))``, or ``act(gate(x)) * up(x)``, through ``down``; and what :func:`mlp_grad` needs.

    Not differentiable: the masked forward loop is one autograd node and calls :func:`mlp_grad`. Sums are kept in the
    dtype of ``x``, as a matrix product's are. Every number of threads gives the same bits.

    Args:
        x: ``[T, d]``.
        gate, up: weights ``[d, h]``; no gate is the plain form.
        down: weight ``[h, d]``.
        activation: ``relu``, ``silu``, ``gelu`` (with the error function) or ``gelu_tanh``.
        keep: whether the second result is wanted.
        backend: ``"auto"``, or a name from ``fastcircuit.ops.available_backends()``.

    Returns:
        ``[T, d]``, contiguous, in the dtype of ``x``; and the derivatives of the hidden numbers in the results of
        ``gate`` and ``up``, ``[2, T, h]`` (``[1, T, h]`` without a gate), or None.

    Raises:
        InputError: shapes, dtypes or devices do not fit, or the backend asked for by name cannot run them.

    Equivalent to::

        hidden = act(up(x)) if gate is None else act(gate(x)) * up(x)
        down(hidden)
    """
    if activation not in ACTIVATIONS:
        raise InputError(f"mlp: activation is {activation!r}; accepted are {', '.join(ACTIVATIONS)}")
    _check("mlp", x, gate, up, down)
    return choose("mlp", backend, x, up.weight)(x, gate, up, down, activation, keep)


def mlp_grad(
    grad: Tensor, slopes: Tensor, gate: Affine | None, up: Affine, down: Affine, *, backend: str = "auto"
) -> Tensor:
    """The gradient of ``x`` ``[T, d]``, contiguous, from that of the output and what :func:`mlp` kept.

    ``sum_i (grad down^T * slopes[i]) W_i^T`` over ``gate`` and ``up``.

    Args:
        grad: ``[T, d]``.
        slopes: the second result of :func:`mlp`, with as many rows.
        gate, up, down, backend: as given to :func:`mlp`.
    """
    _check("mlp_grad", grad, gate, up, down)
    expected = (1 if gate is None else 2, len(grad), up.weight.shape[1])
    if slopes.shape != expected or slopes.dtype != grad.dtype:
        raise InputError(
            f"mlp_grad: slopes is {slopes.dtype} {list(slopes.shape)}; accepted is {grad.dtype} {list(expected)}"
        )
    return choose("mlp_grad", backend, grad, up.weight)(grad, slopes, gate, up, down)


def runs_compiled(x: Tensor, up: Tensor, backend: str = "auto") -> bool:
    """Whether the C++ kernel is to be taken for ``x`` ``[T, d]`` and a weight ``[d, h]``: the one place that decides.

    Nothing may watch the call (see :func:`plain_eager`), and it must pay. It does for weights of up to SMALL_BYTES
    each, whose products take torch no longer than its calls. Larger ones are products and little else: there the
    kernel is taken where it has AVX-512 and torch has not, whose MKL uses it on Intel's processors only.
    """
    return plain_eager(x) and is_compiled("mlp", backend, x, up) and pays(up)


def pays(up: Tensor) -> bool:
    """Whether the C++ kernel is the faster way for a weight ``[d, h]`` of this shape and dtype."""
    return up.numel() * up.element_size() <= SMALL_BYTES or extension.outruns_mkl()


def _check(op: str, x: Tensor, gate: Affine | None, up: Affine, down: Affine) -> None:
    shape, up_shape = x.shape, up.weight.shape
    if len(shape) != 2 or len(up_shape) != 2 or up_shape[0] != shape[1]:
        raise InputError(f"{op}: x has shape {list(shape)} and up {list(up_shape)}; accepted are [T, d] and [d, h]")
    if gate is not None and gate.weight.shape != up_shape:
        raise InputError(f"{op}: gate has shape {list(gate.weight.shape)}; accepted is that of up, {list(up_shape)}")
    if down.weight.shape != (up_shape[1], shape[1]):
        raise InputError(
            f"{op}: down has shape {list(down.weight.shape)}; accepted is [h, d], {[up_shape[1], shape[1]]}"
        )
    dtype, device = x.dtype, x.device
    for name, part in (("gate", gate), ("up", up), ("down", down)):
        if part is None:
            continue
        weight, bias = part
        if bias is not None and bias.shape != weight.shape[1:]:
            raise InputError(f"{op}: bias of {name} has shape {list(bias.shape)}; accepted is {[weight.shape[1]]}")
        for tensor in part:
            if tensor is not None and (tensor.dtype != dtype or tensor.device != device):
                raise InputError(
                    f"{op}: {name} is {tensor.dtype} on {tensor.device}; accepted is {dtype} on {device}, as x"
                )
