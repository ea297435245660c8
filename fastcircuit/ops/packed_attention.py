"""Attention within packed sequences: no padding, rotary positions and grouped keys included."""

import functools

import torch
from torch import Tensor

from fastcircuit.errors import InputError
from fastcircuit.ops.backends import choose, unsupported_reasons
from fastcircuit.ops.eager import plain_eager


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor,
    *,
    scale: float,
    kv_of_head: Tensor | None = None,
    rotary: tuple[Tensor, Tensor] | None = None,
    causal: bool = True,
    window: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Softmax attention of every token to its own sequence: ``out_i = sum_j softmax_j(scale q_i k_j) v_j``.

    Differentiable once in ``query``, ``key`` and ``value``; backward computes the scores again. Sums are kept in at
    least float32. The C++ kernel is made for sequences of up to about a hundred tokens; its work grows with the square
    of the length like anybody's, but it does not block for caches as torch's scaled_dot_product_attention does.

    Args:
        query: ``[H, T, d_head]``.
        key, value: ``[KV, T, d_head]``.
        starts: int64 ``[sequences + 1]`` on the CPU: first token of every sequence, in order, then T.
        scale: factor on the scores.
        kv_of_head: int64 ``[H]`` on the CPU: the key and value head of every head; None: consecutive equal groups.
        rotary: tables ``(cos, sin)``, ``[T, d_rotary]`` each, applied to queries and keys (half-split layout).
        causal: whether a token sees only itself and what comes before.
        window: tokens at least this far away are not seen; None: all are.
        backend: ``"auto"``, or a name from ``fastcircuit.ops.available_backends()``.

    Returns:
        ``[T, H * d_head]`` in the dtype of ``query``.

    Raises:
        InputError: shapes or dtypes do not fit, or the backend asked for by name cannot run them.
    """
    _check(query, key, value, starts)
    if kv_of_head is None:
        kv_of_head = _equal_groups(query.shape[0], key.shape[0])
    run = choose("packed_attention", backend, query, key)
    out: Tensor = run(query, key, value, starts, kv_of_head, rotary, scale, causal, window)
    return out


def runs_packed(query: Tensor, key: Tensor) -> bool:
    """Whether a compiled kernel takes these, and nothing watches the call (see :func:`plain_eager`)."""
    return plain_eager(query) and not unsupported_reasons("packed_attention", "cpu", query, key)


@functools.lru_cache(maxsize=64)
def _equal_groups(heads: int, kv_heads: int) -> Tensor:
    return torch.arange(heads) // max(heads // max(kv_heads, 1), 1)


def _check(query: Tensor, key: Tensor, value: Tensor, starts: Tensor) -> None:
    fits = query.dim() == key.dim() == 3 and key.shape == value.shape and key.shape[1:] == query.shape[1:]
    if not fits:
        raise InputError(
            f"packed_attention: query, key, value have shapes {list(query.shape)}, {list(key.shape)}, "
            f"{list(value.shape)}; accepted are [H, T, d_head], [KV, T, d_head], [KV, T, d_head]"
        )
    if not query.dtype == key.dtype == value.dtype:
        raise InputError(f"packed_attention: dtypes {query.dtype}, {key.dtype}, {value.dtype} differ")
    bounds = starts.tolist()
    if starts.dtype != torch.int64 or bounds[0] != 0 or bounds[-1] != query.shape[1] or bounds != sorted(bounds):
        raise InputError(f"packed_attention: starts is {bounds}; accepted: ascending int64 from 0 to {query.shape[1]}")
