"""Triton kernel of live_product: a matrix product for every group whose flag is set; for the others, nothing.

A program owns one tile of one group's result. It asks the group's flag before anything else, so that a group that is
not alive costs a launch of programs that end at once, whatever its operands hold. The flags only decide which programs
work: a group's bits are the same whichever others are alive.

The tiles were chosen by arithmetic and by what compilers report (registers, spills, shared memory); none was timed.
"""

import torch
import triton
import triton.language as tl
from fastcircuit_kernels.dot import dot, narrow
from fastcircuit_kernels.masked_read import Tile, kind_of, stages

# By what multiplies; rows are a group's rows, the summed axis is the inner one. The largest comes first.
TILES = {
    "half": (Tile(128, 64, 128, 8, 3), Tile(128, 64, 64, 4, 3), Tile(64, 64, 64, 4, 4)),
    "tf32": (Tile(128, 32, 128, 8, 3), Tile(128, 32, 64, 4, 3), Tile(64, 32, 64, 8, 3)),
    "tf32x3": (Tile(128, 32, 64, 8, 2), Tile(64, 32, 64, 4, 2)),
    "ieee": (Tile(64, 16, 64, 4, 2),),
    "float64": (Tile(16, 16, 32, 4, 1),),
}
LEAST_PROGRAMS = 128  # fewer leave a large GPU's multiprocessors without one: then the tiles are smaller
SIDE = 8  # tiles of so many rows of tiles go column by column, so that both operands come from L2


@triton.jit
def product(
    p_x, p_w, p_bias, p_alive, p_out, M, N, K,
    stride_x_group, stride_x_row, stride_w_group, stride_w, stride_bias, stride_out_group, stride_out_row,
    BY_COLUMN: tl.constexpr, HAS_BIAS: tl.constexpr, ZEROS: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
    SIDE: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """out[G, M, N] = x[G, M, K] @ w[G, K, N] + bias[G, N] of live groups; of others 0 with ZEROS, else what it was.

    BY_COLUMN says which axis of w is contiguous: N if false.
    """
    i_program, i_g = tl.program_id(0), tl.program_id(1).to(tl.int64)
    n_m, n_n = (M + BM - 1) // BM, (N + BN - 1) // BN
    first = i_program // (SIDE * n_n) * SIDE
    side = tl.minimum(n_m - first, SIDE)
    i_m = first + i_program % (SIDE * n_n) % side
    i_n = i_program % (SIDE * n_n) // side
    o_m = i_m.to(tl.int64) * BM + tl.arange(0, BM)
    o_n = i_n.to(tl.int64) * BN + tl.arange(0, BN)
    m_m, m_n = o_m < M, o_n < N
    m_out = m_m[:, None] & m_n[None, :]
    p_tile = p_out + i_g * stride_out_group + o_m[:, None] * stride_out_row + o_n[None, :]
    if tl.load(p_alive + i_g) == 0:
        if ZEROS:
            tl.store(p_tile, tl.zeros([BM, BN], dtype=p_out.dtype.element_ty), mask=m_out)
        return
    b_acc = tl.zeros([BM, BN], dtype=ACC)  # [BM, BN]
    for k in range(0, K, BK):
        o_k = (k + tl.arange(0, BK)).to(tl.int64)
        m_k = o_k < K
        p_rows = p_x + i_g * stride_x_group + o_m[:, None] * stride_x_row + o_k[None, :]
        b_x = tl.load(p_rows, mask=m_m[:, None] & m_k[None, :], other=0.0)  # [BM, BK]
        if BY_COLUMN:
            p_columns = p_w + i_g * stride_w_group + o_k[:, None] + o_n[None, :] * stride_w
        else:
            p_columns = p_w + i_g * stride_w_group + o_k[:, None] * stride_w + o_n[None, :]
        b_w = tl.load(p_columns, mask=m_k[:, None] & m_n[None, :], other=0.0)  # [BK, BN]
        b_acc = dot(b_x, b_w, b_acc, PRECISION)
    if HAS_BIAS:
        b_acc += tl.load(p_bias + i_g * stride_bias + o_n, mask=m_n, other=0.0).to(ACC)[None, :]
    tl.store(p_tile, narrow(b_acc, p_out.dtype.element_ty), mask=m_out)


def tile_of(kind: str, groups: int, rows: int, columns: int) -> Tile:
    """The largest tile that is not mostly padding and leaves enough programs; otherwise the smallest."""
    *larger, smallest = TILES[kind]
    for tile in larger:
        programs = groups * triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns)
        if programs >= LEAST_PROGRAMS and columns > tile.columns // 2 and rows > tile.rows // 2:
            return tile
    return smallest


def live_product(
    out: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    alive: torch.Tensor,
    zeros: bool,
    precision: str,
) -> None:
    """``out[g] = x[g] @ weight[g] + bias[g]`` where ``alive[g]`` is not 0.

    Rows of ``out`` and ``x`` contiguous, and rows or columns of ``weight``; rows of ``bias`` ``[G, 1, N]`` too.
    """
    (groups, rows, inner), columns = x.shape, weight.shape[2]
    if not out.numel():
        return
    kind = kind_of(x.dtype, precision)
    tile = tile_of(kind, groups, rows, columns)
    by_column = weight.stride(2) != 1
    product[(triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns), groups)](
        x, weight, bias, alive, out, rows, columns, inner,
        x.stride(0), x.stride(1), weight.stride(0), weight.stride(2 if by_column else 1),
        0 if bias is None else bias.stride(0), out.stride(0), out.stride(1),
        BY_COLUMN=by_column, HAS_BIAS=bias is not None, ZEROS=zeros,
        PRECISION=precision if x.dtype == torch.float32 else "ieee",
        ACC=tl.float64 if x.dtype == torch.float64 else tl.float32,
        SIDE=SIDE, BM=tile.rows, BK=tile.inner, BN=tile.columns, num_warps=tile.num_warps, num_stages=stages(tile),
    )  # fmt: skip
