"""Triton kernels of read_norm: a masked read that leaves normalised, and what its backward passes on to the read's.

A program owns one token of up to 128 readers. It walks the token's columns twice: first it makes the reads, writes them
unnormalised where the result will be, and gathers their statistics; then it normalises what it wrote, which should
still be in L2. So W rows of the stream are read and R rows of results written, where a read and a norm one after the
other also write and read the R rows in between. Backward makes the reads again in the same way. Where a token's rows
are too large for that, or tokens too few to fill a GPU, the read and the norm are launches of their own. When which is
faster is reckoned by bytes and unmeasured.

Fused with a projection per head as well, the reads would not leave the chip at all; but a program then needs either all
readers of a token, and reads every head's weights for few tokens, or many tokens of a reader, and reads the stream once
per reader. For GPT-2 small (157 writers, 36 readers, 64 of 768 numbers out per reader) the four readers of 16 tokens
that fit on a multiprocessor would take the stream from L2 nine times: 1413 rows of L2 traffic to save 72 of 232 rows of
memory traffic. L2 is not nearly twenty times as fast as memory, so there is no such kernel.
"""

import torch
import triton
import triton.language as tl
from fastcircuit_kernels.dot import dot, narrow
from fastcircuit_kernels.masked_read import Tile, masked_read, stages

TILES = {
    2: (Tile(16, 32, 128, 4, 3), Tile(64, 32, 64, 8, 3), Tile(128, 32, 64, 8, 2)),
    4: (Tile(16, 16, 64, 4, 3), Tile(64, 16, 64, 8, 3)),
    8: (Tile(16, 16, 32, 4, 1),),
}  # by the size of a number in bytes; rows are readers, the summed axis is writers
# Below this many programs a GPU is not full, and above this many bytes per program what it wrote has left L2.
LEAST_PROGRAMS = 256
MOST_BYTES = 128 * 1024


