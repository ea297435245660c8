"""Attention within packed sequences: no padding, rotary positions and grouped keys included."""

import itertools
from typing import Any

import torch
from torch import Tensor

from fastcircuit.errors import InputError
from fastcircuit.ops import triton
from fastcircuit.ops.backends import choose, is_compiled
from fastcircuit.ops.eager import any_requires_grad, plain_eager


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor,
    *,
    scale: float,
    longest: int | None = None,
    kv_of_head: Tensor | None = None,
    alive: Tensor | None = None,
    rotary: tuple[Tensor, Tensor] | None = None,
    causal: bool = True,
    window: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Softmax attention of every token to its own sequence: ``out_i = sum_j softmax_j(scale q_i k_j) v_j``.

    Differentiable once in ``query``, ``key`` and ``value``; backward computes the scores again. Sums are kept in at
    least float32, and every sum has one order. The C++ kernel is made for short sequences (it is taken up to ``SHORT``
    tokens, see :mod:`fastcircuit.models.packing`); its work grows with the square of the length like anybody's, but it
    does not block for caches as torch's scaled_dot_product_attention does. How the Triton kernel compares with that is
    unmeasured.

    Args:
        query: ``[H, T, d_head]``.
        key, value: ``[KV, T, d_head]``.
        starts: int64 ``[sequences + 1]``: first token of every sequence, in order, then T. On the CPU; or, with
            ``longest``, on the device of ``query``, where nobody looks at them.
        scale: factor on the scores.
        longest: no sequence has more tokens; wanted where ``starts`` is not on the CPU.
        kv_of_head: int64 ``[H]`` on the CPU: the key and value head of every head; None: consecutive equal groups.
        alive: int32 ``[H]``, 0 for heads to leave out: their output is 0, and so are their gradients and those of keys
            and values that no other head uses, whatever all of these hold (NaN included). None: no head is left out.
        rotary: tables ``(cos, sin)``, ``[T, d_rotary]`` each, applied to queries and keys (half-split layout).
        causal: whether a token sees only itself and what comes before.
        window: tokens at least this far away are not seen; None: all are.
        backend: ``"auto"``, or a name from ``fastcircuit.ops.available_backends()``.

    Returns:
        ``[T, H * d_head]`` in the dtype of ``query``.

    Raises:
        InputError: shapes or dtypes do not fit, or the backend asked for by name cannot run them.
    """
    _check_operands(query, key, value)
    _check_rotary(rotary, *query.shape[1:])
    if window is not None and window < 1:
        raise InputError(f"packed_attention: window is {window}; accepted: at least 1, or None to see all tokens")
    if alive is not None and (alive.dtype, alive.shape, alive.device) != (torch.int32, query.shape[:1], query.device):
        raise InputError(
            f"packed_attention: alive is {alive.dtype} {list(alive.shape)} on {alive.device}; accepted: int32 "
            f"[{len(query)}] on {query.device}"
        )
    numbers = (scale, causal, window, backend)
    operands = (query, key, value, starts, longest, kv_of_head, alive, *(rotary or (None, None)), *numbers)
    if query.is_meta or not plain_eager(query):
        return torch.ops.fastcircuit.packed_attention.default(*operands)[0]
    if torch.is_grad_enabled() and any_requires_grad(query, key, value):
        return _PackedAttention.apply(*operands)
    return _forward(*_prepared(*operands))[0]


def runs_packed(query: Tensor, key: Tensor, alive: Tensor | None = None, backend: str = "auto") -> bool:
    """Whether a compiled kernel takes these, and nothing watches the call (see :func:`plain_eager`)."""
    return plain_eager(query) and is_compiled("packed_attention", backend, query, key, alive)


def _prepared(query, key, value, starts, longest, kv_of_head, alive, cos, sin, *numbers):
    """The operands in one piece each, on one device; what kernels follow without a question of theirs is checked.

    A compiler cannot look at what ``starts`` and ``kv_of_head`` hold: the op does, at every call.
    """
    longest = _check_starts(starts, query, longest)
    kv_of_head = _check_kv_of_head(kv_of_head, query.shape[0], key.shape[0])
    if kv_of_head is not None:
        kv_of_head = kv_of_head.to(query.device)
    if cos is not None:
        cos, sin = cos.to(query.dtype).contiguous(), sin.to(query.dtype).contiguous()
    query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    return query, key, value, starts.to(query.device).contiguous(), longest, kv_of_head, alive, cos, sin, *numbers


def _check_kv_of_head(given: Tensor | None, heads: int, kv_heads: int) -> Tensor | None:
    """The key and value head of every head, ``[H]``; None: consecutive equal groups."""
    equal = not heads or (kv_heads > 0 and heads % kv_heads == 0)
    if given is None:
        if not equal:
            raise InputError(
                f"packed_attention: {heads} heads do not divide into {kv_heads} equal groups; give kv_of_head"
            )
        return None
    if given.dtype != torch.int64 or given.device.type != "cpu" or given.shape != (heads,):
        raise InputError(
            f"packed_attention: kv_of_head is {given.dtype} {list(given.shape)} on {given.device}; accepted: int64 "
            f"[{heads}] on the CPU"
        )
    kv_of_head = given.tolist()
    outside = [head for head in kv_of_head if not 0 <= head < kv_heads]
    if outside:
        raise InputError(f"packed_attention: kv_of_head holds {outside[0]}; accepted: 0 to {kv_heads - 1}")
    return None if equal and kv_of_head == [head * kv_heads // heads for head in range(heads)] else given.contiguous()


def _check_operands(query: Tensor, key: Tensor, value: Tensor) -> None:
    fits = query.dim() == key.dim() == 3 and key.shape == value.shape and key.shape[1:] == query.shape[1:]
    if not fits:
        raise InputError(
            f"packed_attention: query, key, value have shapes {list(query.shape)}, {list(key.shape)}, "
            f"{list(value.shape)}; accepted are [H, T, d_head], [KV, T, d_head], [KV, T, d_head]"
        )
    if not query.dtype == key.dtype == value.dtype:
        raise InputError(f"packed_attention: dtypes {query.dtype}, {key.dtype}, {value.dtype} differ")


def _check_starts(starts: Tensor, query: Tensor, longest: int | None) -> int:
    """The tokens of the longest sequence; of starts on a device, what was said to be no less."""
    tokens = query.shape[1]
    on_device = starts.device.type != "cpu" and starts.device == query.device
    if on_device and longest is not None and starts.dtype == torch.int64 and starts.dim() == 1:
        return longest
    bounds = starts.tolist()
    ascends = starts.dim() == 1 and bounds == sorted(bounds) and bounds[:1] == [0] and bounds[-1] == tokens
    if starts.dtype != torch.int64 or starts.device.type != "cpu" or not ascends:
        raise InputError(
            f"packed_attention: starts is {starts.dtype} {bounds} on {starts.device}; accepted: ascending int64 from 0 "
            f"to {tokens} on the CPU (with longest, on the device of query)"
        )
    return max((last - first for first, last in itertools.pairwise(bounds)), default=0)


def _check_rotary(rotary: tuple[Tensor, Tensor] | None, tokens: int, width: int) -> None:
    if rotary is None:
        return
    cos, sin = (list(table.shape) for table in rotary)
    if not (cos == sin and len(cos) == 2 and cos[0] == tokens and cos[1] <= width and cos[1] % 2 == 0):
        raise InputError(
            f"packed_attention: rotary tables have shapes {cos} and {sin}; accepted: [{tokens}, d_rotary] both, "
            f"d_rotary even and at most {width}"
        )


_LIB = torch.library.Library("fastcircuit", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)
_OPERANDS = (
    "Tensor query, Tensor key, Tensor value, Tensor starts, int? longest, Tensor? kv_of_head, Tensor? alive,"
    " Tensor? cos, Tensor? sin, float scale, bool causal, int? window, str backend"
)
_LIB.define(f"packed_attention({_OPERANDS}) -> (Tensor, Tensor)", tags=_TAGS)
_LIB.define(
    f"packed_attention_grads(Tensor grad, Tensor? out, Tensor? lse, {_OPERANDS}) -> (Tensor, Tensor, Tensor)",
    tags=_TAGS,
)


def _forward(query, key, value, starts, longest, kv_of_head, alive, *others):
    """The result and, if backward starts from it, the logarithm of each head's and token's sum of weights, ``[H, T]``.

    Backward gets both back where there is the second, and makes everything again where it is None.
    """
    *numbers, backend = others
    run = choose("packed_attention", backend, query, key, alive)
    return run(query, key, value, starts, longest, kv_of_head, alive, *numbers)


def _grads(grad, out, lse, query, key, value, starts, longest, kv_of_head, alive, *others):
    *numbers, backend = others
    run = choose("packed_attention_grads", backend, query, key, alive)
    return run(grad.contiguous(), out, lse, query, key, value, starts, longest, kv_of_head, alive, *numbers)


@torch.library.impl(_LIB, "packed_attention", "CompositeExplicitAutograd")
def _packed_attention(query, *others):
    out, lse = _forward(*_prepared(query, *others))
    return out, query.new_empty(0) if lse is None else lse


@torch.library.register_fake("fastcircuit::packed_attention", lib=_LIB)
def _packed_attention_fake(query, key, value, starts, longest, kv_of_head, alive, *rest):
    heads, tokens, width = query.shape
    out, lse = query.new_empty(tokens, heads * width), query.new_empty(0)
    if choose("packed_attention", rest[-1], query, key, alive) is triton.packed_attention:
        wide = torch.float64 if query.dtype == torch.float64 else torch.float32
        lse = query.new_empty(heads, tokens, dtype=wide)
    return out, lse


@torch.library.impl(_LIB, "packed_attention_grads", "CompositeExplicitAutograd")
def _packed_attention_grads(grad, out, lse, *operands):
    return _grads(grad, out, lse, *_prepared(*operands))


@torch.library.register_fake("fastcircuit::packed_attention_grads", lib=_LIB)
def _packed_attention_grads_fake(grad, out, lse, query, key, value, *rest):
    return tuple(operand.new_empty(operand.shape) for operand in (query, key, value))


def _save(ctx, inputs, output) -> None:
    query, key, value, starts, ctx.longest, kv_of_head, alive, cos, sin, *ctx.numbers = inputs
    out, lse = output
    if lse is None or lse.dim() < 2:
        out = lse = None
    ctx.save_for_backward(out, lse, query, key, value, starts, kv_of_head, alive, cos, sin)


def _backward(ctx, grad: Tensor, *_: Tensor, direct: bool = False):
    """The gradients of all operands; ``direct``: they are prepared, and nothing watches."""
    out, lse, query, key, value, starts, *tensors = ctx.saved_tensors
    operands = (query, key, value, starts, ctx.longest, *tensors, *ctx.numbers)
    run = _grads if direct else torch.ops.fastcircuit.packed_attention_grads.default
    return *run(grad, out, lse, *operands), *(None,) * (len(operands) - 3)


class _PackedAttention(torch.autograd.Function):
    """The op's autograd without torch.library around it, which costs more than the kernel on a small model."""

    @staticmethod
    def forward(ctx, *operands: Any) -> Tensor:
        operands = _prepared(*operands)
        output = _forward(*operands)
        _save(ctx, operands, output)
        return output[0]

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _backward(ctx, grad, direct=plain_eager(grad) and not torch.is_grad_enabled())


def _no_second_derivative(ctx, *grads: Tensor):
    raise InputError("packed_attention: second derivatives are not implemented; accepted is one backward pass")


torch.library.register_autograd("fastcircuit::packed_attention", _backward, setup_context=_save, lib=_LIB)
torch.library.register_autograd("fastcircuit::packed_attention_grads", _no_second_derivative, lib=_LIB)
