"""Attention within packed sequences: no padding, rotary positions and grouped keys included."""

import functools
import itertools

import torch
from torch import Tensor

from fastcircuit.errors import InputError
from fastcircuit.ops.backends import choose, is_compiled
from fastcircuit.ops.eager import plain_eager


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
    longest = _check_starts(starts, query, longest)
    kv_of_head = _heads_to_kv(kv_of_head, query.shape[0], key.shape[0])
    _check_rotary(rotary, *query.shape[1:])
    if window is not None and window < 1:
        raise InputError(f"packed_attention: window is {window}; accepted: at least 1, or None to see all tokens")
    if alive is not None and (alive.dtype, alive.shape, alive.device) != (torch.int32, query.shape[:1], query.device):
        raise InputError(
            f"packed_attention: alive is {alive.dtype} {list(alive.shape)} on {alive.device}; accepted: int32 "
            f"[{len(query)}] on {query.device}"
        )
    run = choose("packed_attention", backend, query, key, alive)
    out: Tensor = run(query, key, value, starts, longest, kv_of_head, alive, rotary, scale, causal, window)
    return out


def runs_packed(query: Tensor, key: Tensor, alive: Tensor | None = None, backend: str = "auto") -> bool:
    """Whether a compiled kernel takes these, and nothing watches the call (see :func:`plain_eager`)."""
    return plain_eager(query) and is_compiled("packed_attention", backend, query, key, alive)


def _heads_to_kv(given: Tensor | None, heads: int, kv_heads: int) -> Tensor:
    """The key and value head of every head, ``[H]``: checked, as a kernel reads where it points."""
    if given is None:
        if heads and (not kv_heads or heads % kv_heads):
            raise InputError(
                f"packed_attention: {heads} heads do not divide into {kv_heads} equal groups; give kv_of_head"
            )
        return _equal_groups(heads, kv_heads)
    if given.dtype != torch.int64 or given.device.type != "cpu" or given.shape != (heads,):
        raise InputError(
            f"packed_attention: kv_of_head is {given.dtype} {list(given.shape)} on {given.device}; accepted: int64 "
            f"[{heads}] on the CPU"
        )
    outside = [head for head in given.tolist() if not 0 <= head < kv_heads]
    if outside:
        raise InputError(f"packed_attention: kv_of_head holds {outside[0]}; accepted: 0 to {kv_heads - 1}")
    return given


@functools.lru_cache(maxsize=64)
def _equal_groups(heads: int, kv_heads: int) -> Tensor:
    with torch.inference_mode(False):  # kept for later calls, which may be differentiated
        return torch.arange(heads, device="cpu") // max(heads // max(kv_heads, 1), 1)


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