@triton.jit
def _read(
    p_stream, p_z, p_base, p_x, p_live, o_r, o_d, m_r, m_d, i_t, W, D,
    stride_stream, stride_z_reader, stride_z_writer,
    FUSED: tl.constexpr, HAS_BASE: tl.constexpr, LIVE: tl.constexpr, PRECISION: tl.constexpr, PIECES: tl.constexpr,
    ACC: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """One block of reads, rounded; written to x, or with FUSED false read from it."""
    m = m_r[:, None] & m_d[None, :]
    if FUSED:
        o_n = i_t * D + o_d
        b_x = tl.zeros([BM, BN], dtype=ACC)
        if HAS_BASE:
            b_x += tl.load(p_base + o_n, mask=m_d, other=0.0).to(ACC)[None, :]
        n_writers = W
        if LIVE:
            n_writers = tl.load(p_live + 1)
        for k in range(0, n_writers, BK):
            o_k = (k + tl.arange(0, BK)).to(tl.int64)
            m_k = o_k < n_writers
            if LIVE:
                o_k = tl.load(p_live + 2 + o_k, mask=m_k, other=0).to(tl.int64)
            p_mask = p_z + o_r[:, None] * stride_z_reader + o_k[None, :] * stride_z_writer
            b_z = tl.load(p_mask, mask=m_r[:, None] & m_k[None, :], other=0.0)  # [BM, BK]
            p_rows = p_stream + o_k[:, None] * stride_stream + o_n[None, :]
            b_d = tl.load(p_rows, mask=m_k[:, None] & m_d[None, :], other=0.0)  # [BK, BN]
            b_x = dot(b_z, b_d, b_x, PRECISION, PIECES)
        b_rounded = narrow(b_x, p_x.dtype.element_ty)
        tl.store(p_x + o_d[None, :], b_rounded, mask=m)
    else:
        b_rounded = tl.load(p_x + o_d[None, :], mask=m, other=0.0)
    return b_rounded.to(ACC)


@triton.jit
def normalise(
    p_stream, p_z, p_base, p_weight, p_bias, p_out, p_stats, p_live, R, NORMED, W, T, D,
    stride_stream, stride_z_reader, stride_z_writer,
    EPS: tl.constexpr, CENTERED: tl.constexpr, FUSED: tl.constexpr, HAS_BASE: tl.constexpr, HAS_BIAS: tl.constexpr,
    LIVE: tl.constexpr, PRECISION: tl.constexpr, PIECES: tl.constexpr,
    ACC: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """out[R, T, D] = norm(base + z @ stream), stats[2, R, T] = means and 1 / deviations; not of rows from NORMED on.

    With LIVE, of the readers that are wanted alone.
    """
    n_tiles = (R + BM - 1) // BM
    i_t = tl.program_id(0).to(tl.int64) // n_tiles
    o_r = tl.program_id(0).to(tl.int64) % n_tiles * BM + tl.arange(0, BM)
    m_r = o_r < R
    if LIVE:
        m_r &= tl.load(p_live + 2 + W + o_r, mask=m_r, other=0) != 0
        if tl.max(m_r.to(tl.int32), axis=0) == 0:
            return
    p_x = p_out + (o_r[:, None] * T + i_t) * D
    b_mean = tl.zeros([BM], dtype=ACC)
    b_squares = tl.zeros([BM], dtype=ACC)  # of what is left when the mean is taken off, if it is
    for c in range(0, D, BN):
        o_d = (c + tl.arange(0, BN)).to(tl.int64)
        m_d = o_d < D
        b_x = _read(
            p_stream, p_z, p_base, p_x, p_live, o_r, o_d, m_r, m_d, i_t, W, D,
            stride_stream, stride_z_reader, stride_z_writer,
            FUSED, HAS_BASE, LIVE, PRECISION, PIECES, ACC, BM, BK, BN,
        )  # fmt: skip
        if CENTERED:
            # Chan's update: no difference of large squares.
            count = tl.minimum(D - c, BN).to(ACC)
            b_own = tl.sum(b_x, axis=1) / count
            b_left = tl.where(m_d[None, :], b_x - b_own[:, None], 0)
            b_shift = b_own - b_mean
            total = c + count
            b_mean += b_shift * (count / total)
            b_squares += tl.sum(b_left * b_left, axis=1) + b_shift * b_shift * (c * (count / total))
        else:
            b_squares += tl.sum(b_x * b_x, axis=1)
    m_plain = o_r >= NORMED
    b_mean = tl.where(m_plain, 0, b_mean)
    b_rstd = tl.where(m_plain, 1, 1 / tl.sqrt(b_squares / D + EPS))
    tl.store(p_stats + o_r * T + i_t, b_mean, mask=m_r)
    tl.store(p_stats + (R + o_r) * T + i_t, b_rstd, mask=m_r)
    tl.debug_barrier()  # other threads of the program wrote what is read now
    for c in range(0, D, BN):
        o_d = (c + tl.arange(0, BN)).to(tl.int64)
        m_d = o_d < D
        m = m_r[:, None] & m_d[None, :]
        b_x = tl.load(p_x + o_d[None, :], mask=m, other=0.0).to(ACC)
        b_x = (b_x - b_mean[:, None]) * b_rstd[:, None]
        b_weight = tl.load(p_weight + o_d, mask=m_d, other=0.0).to(ACC)
        if not CENTERED:
            b_x = narrow(b_x, p_out.dtype.element_ty).to(ACC)
        b_y = b_x * b_weight[None, :]
        if HAS_BIAS:
            b_y += tl.load(p_bias + o_d, mask=m_d, other=0.0).to(ACC)[None, :]
        b_x = tl.where(m_plain[:, None], b_x, b_y)
        tl.store(p_x + o_d[None, :], narrow(b_x, p_out.dtype.element_ty), mask=m)


@triton.jit
def normalise_backward(
    p_stream, p_z, p_base, p_weight, p_grad, p_stats, p_out, p_live, R, NORMED, W, T, D,
    stride_stream, stride_z_reader, stride_z_writer,
    CENTERED: tl.constexpr, FUSED: tl.constexpr, HAS_BASE: tl.constexpr,
    LIVE: tl.constexpr, PRECISION: tl.constexpr, PIECES: tl.constexpr,
    ACC: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """out[R, T, D] = the gradient of the reads, from that of their norm and stats[2, R, T].

    With LIVE, of the readers that are wanted alone.
    """
    n_tiles = (R + BM - 1) // BM
    i_t = tl.program_id(0).to(tl.int64) // n_tiles
    o_r = tl.program_id(0).to(tl.int64) % n_tiles * BM + tl.arange(0, BM)
    m_r = o_r < R
    if LIVE:
        m_r &= tl.load(p_live + 2 + W + o_r, mask=m_r, other=0) != 0
        if tl.max(m_r.to(tl.int32), axis=0) == 0:
            return
    p_rows = (o_r[:, None] * T + i_t) * D
    b_mean = tl.load(p_stats + o_r * T + i_t, mask=m_r, other=0.0)
    b_rstd = tl.load(p_stats + (R + o_r) * T + i_t, mask=m_r, other=0.0)
    b_along_one = tl.zeros([BM], dtype=ACC)
    b_along_x = tl.zeros([BM], dtype=ACC)
    for c in range(0, D, BN):
        o_d = (c + tl.arange(0, BN)).to(tl.int64)
        m_d = o_d < D
        m = m_r[:, None] & m_d[None, :]
        b_x = _read(
            p_stream, p_z, p_base, p_out + p_rows, p_live, o_r, o_d, m_r, m_d, i_t, W, D,
            stride_stream, stride_z_reader, stride_z_writer,
            FUSED, HAS_BASE, LIVE, PRECISION, PIECES, ACC, BM, BK, BN,
        )  # fmt: skip
        b_x = (b_x - b_mean[:, None]) * b_rstd[:, None]
        b_g = tl.load(p_grad + p_rows + o_d[None, :], mask=m, other=0.0).to(ACC)
        b_g *= tl.load(p_weight + o_d, mask=m_d, other=0.0).to(ACC)[None, :]
        b_along_one += tl.sum(b_g, axis=1)
        b_along_x += tl.sum(b_g * b_x, axis=1)
    if not CENTERED:
        b_along_one = tl.zeros([BM], dtype=ACC)
    tl.debug_barrier()
    for c in range(0, D, BN):
        o_d = (c + tl.arange(0, BN)).to(tl.int64)
        m_d = o_d < D
        m = m_r[:, None] & m_d[None, :]
        b_x = tl.load(p_out + p_rows + o_d[None, :], mask=m, other=0.0).to(ACC)
        b_x = (b_x - b_mean[:, None]) * b_rstd[:, None]
        b_grad = tl.load(p_grad + p_rows + o_d[None, :], mask=m, other=0.0).to(ACC)
        b_g = b_grad * tl.load(p_weight + o_d, mask=m_d, other=0.0).to(ACC)[None, :]
        b_g -= b_along_one[:, None] / D + b_x * (b_along_x[:, None] / D)
        b_g = tl.where((o_r >= NORMED)[:, None], b_grad, b_rstd[:, None] * b_g)
        tl.store(p_out + p_rows + o_d[None, :], narrow(b_g, p_out.dtype.element_ty), mask=m)


def _launch(stream: torch.Tensor, readers: int, live: torch.Tensor | None, precision: str) -> tuple[tuple, bool, dict]:
    """The grid, whether the read is worth fusing, and the options of a launch."""
    _, tokens, width = stream.shape
    size = stream.element_size()
    tile = min(TILES[size], key=lambda tile: (triton.cdiv(readers, tile.rows), tile.rows))
    programs = triton.cdiv(readers, tile.rows) * tokens
    fused = programs >= LEAST_PROGRAMS and min(readers, tile.rows) * width * size <= MOST_BYTES
    options = {
        "LIVE": live is not None,
        "PRECISION": precision if stream.dtype == torch.float32 else "ieee",
        "PIECES": 2,
        "ACC": tl.float64 if stream.dtype == torch.float64 else tl.float32,
        "BM": tile.rows,
        "BK": tile.inner,
        "BN": tile.columns,
        "num_warps": tile.num_warps,
        "num_stages": stages(tile, live is not None),
    }
    return (programs,), fused, options


def read_norm(
    stream: torch.Tensor,
    mask: torch.Tensor,
    base: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    centered: bool,
    plain: int,
    live: torch.Tensor | None,
    precision: str,
    fused: bool | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalised reads, the last ``plain`` as they are, and their statistics; rows, base, weight and bias contiguous.

    ``fused`` None: if it pays.
    """
    readers, (writers, tokens, width) = len(mask), stream.shape
    grid, pays, options = _launch(stream, readers, live, precision)
    fused = pays if fused is None else fused
    stats = stream.new_empty(
        2, readers, tokens, dtype=torch.float64 if stream.dtype == torch.float64 else torch.float32
    )
    out = stream.new_empty(readers, tokens, width) if fused else masked_read(stream, mask, base, live, precision)
    if stats.numel():
        normalise[grid](
            stream, mask, base, weight, bias, out, stats, live, readers, readers - plain, writers, tokens, width,
            stream.stride(0), *mask.stride(),
            EPS=eps, CENTERED=centered, FUSED=fused, HAS_BASE=base is not None, HAS_BIAS=bias is not None,
            **options,
        )  # fmt: skip
    return out, stats


def read_norm_grad(
    grad: torch.Tensor,
    stats: torch.Tensor,
    stream: torch.Tensor,
    mask: torch.Tensor,
    base: torch.Tensor | None,
    weight: torch.Tensor,
    centered: bool,
    plain: int,
    live: torch.Tensor | None,
    precision: str,
    fused: bool | None = None,
) -> torch.Tensor:
    """The gradient of the reads, made again from the stream; everything contiguous as in :func:`read_norm`."""
    readers, (writers, tokens, width) = len(mask), stream.shape
    grid, pays, options = _launch(stream, readers, live, precision)
    fused = pays if fused is None else fused
    out = torch.empty_like(grad) if fused else masked_read(stream, mask, base, live, precision)
    if stats.numel():
        normalise_backward[grid](
            stream, mask, base, weight, grad, stats, out, live, readers, readers - plain, writers, tokens, width,
            stream.stride(0), *mask.stride(),
            CENTERED=centered, FUSED=fused, HAS_BASE=base is not None, **options,
        )  # fmt: skip
    return out
