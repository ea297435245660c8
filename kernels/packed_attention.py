"""Triton kernels of packed_attention: softmax attention within sequences that lie one after the other.

A program owns some tokens of one sequence, and walks over the tokens of that sequence that they see, or that see them.
So nothing crosses from one sequence to another, NaN included. Scores are never in memory: backward makes them again
from the logarithm of their sum. The gradient of a key is added up by the one program that owns it, head after head of
its group: there are no atomics, and the same inputs always give the same bits.

The programs of a head whose flag in ``alive`` is 0 write zeros and end. The tiles were chosen by what compilers report
(registers, spills, shared memory); none was timed.
"""

import torch
import triton
import triton.language as tl
from fastcircuit_kernels.dot import dot, narrow

# Tokens of a program and of a step, warps and pipeline stages, by the size of a number in bytes; half as many tokens of
# heads wider than 64, whose gradients would not fit into registers.
TILES = {2: (64, 4, 2), 4: (32, 4, 2), 8: (16, 4, 1)}


@triton.jit
def _turned(p_x, p_cos, p_sin, o_t, m_t, o_d, D, ROTARY: tl.constexpr, ACC: tl.constexpr):
    """x[BT, BD], of which the first ROTARY columns are turned by their token's angles, in the half-split layout."""
    m = m_t[:, None] & (o_d < D)[None, :]
    b_x = tl.load(p_x + o_t[:, None] * D + o_d[None, :], mask=m, other=0.0)
    if ROTARY > 0:
        dtype = p_x.dtype.element_ty
        m_turn = m & (o_d < ROTARY)[None, :]
        o_pair = tl.where(o_d < ROTARY // 2, o_d + ROTARY // 2, o_d - ROTARY // 2)
        b_pair = tl.load(p_x + o_t[:, None] * D + o_pair[None, :], mask=m_turn, other=0.0).to(ACC)
        p_angle = o_t[:, None] * ROTARY + o_d[None, :]
        b_cos = tl.load(p_cos + p_angle, mask=m_turn, other=1.0).to(ACC)
        b_sin = tl.load(p_sin + p_angle, mask=m_turn, other=0.0).to(ACC)
        b_sin = tl.where((o_d < ROTARY // 2)[None, :], -b_sin, b_sin)
        b_x = narrow(b_x.to(ACC) * b_cos + b_pair * b_sin, dtype)
    return b_x


@triton.jit
def _store_turned_back(p_x, b_g, p_cos, p_sin, o_t, m_t, o_d, D, ROTARY: tl.constexpr, ACC: tl.constexpr):
    """Store the gradient of x, given that of what ``_turned`` makes of it."""
    dtype = p_x.dtype.element_ty
    p_tile = p_x + o_t[:, None] * D + o_d[None, :]
    m = m_t[:, None] & (o_d < D)[None, :]
    tl.store(p_tile, narrow(b_g, dtype), mask=m)
    if ROTARY > 0:
        m_turn = m & (o_d < ROTARY)[None, :]
        o_pair = tl.where(o_d < ROTARY // 2, o_d + ROTARY // 2, o_d - ROTARY // 2)
        tl.debug_barrier()  # other threads of the program wrote what is read now
        b_pair = tl.load(p_x + o_t[:, None] * D + o_pair[None, :], mask=m_turn, other=0.0).to(ACC)
        b_cos = tl.load(p_cos + o_t[:, None] * ROTARY + o_d[None, :], mask=m_turn, other=1.0).to(ACC)
        b_sin = tl.load(p_sin + o_t[:, None] * ROTARY + o_pair[None, :], mask=m_turn, other=0.0).to(ACC)
        b_sin = tl.where((o_d < ROTARY // 2)[None, :], b_sin, -b_sin)
        tl.debug_barrier()  # and have read what is overwritten now
        tl.store(p_tile, narrow(b_g * b_cos + b_pair * b_sin, dtype), mask=m_turn)


@triton.jit
def _seen(o_q, m_q, o_k, m_k, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """Which queries see which keys, ``[BM, BN]``."""
    b_distance = o_q[:, None] - o_k[None, :]
    b_seen = m_q[:, None] & m_k[None, :]
    if CAUSAL:
        b_seen &= b_distance >= 0
    if WINDOW > 0:
        b_seen &= (b_distance < WINDOW) & (b_distance > -WINDOW)
    return b_seen


@triton.jit
def _tokens(p_starts, BLOCKS, BT: tl.constexpr):
    """The program's first token, and the first and last of its sequence."""
    i_s, i_b = tl.program_id(0).to(tl.int64) // BLOCKS, tl.program_id(0) % BLOCKS
    first = tl.load(p_starts + i_s).to(tl.int32)
    last = tl.load(p_starts + i_s + 1).to(tl.int32)
    return first + i_b * BT, first, last


@triton.jit
def _keys_seen(start, first, last, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BT: tl.constexpr):
    """The first and last key that queries from ``start`` on see."""
    low, high = first, last
    if CAUSAL:
        high = tl.minimum(last, start + BT)
    if WINDOW > 0:
        low = tl.maximum(first, start - WINDOW + 1)
        high = tl.minimum(high, start + BT + WINDOW - 1)
    return low, high


@triton.jit
def attention(
    p_q, p_k, p_v, p_starts, p_kv_head, p_alive, p_cos, p_sin, p_out, p_lse, T, D, GROUP, BLOCKS,
    SCALE: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, ROTARY: tl.constexpr, GROUPED: tl.constexpr,
    ALIVE: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """out[T, H * D] = softmax(SCALE q k^T) v within sequences, lse[H, T] = ln sum exp(SCALE q k^T)."""
    i_h, heads = tl.program_id(1).to(tl.int64), tl.num_programs(1).to(tl.int64)
    start, first, last = _tokens(p_starts, BLOCKS, BT)
    if start >= last:
        return
    o_q, o_d = (start + tl.arange(0, BT)).to(tl.int64), tl.arange(0, BD).to(tl.int64)
    m_q = o_q < last
    m_out = m_q[:, None] & (o_d < D)[None, :]
    p_tile = p_out + (o_q[:, None] * heads + i_h) * D + o_d[None, :]
    alive = 1
    if ALIVE:
        alive = tl.load(p_alive + i_h)
    if alive == 0:
        tl.store(p_tile, tl.zeros([BT, BD], dtype=p_out.dtype.element_ty), mask=m_out)
        return
    i_kv = i_h // GROUP
    if not GROUPED:
        i_kv = tl.load(p_kv_head + i_h)
    b_q = _turned(p_q + i_h * T * D, p_cos, p_sin, o_q, m_q, o_d, D, ROTARY, ACC)  # [BT, BD]
    b_most = tl.full([BT], float("-inf"), dtype=ACC)
    b_sum = tl.zeros([BT], dtype=ACC)
    b_acc = tl.zeros([BT, BD], dtype=ACC)
    low, high = _keys_seen(start, first, last, CAUSAL, WINDOW, BT)
    for k in range(low, high, BT):
        o_k = (k + tl.arange(0, BT)).to(tl.int64)
        m_k = o_k < high
        b_k = _turned(p_k + i_kv * T * D, p_cos, p_sin, o_k, m_k, o_d, D, ROTARY, ACC)  # [BT, BD]
        p_rows = p_v + (i_kv * T + o_k[:, None]) * D + o_d[None, :]
        b_v = tl.load(p_rows, mask=m_k[:, None] & (o_d < D)[None, :], other=0.0)  # [BT, BD]
        b_s = dot(b_q, tl.trans(b_k), tl.zeros([BT, BT], dtype=ACC), PRECISION) * SCALE
        b_s = tl.where(_seen(o_q, m_q, o_k, m_k, CAUSAL, WINDOW), b_s, float("-inf"))
        b_new = tl.maximum(b_most, tl.max(b_s, axis=1))
        b_level = tl.where(b_new == float("-inf"), 0, b_new)
        b_p = tl.exp(b_s - b_level[:, None])
        b_fade = tl.exp(b_most - b_level)
        b_sum = b_sum * b_fade + tl.sum(b_p, axis=1)
        b_acc = dot(narrow(b_p, b_v.dtype), b_v, b_acc * b_fade[:, None], PRECISION)
        b_most = b_new
    b_sum = tl.where(m_q, b_sum, 1)
    tl.store(p_tile, narrow(b_acc / b_sum[:, None], p_out.dtype.element_ty), mask=m_out)
    tl.store(p_lse + i_h * T + o_q, b_most + tl.log(b_sum), mask=m_q)


@triton.jit
def query_gradient(
    p_q, p_k, p_v, p_starts, p_kv_head, p_alive, p_cos, p_sin, p_out, p_lse, p_go, p_along, p_gq, T, D, GROUP, BLOCKS,
    SCALE: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, ROTARY: tl.constexpr, GROUPED: tl.constexpr,
    ALIVE: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """gq[H, T, D] from the gradient go of out, and along[H, T] = <go, out> of every query."""
    i_h, heads = tl.program_id(1).to(tl.int64), tl.num_programs(1).to(tl.int64)
    start, first, last = _tokens(p_starts, BLOCKS, BT)
    if start >= last:
        return
    o_q, o_d = (start + tl.arange(0, BT)).to(tl.int64), tl.arange(0, BD).to(tl.int64)
    m_q = o_q < last
    m_tile = m_q[:, None] & (o_d < D)[None, :]
    alive = 1
    if ALIVE:
        alive = tl.load(p_alive + i_h)
    if alive == 0:
        b_zero = tl.zeros([BT, BD], dtype=p_gq.dtype.element_ty)
        tl.store(p_gq + (i_h * T + o_q[:, None]) * D + o_d[None, :], b_zero, mask=m_tile)
        return
    i_kv = i_h // GROUP
    if not GROUPED:
        i_kv = tl.load(p_kv_head + i_h)
    o_out = (o_q[:, None] * heads + i_h) * D + o_d[None, :]
    b_go = tl.load(p_go + o_out, mask=m_tile, other=0.0)  # [BT, BD]
    b_along = tl.sum(b_go.to(ACC) * tl.load(p_out + o_out, mask=m_tile, other=0.0).to(ACC), axis=1)
    tl.store(p_along + i_h * T + o_q, b_along, mask=m_q)
    b_lse = tl.load(p_lse + i_h * T + o_q, mask=m_q, other=0.0)
    b_q = _turned(p_q + i_h * T * D, p_cos, p_sin, o_q, m_q, o_d, D, ROTARY, ACC)  # [BT, BD]
    b_gq = tl.zeros([BT, BD], dtype=ACC)
    low, high = _keys_seen(start, first, last, CAUSAL, WINDOW, BT)
    for k in range(low, high, BT):
        o_k = (k + tl.arange(0, BT)).to(tl.int64)
        m_k = o_k < high
        b_k = _turned(p_k + i_kv * T * D, p_cos, p_sin, o_k, m_k, o_d, D, ROTARY, ACC)  # [BT, BD]
        p_rows = p_v + (i_kv * T + o_k[:, None]) * D + o_d[None, :]
        b_v = tl.load(p_rows, mask=m_k[:, None] & (o_d < D)[None, :], other=0.0)  # [BT, BD]
        b_s = dot(b_q, tl.trans(b_k), tl.zeros([BT, BT], dtype=ACC), PRECISION) * SCALE
        b_gp = dot(b_go, tl.trans(b_v), tl.zeros([BT, BT], dtype=ACC), PRECISION)
        b_gs = tl.exp(b_s - b_lse[:, None]) * (b_gp - b_along[:, None]) * SCALE
        b_gs = tl.where(_seen(o_q, m_q, o_k, m_k, CAUSAL, WINDOW), b_gs, 0)
        b_gq = dot(narrow(b_gs, b_k.dtype), b_k, b_gq, PRECISION)
    _store_turned_back(p_gq + i_h * T * D, b_gq, p_cos, p_sin, o_q, m_q, o_d, D, ROTARY, ACC)


@triton.jit
def key_gradients(
    p_q, p_k, p_v, p_starts, p_kv_head, p_alive, p_cos, p_sin, p_lse, p_go, p_along, p_gk, p_gv,
    H, T, D, GROUP, BLOCKS,
    SCALE: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, ROTARY: tl.constexpr, GROUPED: tl.constexpr,
    ALIVE: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """gk[KV, T, D] and gv[KV, T, D] from the gradient go of out and what :func:`query_gradient` left."""
    i_kv = tl.program_id(1).to(tl.int64)
    start, first, last = _tokens(p_starts, BLOCKS, BT)
    if start >= last:
        return
    o_k, o_d = (start + tl.arange(0, BT)).to(tl.int64), tl.arange(0, BD).to(tl.int64)
    m_k, m_d = o_k < last, o_d < D
    p_rows = (i_kv * T + o_k[:, None]) * D + o_d[None, :]
    b_k = _turned(p_k + i_kv * T * D, p_cos, p_sin, o_k, m_k, o_d, D, ROTARY, ACC)  # [BT, BD]
    b_v = tl.load(p_v + p_rows, mask=m_k[:, None] & m_d[None, :], other=0.0)  # [BT, BD]
    b_gk = tl.zeros([BT, BD], dtype=ACC)
    b_gv = tl.zeros([BT, BD], dtype=ACC)
    low, high = first, last
    if WINDOW > 0:
        low, high = tl.maximum(first, start - WINDOW + 1), tl.minimum(last, start + BT + WINDOW - 1)
    if CAUSAL:
        low = start
    n_heads = GROUP
    if not GROUPED:
        n_heads = H
    for g in range(n_heads):
        i_h, until = i_kv * GROUP + g, high
        if not GROUPED:
            i_h = g + i_kv * 0
            until = tl.where(tl.load(p_kv_head + i_h) == i_kv, until, low)
        if ALIVE:
            until = tl.where(tl.load(p_alive + i_h) != 0, until, low)
        for q in range(low, until, BT):
            o_q = (q + tl.arange(0, BT)).to(tl.int64)
            m_q = o_q < high
            b_q = _turned(p_q + i_h * T * D, p_cos, p_sin, o_q, m_q, o_d, D, ROTARY, ACC)  # [BT, BD]
            p_out = p_go + (o_q[:, None] * H + i_h) * D + o_d[None, :]
            b_go = tl.load(p_out, mask=m_q[:, None] & m_d[None, :], other=0.0)  # [BT, BD]
            b_lse = tl.load(p_lse + i_h * T + o_q, mask=m_q, other=0.0)
            b_along = tl.load(p_along + i_h * T + o_q, mask=m_q, other=0.0)
            b_seen = _seen(o_q, m_q, o_k, m_k, CAUSAL, WINDOW)
            b_s = dot(b_q, tl.trans(b_k), tl.zeros([BT, BT], dtype=ACC), PRECISION) * SCALE
            b_p = tl.where(b_seen, tl.exp(b_s - b_lse[:, None]), 0)
            b_gv = dot(tl.trans(narrow(b_p, b_go.dtype)), b_go, b_gv, PRECISION)
            b_gp = dot(b_go, tl.trans(b_v), tl.zeros([BT, BT], dtype=ACC), PRECISION)
            b_gs = tl.where(b_seen, b_p * (b_gp - b_along[:, None]) * SCALE, 0)
            b_gk = dot(tl.trans(narrow(b_gs, b_q.dtype)), b_q, b_gk, PRECISION)
    tl.store(p_gv + p_rows, narrow(b_gv, p_gv.dtype.element_ty), mask=m_k[:, None] & m_d[None, :])
    _store_turned_back(p_gk + i_kv * T * D, b_gk, p_cos, p_sin, o_k, m_k, o_d, D, ROTARY, ACC)


class Call:
    """What forward and backward launch alike.

    Args:
        query, key: ``[H, T, d_head]`` and ``[KV, T, d_head]``, contiguous, as the values are.
        starts: int64 ``[sequences + 1]`` on the device.
        longest: tokens of the longest sequence.
        kv_of_head: int64 ``[H]`` on the device; None: consecutive equal groups.
        alive: int32 ``[H]``, 0 for heads to leave out; None: none.
        rotary: ``(cos, sin)``, ``[T, d_rotary]`` each, in the dtype of ``query`` and contiguous.
    """

    def __init__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        starts: torch.Tensor,
        longest: int,
        kv_of_head: torch.Tensor | None,
        alive: torch.Tensor | None,
        rotary: tuple[torch.Tensor, torch.Tensor] | None,
        scale: float,
        causal: bool,
        window: int | None,
        precision: str,
    ) -> None:
        (self.heads, self.tokens, width), self.kv_heads = query.shape, key.shape[0]
        most, num_warps, num_stages = TILES[query.element_size()]
        columns = max(16, triton.next_power_of_2(width))
        tile = max(16, min(most if columns <= 64 else most // 2, triton.next_power_of_2(longest)))
        self.blocks = triton.cdiv(longest, tile)
        self.programs = (len(starts) - 1) * self.blocks
        self.wide = torch.float64 if query.dtype == torch.float64 else torch.float32
        self.operands = (starts, kv_of_head, alive, *(rotary or (None, None)))
        self.sizes = (self.tokens, width, max(self.heads // max(self.kv_heads, 1), 1), self.blocks)
        self.options = {
            "SCALE": scale,
            "CAUSAL": causal,
            "WINDOW": 0 if window is None or window >= longest else window,
            "ROTARY": 0 if rotary is None else rotary[0].shape[1],
            "GROUPED": kv_of_head is None,
            "ALIVE": alive is not None,
            "PRECISION": precision if query.dtype == torch.float32 else "ieee",
            "ACC": tl.float64 if query.dtype == torch.float64 else tl.float32,
            "BT": tile,
            "BD": columns,
            "num_warps": num_warps,
            "num_stages": 1 if torch.version.hip else num_stages,
        }

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``[T, H * d_head]``, and the logarithms of the sums, ``[H, T]``."""
        out = query.new_empty(self.tokens, self.heads * query.shape[2])
        lse = query.new_empty(self.heads, self.tokens, dtype=self.wide)
        if out.numel():
            attention[(self.programs, self.heads)](
                query, key, value, *self.operands, out, lse, *self.sizes, **self.options
            )
        return out, lse

    def backward(
        self,
        grad: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The gradients of query, key and value, given the contiguous one of ``out``."""
        grads, along = tuple(torch.empty_like(tensor) for tensor in (query, key, value)), torch.empty_like(lse)
        if out.numel():
            query_gradient[(self.programs, self.heads)](
                query, key, value, *self.operands, out, lse, grad, along, grads[0], *self.sizes, **self.options
            )
            key_gradients[(self.programs, self.kv_heads)](
                query, key, value, *self.operands, lse, grad, along, *grads[1:], self.heads, *self.sizes,
                **self.options,
            )  # fmt: skip
        return grads
