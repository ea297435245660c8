"""Triton kernels of masked_read: the forward, the stream's gradient, the mask's gradient.

Every tensor is seen as rows of N = T * d numbers. A program owns one tile of the result and walks the axis that
is summed, so no atomics are needed and the same inputs always give the same bits.
"""

import torch
import triton
import triton.language as tl

BLOCK_ROWS = 16  # the least that tl.dot takes
BLOCK_INNER = 32
BLOCK_COLUMNS = 64


@triton.jit
def _dot(b_a, b_b, ACC: tl.constexpr):
    """A product in the accumulation dtype, without TF32; tl.dot has no float64 everywhere, a sum has."""
    if tl.constexpr(tl.float64 == ACC):
        b_c = tl.sum(b_a[:, :, None] * b_b[None, :, :], axis=1)
    else:
        b_c = tl.dot(b_a, b_b, input_precision="ieee")
    return b_c


@triton.jit
def _rows_from_rows(
    p_z, p_in, p_start, p_out, ROWS, INNER, N,
    stride_z_row, stride_z_inner, stride_in, stride_start, stride_out,
    HAS_START: tl.constexpr, ACC: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """out[ROWS, N] = start + z[ROWS, INNER] @ in[INNER, N]; a start with stride 0 is shared by all rows."""
    i_m, i_n = tl.program_id(1).to(tl.int64), tl.program_id(0).to(tl.int64)
    o_m = i_m * BM + tl.arange(0, BM)
    o_n = i_n * BN + tl.arange(0, BN)
    m_out = (o_m < ROWS)[:, None] & (o_n < N)[None, :]
    b_acc = tl.zeros([BM, BN], dtype=ACC)  # [BM, BN]
    if HAS_START:
        b_acc += tl.load(p_start + o_m[:, None] * stride_start + o_n[None, :], mask=m_out, other=0.0).to(ACC)
    for k in range(0, INNER, BK):
        o_k = k + tl.arange(0, BK).to(tl.int64)
        m_z = (o_m < ROWS)[:, None] & (o_k < INNER)[None, :]
        m_in = (o_k < INNER)[:, None] & (o_n < N)[None, :]
        b_z = tl.load(
            p_z + o_m[:, None] * stride_z_row + o_k[None, :] * stride_z_inner, mask=m_z, other=0.0
        )  # [BM, BK]
        b_in = tl.load(p_in + o_k[:, None] * stride_in + o_n[None, :], mask=m_in, other=0.0)  # [BK, BN]
        b_acc += _dot(b_z.to(ACC), b_in.to(ACC), ACC)
    tl.store(p_out + o_m[:, None] * stride_out + o_n[None, :], b_acc.to(p_out.dtype.element_ty), mask=m_out)


@triton.jit
def _row_products(
    p_x, p_d, p_partial, R, W, N, COLUMNS_PER_PART,
    stride_x, stride_d,
    ACC: tl.constexpr, BM: tl.constexpr, BW: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """partial[part, R, W] = the products of the rows of x[R, N] and d[W, N] over one part of the columns."""
    i_part, i_m, i_w = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    o_m = i_m * BM + tl.arange(0, BM)
    o_w = i_w * BW + tl.arange(0, BW)
    b_acc = tl.zeros([BM, BW], dtype=ACC)  # [BM, BW]
    for c in range(0, COLUMNS_PER_PART, BN):
        o_n = i_part * COLUMNS_PER_PART + c + tl.arange(0, BN)
        m_x = (o_m < R)[:, None] & (o_n < N)[None, :]
        m_d = (o_n < N)[:, None] & (o_w < W)[None, :]
        b_x = tl.load(p_x + o_m[:, None] * stride_x + o_n[None, :], mask=m_x, other=0.0)  # [BM, BN]
        b_d = tl.load(p_d + o_n[:, None] + o_w[None, :] * stride_d, mask=m_d, other=0.0)  # [BN, BW]
        b_acc += _dot(b_x.to(ACC), b_d.to(ACC), ACC)
    p_out = p_partial + i_part * R * W + o_m[:, None] * W + o_w[None, :]
    tl.store(p_out, b_acc, mask=(o_m < R)[:, None] & (o_w < W)[None, :])


def _accumulator(dtype: torch.dtype):
    return tl.float64 if dtype == torch.float64 else tl.float32


def _launch_rows(z, rows, start, stride_start, out, stride_out):
    """out = start + z @ rows, where rows, start and out are made of rows of N numbers."""
    n = rows[0].numel() if rows.shape[0] else out[0].numel()
    grid = (triton.cdiv(n, BLOCK_COLUMNS), triton.cdiv(z.shape[0], BLOCK_ROWS))
    _rows_from_rows[grid](
        z, rows, start, out, z.shape[0], z.shape[1], n, *z.stride(), rows.stride(0), stride_start, stride_out,
        HAS_START=start is not None, ACC=_accumulator(rows.dtype), BM=BLOCK_ROWS, BK=BLOCK_INNER, BN=BLOCK_COLUMNS,
    )  # fmt: skip


def masked_read(stream: torch.Tensor, mask: torch.Tensor, base: torch.Tensor | None) -> torch.Tensor:
    """``base + sum_j mask[r, j] * stream[j]``; stream rows and base contiguous."""
    reads = stream.new_empty(mask.shape[0], *stream.shape[1:])
    if reads.numel():
        _launch_rows(mask, stream, base, 0, reads, reads.stride(0))
    return reads


def add_stream_gradient(grad_reads: torch.Tensor, mask: torch.Tensor, grad_stream: torch.Tensor) -> None:
    """``grad_stream += mask^T grad_reads``, in place; rows contiguous."""
    if grad_stream.numel():
        stride = grad_stream.stride(0)
        _launch_rows(mask.T, grad_reads, grad_stream, stride, grad_stream, stride)


def mask_gradient(grad_reads: torch.Tensor, stream: torch.Tensor) -> torch.Tensor:
    """``<grad_reads[r], stream[w]>`` in the accumulation dtype; rows contiguous."""
    readers, writers = grad_reads.shape[0], stream.shape[0]
    wide = torch.float64 if stream.dtype == torch.float64 else torch.float32
    if not grad_reads.numel() or not stream.numel():
        return torch.zeros(readers, writers, dtype=wide, device=stream.device)
    n = stream[0].numel()
    # Parts make up for the small result: without them a few programs would walk all the columns.
    per_part = BLOCK_COLUMNS * max(1, triton.cdiv(n, BLOCK_COLUMNS * 64))
    parts = triton.cdiv(n, per_part)
    partial = torch.empty(parts, readers, writers, dtype=wide, device=stream.device)
    grid = (parts, triton.cdiv(readers, BLOCK_ROWS), triton.cdiv(writers, BLOCK_ROWS))
    _row_products[grid](
        grad_reads, stream, partial, readers, writers, n, per_part, grad_reads.stride(0), stream.stride(0),
        ACC=_accumulator(stream.dtype), BM=BLOCK_ROWS, BW=BLOCK_ROWS, BN=BLOCK_COLUMNS,
    )  # fmt: skip
    return partial.sum(0)
