"""A matrix product for every group that is alive, as flags on the device say; nothing is computed for the others."""

import torch
from torch import Tensor

from fastcircuit.errors import InputError
from fastcircuit.ops import triton
from fastcircuit.ops.backends import choose

# FLOPs for which a GPU moves a byte, by what multiplies: the dense peak rates of an H100 (989, 495, 165 and 67 TFLOP/s)
# over its 3.35 TB/s. See :func:`pays`.
FLOPS_PER_BYTE = {"half": 295.0, "tf32": 148.0, "tf32x3": 49.0, "ieee": 20.0, "float64": 0.0}


def live_product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    alive: Tensor,
    *,
    zeros: bool = True,
    backend: str = "auto",
) -> Tensor:
    """``out[g] = x[g] @ weight[g] + bias[g]`` for the groups with ``alive[g] != 0``.

    Differentiable in ``x``: its gradient is the same product of ``grad`` and ``weight^T``, of live groups alone. Sums
    are kept in at least float32 and rounded once; a group's bits do not depend on which others are alive.

    Args:
        x: ``[G, M, K]``.
        weight: ``[G, K, N]``, any strides, without gradient.
        bias: ``[G, 1, N]`` without gradient, or None.
        alive: int32 ``[G]`` on the device of ``x``. What the operands of the other groups hold does not matter.
        zeros: whether results and gradients of the other groups are 0; if not, they may hold anything, and nothing is
            written.
        backend: ``"auto"``, or a name from ``fastcircuit.ops.available_backends()``.

    Returns:
        ``[G, M, N]`` in the dtype of ``x``.

    Raises:
        InputError: shapes, dtypes or devices do not fit, ``weight`` or ``bias`` requires grad, or the backend asked for
            by name cannot run them.

    Equivalent to::

        torch.where(alive[:, None, None] != 0, x @ weight + bias, 0)
    """
    _check("live_product", x, weight, bias, alive)
    return torch.ops.fastcircuit.live_product.default(x, weight, bias, alive, zeros, backend)


def live_product_(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    alive: Tensor,
    *,
    zeros: bool = True,
    backend: str = "auto",
) -> None:
    """:func:`live_product` written into ``out`` ``[G, M, N]``, whose rows are contiguous; not differentiable.

    Without ``zeros`` the groups that are not alive stay as they are.
    """
    _check("live_product_", x, weight, bias, alive)
    shape = (*x.shape[:2], weight.shape[2])
    if out.shape != shape or out.dtype != x.dtype or out.device != x.device or (out.stride(2) != 1 and shape[2] > 1):
        raise InputError(
            f"live_product_: out is {out.dtype} {list(out.shape)} with strides {list(out.stride())} on {out.device}; "
            f"accepted is {x.dtype} {list(shape)} with contiguous rows on {x.device}"
        )
    torch.ops.fastcircuit.live_product_.default(out, x, weight, bias, alive, zeros, backend)


def pays(x: Tensor, weight: Tensor) -> bool:
    """Whether ``x @ weight`` should ask which groups are alive, by shapes and dtype alone; otherwise torch's is to run.

    It should where a group's product waits for memory: there a kernel that multiplies more slowly than the vendor's
    loses little while the group is alive, and saves all of it afterwards. So do the projections of heads (GPT-2 small
    with 2048 tokens: 57 FLOPs per byte in half precision; a 13B Llama with 256: 84), and an MLP with few tokens, which
    waits for its weights (that Llama's: 240). GPT-2 small's MLP with 2048 tokens (473) does not: every MLP is alive as
    a run begins, and a slower product would be paid from its first step on.

    Reckoned, not measured on a GPU: ``bench/test_gpu.py`` times both sides, ``MaskedCausalLM.gated`` overrides it.
    """
    (_, rows, inner), columns = x.shape, weight.shape[2]
    numbers = rows * inner + inner * columns + rows * columns
    kind = {torch.float32: triton.float32_precision(), torch.float64: "float64"}.get(x.dtype, "half")
    return 2 * rows * inner * columns < FLOPS_PER_BYTE[kind] * numbers * x.element_size()


def _check(op: str, x: Tensor, weight: Tensor, bias: Tensor | None, alive: Tensor) -> None:
    if x.dim() != 3 or weight.dim() != 3 or weight.shape[:2] != (x.shape[0], x.shape[2]):
        raise InputError(
            f"{op}: x has shape {list(x.shape)} and weight {list(weight.shape)}; accepted are [G, M, K] and [G, K, N]"
        )
    if bias is not None and bias.shape != (len(weight), 1, weight.shape[2]):
        raise InputError(
            f"{op}: bias has shape {list(bias.shape)}; accepted is {[len(weight), 1, weight.shape[2]]}, or None"
        )
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.dtype != x.dtype or tensor.device != x.device:
            raise InputError(
                f"{op}: {name} is {tensor.dtype} on {tensor.device}; accepted is {x.dtype} on {x.device}, as x"
            )
        if torch.is_grad_enabled() and tensor.requires_grad:
            raise InputError(f"{op}: {name} requires grad; only x has a gradient")
    if (alive.dtype, alive.shape, alive.device) != (torch.int32, x.shape[:1], x.device):
        raise InputError(
            f"{op}: alive is {alive.dtype} {list(alive.shape)} on {alive.device}; accepted is int32 {[len(x)]} on "
            f"{x.device}, as x"
        )


_LIB = torch.library.Library("fastcircuit", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)
_OPERANDS = "Tensor x, Tensor weight, Tensor? bias, Tensor alive, bool zeros, str backend"
_LIB.define(f"live_product({_OPERANDS}) -> Tensor", tags=_TAGS)
_LIB.define(f"live_product_(Tensor(a!) out, {_OPERANDS}) -> ()", tags=_TAGS)


@torch.library.impl(_LIB, "live_product", "CompositeExplicitAutograd")
def _live_product(x: Tensor, weight: Tensor, bias: Tensor | None, alive: Tensor, zeros: bool, backend: str) -> Tensor:
    out = x.new_empty(*x.shape[:2], weight.shape[2])
    _live_product_(out, x, weight, bias, alive, zeros, backend)
    return out


@torch.library.register_fake("fastcircuit::live_product", lib=_LIB)
def _live_product_fake(x, weight, bias, alive, zeros, backend):
    return x.new_empty(*x.shape[:2], weight.shape[2])


@torch.library.impl(_LIB, "live_product_", "CompositeExplicitAutograd")
def _live_product_(
    out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, alive: Tensor, zeros: bool, backend: str
) -> None:
    choose("live_product_", backend, x, weight)(out, x, weight, bias, alive, zeros)


@torch.library.register_fake("fastcircuit::live_product_", lib=_LIB)
def _live_product_fake_(out, x, weight, bias, alive, zeros, backend):
    return None


def _save(ctx, inputs, output) -> None:
    _, weight, _, alive, ctx.zeros, ctx.backend = inputs
    ctx.save_for_backward(weight, alive)


def _backward(ctx, grad: Tensor):
    weight, alive = ctx.saved_tensors
    grad_x = torch.ops.fastcircuit.live_product.default(
        grad, weight.transpose(1, 2), None, alive, ctx.zeros, ctx.backend
    )
    return grad_x, *(None,) * 5


torch.library.register_autograd("fastcircuit::live_product", _backward, setup_context=_save, lib=_LIB)
