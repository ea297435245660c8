"""Triton kernels of answer_kl: unembedding and divergence by blocks of the vocabulary, and the logits' gradient.

A program reads one block of the unembedding once and makes its logits in registers. What a block contributes is five
numbers per row; a second kernel adds the blocks up in order.
"""

import torch
import triton
import triton.language as tl
from fastcircuit_kernels.dot import dot, narrow

# Rows and words of a program, summed numbers per step, warps and pipeline stages, by the size of a number in bytes.
TILES = {2: (32, 128, 64, 4, 3), 4: (32, 128, 16, 4, 3), 8: (16, 32, 16, 4, 1)}
FIELDS = 5


@triton.jit
def _logits(
    p_h, p_w, o_n, o_v, m_n, m_v, D, stride_h, stride_w,
    PRECISION: tl.constexpr, ACC: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """hidden @ weight^T for a block of rows and words, -inf beyond the vocabulary."""
    b_acc = tl.zeros([BM, BV], dtype=ACC)
    for k in range(0, D, BK):
        o_k = (k + tl.arange(0, BK)).to(tl.int64)
        m_k = o_k < D
        p_rows, p_words = p_h + o_n[:, None] * stride_h + o_k[None, :], p_w + o_k[:, None] + o_v[None, :] * stride_w
        b_h = tl.load(p_rows, mask=m_n[:, None] & m_k[None, :], other=0.0)  # [BM, BK]
        b_w = tl.load(p_words, mask=m_k[:, None] & m_v[None, :], other=0.0)  # [BK, BV]
        b_acc = dot(b_h, b_w, b_acc, PRECISION)
    return tl.where(m_v[None, :], b_acc, float("-inf"))


@triton.jit
def block_sums(
    p_h, p_w, p_reference, p_partial, N, V, D, stride_h, stride_w, stride_reference,
    PRECISION: tl.constexpr, ACC: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """partial[5, blocks, N]: the largest logit m, sums of exp(logit - m), p ln p, p (logit - m) and p."""
    i_v, i_n = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    o_v, o_n = i_v * BV + tl.arange(0, BV), i_n * BM + tl.arange(0, BM)
    m_v, m_n = o_v < V, o_n < N
    b_logit = _logits(p_h, p_w, o_n, o_v, m_n, m_v, D, stride_h, stride_w, PRECISION, ACC, BM, BK, BV)
    p_log_p = p_reference + o_n[:, None] * stride_reference + o_v[None, :]
    b_log_p = tl.load(p_log_p, mask=m_n[:, None] & m_v[None, :], other=float("-inf")).to(ACC)  # [BM, BV]
    b_p = tl.exp(b_log_p)
    b_most = tl.max(b_logit, axis=1)
    b_below = b_logit - b_most[:, None]
    blocks = tl.num_programs(0).to(tl.int64)
    p_out = p_partial + i_v * N + o_n
    tl.store(p_out, b_most, mask=m_n)
    tl.store(p_out + blocks * N, tl.sum(tl.exp(b_below), axis=1), mask=m_n)
    tl.store(p_out + 2 * blocks * N, tl.sum(tl.where(b_p > 0, b_p * b_log_p, 0), axis=1), mask=m_n)
    tl.store(p_out + 3 * blocks * N, tl.sum(tl.where(b_p > 0, b_p * b_below, 0), axis=1), mask=m_n)
    tl.store(p_out + 4 * blocks * N, tl.sum(b_p, axis=1), mask=m_n)


@triton.jit
def add_blocks(p_partial, p_kl, p_stats, BLOCKS, N, ACC: tl.constexpr, BB: tl.constexpr, BM: tl.constexpr):
    """kl[N], and stats[2, N]: ln sum exp(logit) and the sum of p."""
    o_n = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    m_n = o_n < N
    size = tl.cast(BLOCKS, tl.int64) * N
    b_most = tl.full([BM], float("-inf"), dtype=ACC)
    b_sum = tl.zeros([BM], dtype=ACC)
    for block in range(0, BLOCKS, BB):
        o_b = (block + tl.arange(0, BB)).to(tl.int64)
        m_b = (o_b < BLOCKS)[:, None] & m_n[None, :]
        p_block = p_partial + o_b[:, None] * N + o_n[None, :]
        b_m = tl.load(p_block, mask=m_b, other=float("-inf"))
        b_new = tl.maximum(b_most, tl.max(b_m, axis=0))
        b_new = tl.where(m_n, b_new, 0)
        b_s = tl.load(p_block + size, mask=m_b, other=0.0) * tl.exp(b_m - b_new[None, :])
        b_sum = b_sum * tl.exp(b_most - b_new) + tl.sum(b_s, axis=0)
        b_most = b_new
    b_lse = b_most + tl.log(b_sum)
    b_kl = tl.zeros([BM], dtype=ACC)
    b_mass = tl.zeros([BM], dtype=ACC)
    for block in range(0, BLOCKS, BB):
        o_b = (block + tl.arange(0, BB)).to(tl.int64)
        m_b = (o_b < BLOCKS)[:, None] & m_n[None, :]
        p_block = p_partial + o_b[:, None] * N + o_n[None, :]
        b_m = tl.load(p_block, mask=m_b, other=0.0)
        b_p = tl.load(p_block + 4 * size, mask=m_b, other=0.0)
        b_own = tl.load(p_block + 2 * size, mask=m_b, other=0.0) - tl.load(p_block + 3 * size, mask=m_b, other=0.0)
        # ln q is small beside the logits; subtracting their level first keeps its digits.
        b_kl += tl.sum(tl.where(m_b, b_own - b_p * (b_m - b_lse[None, :]), 0), axis=0)
        b_mass += tl.sum(b_p, axis=0)
    tl.store(p_kl + o_n, b_kl, mask=m_n)
    tl.store(p_stats + o_n, b_lse, mask=m_n)
    tl.store(p_stats + (N + o_n), b_mass, mask=m_n)


@triton.jit
def logit_gradient(
    p_h, p_w, p_reference, p_stats, p_grad, p_out, N, V, D, stride_h, stride_w, stride_reference,
    PRECISION: tl.constexpr, ACC: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """out[N, V] = grad (sum p softmax(logit) - p), the logits made again."""
    i_v, i_n = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    o_v, o_n = i_v * BV + tl.arange(0, BV), i_n * BM + tl.arange(0, BM)
    m_v, m_n = o_v < V, o_n < N
    b_logit = _logits(p_h, p_w, o_n, o_v, m_n, m_v, D, stride_h, stride_w, PRECISION, ACC, BM, BK, BV)
    m_out = m_n[:, None] & m_v[None, :]
    p_log_p = p_reference + o_n[:, None] * stride_reference + o_v[None, :]
    b_p = tl.exp(tl.load(p_log_p, mask=m_out, other=float("-inf")).to(ACC))  # [BM, BV]
    b_lse = tl.load(p_stats + o_n, mask=m_n, other=0.0)
    b_mass = tl.load(p_stats + (N + o_n), mask=m_n, other=0.0)
    b_grad = tl.load(p_grad + o_n, mask=m_n, other=0.0).to(ACC)
    b_out = b_grad[:, None] * (b_mass[:, None] * tl.exp(b_logit - b_lse[:, None]) - b_p)
    tl.store(p_out + o_n[:, None] * V + o_v[None, :], narrow(b_out, p_out.dtype.element_ty), mask=m_out)


def _launch(hidden: torch.Tensor, precision: str) -> tuple[int, int, dict]:
    rows, words, inner, num_warps, num_stages = TILES[hidden.element_size()]
    acc = tl.float64 if hidden.dtype == torch.float64 else tl.float32
    used = precision if hidden.dtype == torch.float32 else "ieee"
    options = {"num_warps": num_warps, "num_stages": min(num_stages, 2) if torch.version.hip else num_stages}
    return rows, words, {"PRECISION": used, "ACC": acc, "BM": rows, "BK": inner, "BV": words, **options}


def answer_kl(
    hidden: torch.Tensor, weight: torch.Tensor, reference: torch.Tensor, precision: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Divergence per row, and what backward needs; every row contiguous."""
    (n, d), v, wide = hidden.shape, weight.shape[0], reference.dtype
    kl = torch.empty(n, dtype=wide, device=hidden.device)
    stats = torch.empty(2, n, dtype=wide, device=hidden.device)
    if n:
        rows, words, options = _launch(hidden, precision)
        blocks = triton.cdiv(v, words)
        partial = torch.empty(FIELDS, blocks, n, dtype=wide, device=hidden.device)
        block_sums[(blocks, triton.cdiv(n, rows))](
            hidden, weight, reference, partial, n, v, d, hidden.stride(0), weight.stride(0), reference.stride(0),
            **options,
        )  # fmt: skip
        add_blocks[(triton.cdiv(n, 16),)](partial, kl, stats, blocks, n, ACC=options["ACC"], BB=32, BM=16)
    return kl, stats


def answer_kl_grad(
    grad: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    reference: torch.Tensor,
    stats: torch.Tensor,
    precision: str,
) -> torch.Tensor:
    """Gradient of ``hidden``, through that of the answers' logits in its dtype."""
    (n, d), v = hidden.shape, weight.shape[0]
    logits = hidden.new_empty(n, v)
    if n:
        rows, words, options = _launch(hidden, precision)
        logit_gradient[(triton.cdiv(v, words), triton.cdiv(n, rows))](
            hidden, weight, reference, stats, grad, logits, n, v, d,
            hidden.stride(0), weight.stride(0), reference.stride(0), **options,
        )  # fmt: skip
    return logits @ weight
