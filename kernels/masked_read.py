"""Triton kernels of masked_read: the forward, the stream's gradient, the mask's gradient, both gradients at once.

Every tensor is seen as rows of N = T * d numbers, N being by far the longest axis. The stream is read once for up to
128 readers. A program owns one tile of the result, or one part of the columns of it, and walks the axis that is
summed; parts are added up in order by a second kernel. So there are no atomics, and the same inputs always give the
same bits.

``live``, int32 [W + 2 + R], lists the writers that are read: how many have a mask strictly between 0 and 1 somewhere,
how many have one other than 0, then all rows, those of the first kind first; then it has a 1 for every reader that is
wanted. The other rows are never touched. The readers are not brought together as the writers are: one tile mostly holds
all of them, so that leaving out some of its rows saves the same memory traffic.

The tiles were chosen by arithmetic and by what compilers report (registers, spills, shared memory); none was timed, and
what CUDA C++ with wgmma and TMA would gain over these kernels is unmeasured.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from fastcircuit_kernels.dot import dot, narrow


class Tile(NamedTuple):
    """Rows of the result, length of the summed axis and columns per step; warps and pipeline stages."""

    rows: int
    inner: int
    columns: int
    num_warps: int
    num_stages: int


# By what multiplies, and rows. Steps take at least 256 contiguous bytes of a row where registers allow it, and programs
# are small enough for two or more on a multiprocessor, so that enough loads are in flight to fill the memory bus. IEEE
# float32 runs on the vector units, where rows added by padding cost as much as others: the tile with the least padding
# is taken, and as the tiles of one range of columns run side by side, the stream comes from L2 but for the first.
READS = {
    "half": (Tile(16, 32, 256, 4, 4), Tile(32, 32, 256, 4, 3), Tile(64, 32, 128, 4, 3), Tile(128, 16, 256, 8, 4)),
    # Rows of their own to add to want registers as well.
    "half, added": (
        Tile(16, 32, 256, 4, 4),
        Tile(32, 32, 256, 4, 3),
        Tile(64, 32, 128, 4, 3),
        Tile(128, 32, 128, 8, 3),
    ),
    "tf32": (Tile(16, 32, 128, 4, 3), Tile(32, 32, 128, 4, 3), Tile(64, 32, 128, 8, 3), Tile(128, 32, 128, 8, 2)),
    "tf32x3": (Tile(16, 32, 128, 4, 3), Tile(32, 32, 128, 4, 3), Tile(64, 32, 128, 8, 3), Tile(128, 16, 64, 8, 2)),
    "ieee": (Tile(16, 16, 128, 4, 3), Tile(32, 16, 128, 4, 3), Tile(64, 16, 128, 8, 3)),
    "float64": (Tile(16, 16, 32, 4, 1),),
}
# The mask's gradient: rows are readers, the summed axis is the columns of the stream, the columns are writers.
PRODUCTS = {
    "half": (Tile(16, 128, 64, 4, 3), Tile(32, 128, 64, 4, 3), Tile(64, 128, 64, 4, 3), Tile(128, 128, 64, 8, 2)),
    "tf32": (Tile(16, 64, 64, 4, 3), Tile(32, 64, 64, 4, 3), Tile(64, 64, 64, 4, 3), Tile(128, 64, 64, 8, 2)),
    "tf32x3": (Tile(16, 32, 64, 4, 3), Tile(32, 32, 64, 4, 3), Tile(64, 32, 64, 8, 3), Tile(128, 16, 64, 8, 2)),
    "ieee": (Tile(16, 32, 64, 4, 3), Tile(32, 32, 64, 4, 3), Tile(64, 32, 64, 8, 3)),
    "float64": (Tile(16, 32, 16, 4, 1),),
}
# Both gradients in one pass, which saves reading grad_reads again; rows are readers, the summed axis is writers.
BACKWARDS = {
    "half": (Tile(16, 32, 128, 4, 3), Tile(32, 32, 64, 4, 3), Tile(64, 32, 64, 4, 2), Tile(128, 32, 64, 8, 2)),
    "tf32": (Tile(16, 64, 64, 4, 2), Tile(32, 32, 64, 4, 2), Tile(64, 64, 64, 8, 2), Tile(128, 64, 32, 8, 2)),
}
PROGRAMS = 512  # what the parts of a reduction add up to: a few waves of any large GPU, the same on all of them


@triton.jit
def read(
    p_z, p_in, p_start, p_out, p_live, ROWS, INNER, N,
    stride_z_row, stride_z_inner, stride_in, stride_start, stride_out,
    START: tl.constexpr, LIVE: tl.constexpr, PRECISION: tl.constexpr, PIECES: tl.constexpr,
    ACC: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """out[ROWS, N] = start + z[ROWS, INNER] @ in[INNER, N].

    START is "none", "shared" by all rows, or "own". LIVE is "none", or says of which axis the live list gives the
    indices: "inner" or "rows"; readers are the other one.
    """
    i_program = tl.program_id(0).to(tl.int64)
    n_tiles = (ROWS + BM - 1) // BM
    i_m, i_n = i_program % n_tiles, i_program // n_tiles
    o_n = i_n * BN + tl.arange(0, BN)
    o_m = i_m * BM + tl.arange(0, BM)
    n_rows, n_inner = ROWS, INNER
    if LIVE == "rows":
        n_rows = tl.load(p_live + 1)
        if i_m * BM >= n_rows:
            return
        o_row = tl.load(p_live + 2 + o_m, mask=o_m < n_rows, other=0).to(tl.int64)
    else:
        o_row = o_m
    m_m, m_n = o_m < n_rows, o_n < N
    if LIVE == "inner":
        n_inner = tl.load(p_live + 1)
        m_m &= tl.load(p_live + 2 + INNER + o_m, mask=m_m, other=0) != 0
        if tl.max(m_m.to(tl.int32), axis=0) == 0:
            return
    b_acc = tl.zeros([BM, BN], dtype=ACC)  # [BM, BN]
    if START == "shared":
        b_acc += tl.load(p_start + o_n, mask=m_n, other=0.0).to(ACC)[None, :]
    for k in range(0, n_inner, BK):
        o_k = (k + tl.arange(0, BK)).to(tl.int64)
        m_k = o_k < n_inner
        if LIVE == "inner":
            o_k = tl.load(p_live + 2 + o_k, mask=m_k, other=0).to(tl.int64)
        if LIVE == "rows":
            m_k &= tl.load(p_live + 2 + ROWS + o_k, mask=m_k, other=0) != 0
        b_z = tl.load(
            p_z + o_row[:, None] * stride_z_row + o_k[None, :] * stride_z_inner,
            mask=m_m[:, None] & m_k[None, :], other=0.0, eviction_policy="evict_last",
        )  # [BM, BK]  # fmt: skip
        b_in = tl.load(
            p_in + o_k[:, None] * stride_in + o_n[None, :], mask=m_k[:, None] & m_n[None, :], other=0.0
        )  # [BK, BN]
        b_acc = dot(b_z, b_in, b_acc, PRECISION, PIECES)
    m_out = m_m[:, None] & m_n[None, :]
    if START == "own":
        b_acc += tl.load(p_start + o_row[:, None] * stride_start + o_n[None, :], mask=m_out, other=0.0).to(ACC)
    tl.store(p_out + o_row[:, None] * stride_out + o_n[None, :], narrow(b_acc, p_out.dtype.element_ty), mask=m_out)


@triton.jit
def row_products(
    p_x, p_d, p_partial, p_live, R, W, N, COLUMNS_PER_PART,
    stride_x, stride_d,
    LIVE: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """partial[part, R, W] = the products of the rows of x[R, N] and d[W, N] over one part of the columns.

    With LIVE, only of the readers that are wanted and the writers whose mask is strictly between 0 and 1 somewhere.
    """
    i_w, i_m, i_part = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    o_m = i_m * BM + tl.arange(0, BM)
    o_w = i_w * BN + tl.arange(0, BN)
    n_writers = W
    if LIVE:
        n_writers = tl.load(p_live)
        if i_w * BN >= n_writers:
            return
    m_m, m_w = o_m < R, o_w < n_writers
    if LIVE:
        m_m &= tl.load(p_live + 2 + W + o_m, mask=m_m, other=0) != 0
        if tl.max(m_m.to(tl.int32), axis=0) == 0:
            return
        o_w = tl.load(p_live + 2 + o_w, mask=m_w, other=0).to(tl.int64)
    b_acc = tl.zeros([BM, BN], dtype=ACC)  # [BM, BN]
    for c in range(0, COLUMNS_PER_PART, BK):
        o_n = i_part * COLUMNS_PER_PART + c + tl.arange(0, BK)
        m_n = o_n < N
        b_x = tl.load(
            p_x + o_m[:, None] * stride_x + o_n[None, :], mask=m_m[:, None] & m_n[None, :], other=0.0
        )  # [BM, BK]
        b_d = tl.load(
            p_d + o_n[:, None] + o_w[None, :] * stride_d, mask=m_n[:, None] & m_w[None, :], other=0.0
        )  # [BK, BN]
        b_acc = dot(b_x, b_d, b_acc, PRECISION)
    p_out = p_partial + (i_part * R + o_m[:, None]) * W + o_w[None, :]
    tl.store(p_out, b_acc, mask=m_m[:, None] & m_w[None, :])


@triton.jit
def backward(
    p_g, p_d, p_z, p_gd, p_partial, p_live, FIRST, R, W, N, COLUMNS_PER_PART,
    stride_g, stride_d, stride_z_reader, stride_z_writer, stride_gd,
    ACCUMULATE: tl.constexpr, LIVE: tl.constexpr, PRECISION: tl.constexpr, PIECES: tl.constexpr,
    BM: tl.constexpr, BW: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """gd[W, N] += z^T g and partial[part, R, W] = the products of the rows of g and d, for R <= BM readers.

    Those are from FIRST on among the readers of the live list.
    """
    i_w, i_part = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    o_m = tl.arange(0, BM).to(tl.int64)
    o_w = i_w * BW + tl.arange(0, BW)
    n_writers, n_open = W, W
    if LIVE:
        n_open, n_writers = tl.load(p_live), tl.load(p_live + 1)
        if i_w * BW >= n_writers:
            return
    m_m, m_w, m_open = o_m < R, o_w < n_writers, o_w < n_open
    if LIVE:
        m_m &= tl.load(p_live + 2 + W + FIRST + o_m, mask=m_m, other=0) != 0
        o_w = tl.load(p_live + 2 + o_w, mask=m_w, other=0).to(tl.int64)
    b_z = tl.load(
        p_z + o_w[:, None] * stride_z_writer + o_m[None, :] * stride_z_reader,
        mask=m_w[:, None] & m_m[None, :], other=0.0,
    )  # [BW, BM]  # fmt: skip
    b_products = tl.zeros([BM, BW], dtype=tl.float32)  # [BM, BW]
    for c in range(0, COLUMNS_PER_PART, BN):
        o_n = i_part * COLUMNS_PER_PART + c + tl.arange(0, BN)
        m_n = o_n < N
        b_g = tl.load(
            p_g + o_m[:, None] * stride_g + o_n[None, :], mask=m_m[:, None] & m_n[None, :], other=0.0
        )  # [BM, BN]
        b_d = tl.load(
            p_d + o_w[:, None] * stride_d + o_n[None, :], mask=m_open[:, None] & m_n[None, :], other=0.0
        )  # [BW, BN]
        b_products = dot(b_g, tl.trans(b_d), b_products, PRECISION)
        b_gd = dot(b_z, b_g, tl.zeros([BW, BN], dtype=tl.float32), PRECISION, PIECES)  # [BW, BN]
        p_tile = p_gd + o_w[:, None] * stride_gd + o_n[None, :]
        m_tile = m_w[:, None] & m_n[None, :]
        if ACCUMULATE:
            b_gd += tl.load(p_tile, mask=m_tile, other=0.0).to(tl.float32)
        tl.store(p_tile, narrow(b_gd, p_gd.dtype.element_ty), mask=m_tile)
    p_out = p_partial + (i_part * R + o_m[:, None]) * W + o_w[None, :]
    tl.store(p_out, b_products, mask=m_m[:, None] & m_open[None, :])


@triton.jit
def add_parts(
    p_partial, p_z, p_out, p_live, FIRST, PARTS, R, W,
    stride_z_reader, stride_z_writer,
    LIVE: tl.constexpr, ACC: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """out[R, W] = sum of partial[PARTS, R, W], in order.

    With LIVE, 0 where z is not strictly between 0 and 1, and for readers that are not wanted.
    """
    o_i = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    size = R * W
    m_i = o_i < size
    m_part = m_i
    if LIVE:
        p_z += (o_i // W) * stride_z_reader + (o_i % W) * stride_z_writer
        b_z = tl.load(p_z, mask=m_i, other=0.0)
        b_wanted = tl.load(p_live + 2 + W + FIRST + o_i // W, mask=m_i, other=0)
        m_part = m_i & (b_wanted != 0) & (b_z > 0) & (b_z < 1)
    b_acc = tl.zeros([BN], dtype=ACC)
    for part in range(0, PARTS, BP):
        o_p = (part + tl.arange(0, BP)).to(tl.int64)
        b_part = tl.load(
            p_partial + o_p[:, None] * size + o_i[None, :], mask=(o_p < PARTS)[:, None] & m_part[None, :], other=0.0
        )  # [BP, BN]
        b_acc += tl.sum(b_part, axis=0)
    tl.store(p_out + o_i, narrow(b_acc, p_out.dtype.element_ty), mask=m_i)


def kind_of(dtype: torch.dtype, precision: str, pieces: int = 2) -> str:
    """What multiplies numbers of this dtype: the first key of the tables above."""
    if dtype == torch.float16 and pieces == 3:
        return "tf32x3"
    return {torch.float32: precision, torch.float64: "float64"}.get(dtype, "half")


def tile_for(tiles: tuple[Tile, ...], rows: int) -> Tile:
    """On tensor cores the lowest tile with the fewest passes over the other operand; otherwise the least padding."""
    if len(tiles) == 4:
        return min(tiles, key=lambda tile: (triton.cdiv(rows, tile.rows), tile.rows))
    return min(tiles, key=lambda tile: (triton.cdiv(rows, tile.rows) * tile.rows, -tile.rows))


def stages(tile: Tile, indirect: bool = False) -> int:
    """AMD's local memory is a quarter of NVIDIA's shared memory, so pipelines there are short.

    Where a load's address or mask is itself loaded, Triton's pipeliner shares the stages out between the two loads.
    """
    if torch.version.hip:
        return min(tile.num_stages, 2)
    return 2 * tile.num_stages - 1 if indirect else tile.num_stages


def _accumulator(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if dtype == torch.float64 else tl.float32


def _precision(dtype: torch.dtype, precision: str) -> str:
    if dtype == torch.float16:
        return "ieee" if torch.version.hip else "tf32x3"
    return precision if dtype == torch.float32 else "ieee"


def _pieces(out: torch.Tensor) -> int:
    """Half-precision pieces of a float32 mask that are enough for ``out``."""
    return 3 if out.dtype == torch.float32 else 2


def _launch_read(z, rows, start, out, live, live_axis, precision):
    """out = start + z @ rows, where rows, start and out are made of rows of N numbers."""
    n, dtype = out[0].numel(), rows.dtype
    kind, stride_start = ("none", 0) if start is None else ("own", start.stride(0))
    if start is not None and start.dim() < out.dim():
        kind, stride_start = "shared", 0
    units = kind_of(dtype, precision, _pieces(out))
    tiles = READS.get(f"{units}, added", READS[units]) if kind == "own" else READS[units]
    tile = tile_for(tiles, z.shape[0])
    grid = (triton.cdiv(z.shape[0], tile.rows) * triton.cdiv(n, tile.columns),)
    read[grid](
        z, rows, start, out, live, z.shape[0], z.shape[1], n, *z.stride(), rows.stride(0), stride_start, out.stride(0),
        START=kind, LIVE="none" if live is None else live_axis, PRECISION=_precision(dtype, precision),
        PIECES=_pieces(out), ACC=_accumulator(dtype), BM=tile.rows, BK=tile.inner, BN=tile.columns,
        num_warps=tile.num_warps, num_stages=stages(tile, live is not None),
    )  # fmt: skip


def masked_read(
    stream: torch.Tensor, mask: torch.Tensor, base: torch.Tensor | None, live: torch.Tensor | None, precision: str
) -> torch.Tensor:
    """``base + sum_j mask[r, j] * stream[j]``; stream rows and base contiguous."""
    reads = stream.new_empty(mask.shape[0], *stream.shape[1:])
    if reads.numel():
        _launch_read(mask, stream, base, reads, live, "inner", precision)
    return reads


def add_stream_gradient(
    grad_reads: torch.Tensor,
    mask: torch.Tensor,
    grad_stream: torch.Tensor,
    accumulate: bool,
    live: torch.Tensor | None,
    precision: str,
) -> None:
    """``grad_stream (+)= mask^T grad_reads``, in place; rows contiguous."""
    if grad_stream.numel():
        start = grad_stream if accumulate else None
        _launch_read(mask.T, grad_reads, start, grad_stream, live, "rows", precision)


def mask_gradient(
    grad_reads: torch.Tensor, stream: torch.Tensor, mask: torch.Tensor, live: torch.Tensor | None, precision: str
) -> torch.Tensor:
    """``<grad_reads[r], stream[w]>`` in the dtype of ``mask``, summed in the accumulation dtype; rows contiguous."""
    if not stream.numel() or not grad_reads.numel():
        return mask.new_zeros(mask.shape)
    (readers, writers), n = mask.shape, stream[0].numel()
    tile = tile_for(PRODUCTS[kind_of(stream.dtype, precision)], readers)
    grid = triton.cdiv(writers, tile.columns), triton.cdiv(readers, tile.rows)
    parts, per_part = _parts(n, tile.inner, grid[0] * grid[1])
    partial = _workspace(stream, parts, readers, writers)
    row_products[(*grid, parts)](
        grad_reads, stream, partial, live, readers, writers, n, per_part, grad_reads.stride(0), stream.stride(0),
        LIVE=live is not None, PRECISION=_precision(stream.dtype, precision), ACC=_accumulator(stream.dtype),
        BM=tile.rows, BK=tile.inner, BN=tile.columns, num_warps=tile.num_warps, num_stages=stages(tile),
    )  # fmt: skip
    return _add_parts(partial, mask, live, 0)


def both_gradients(
    grad_reads: torch.Tensor,
    stream: torch.Tensor,
    mask: torch.Tensor,
    grad_stream: torch.Tensor,
    accumulate: bool,
    live: torch.Tensor | None,
    precision: str,
) -> torch.Tensor:
    """:func:`add_stream_gradient` and :func:`mask_gradient`, in one pass where the tensor cores do the products."""
    tiles = BACKWARDS.get(kind_of(stream.dtype, precision, _pieces(grad_stream)))
    if tiles is None or not stream.numel() or not grad_reads.numel():
        add_stream_gradient(grad_reads, mask, grad_stream, accumulate, live, precision)
        return mask_gradient(grad_reads, stream, mask, live, precision)
    most = tiles[-1].rows
    grads = []
    for first in range(0, len(mask), most):
        z, grad, adds = mask[first : first + most], grad_reads[first : first + most], accumulate or first > 0
        grads.append(_launch_backward(tiles, grad, stream, z, grad_stream, adds, live, first, precision))
    return grads[0] if len(grads) == 1 else torch.cat(grads)


def _launch_backward(tiles, grad_reads, stream, mask, grad_stream, accumulate, live, first, precision):
    (readers, writers), n = mask.shape, stream[0].numel()
    tile = tile_for(tiles, readers)
    if torch.version.hip and tile.rows == 128:
        tile = tile._replace(inner=16, columns=64)  # the others spill on AMD's registers
    blocks = triton.cdiv(writers, tile.inner)
    parts, per_part = _parts(n, tile.columns, blocks)
    partial = _workspace(stream, parts, readers, writers)
    backward[(blocks, parts)](
        grad_reads, stream, mask, grad_stream, partial, live, first, readers, writers, n, per_part,
        grad_reads.stride(0), stream.stride(0), *mask.stride(), grad_stream.stride(0),
        ACCUMULATE=accumulate, LIVE=live is not None, PRECISION=_precision(stream.dtype, precision),
        PIECES=_pieces(grad_stream), BM=tile.rows, BW=tile.inner, BN=tile.columns,
        num_warps=tile.num_warps, num_stages=stages(tile),
    )  # fmt: skip
    return _add_parts(partial, mask, live, first)


def _parts(columns: int, step: int, blocks: int) -> tuple[int, int]:
    """How many parts the columns are cut into, and the columns of one: enough programs to fill the device."""
    steps = triton.cdiv(columns, step)
    per_part = triton.cdiv(steps, max(1, PROGRAMS // blocks))
    return triton.cdiv(steps, per_part), per_part * step


def _workspace(like: torch.Tensor, *shape: int) -> torch.Tensor:
    return like.new_empty(shape, dtype=torch.float64 if like.dtype == torch.float64 else torch.float32)


def _add_parts(partial: torch.Tensor, mask: torch.Tensor, live: torch.Tensor | None, first: int) -> torch.Tensor:
    parts, readers, writers = partial.shape
    grad_mask = mask.new_empty(mask.shape)
    add_parts[(triton.cdiv(grad_mask.numel(), 128),)](
        partial, mask, grad_mask, live, first, parts, readers, writers, *mask.stride(),
        LIVE=live is not None, ACC=_accumulator(partial.dtype), BP=16, BN=128,
    )  # fmt: skip
    return grad_mask
