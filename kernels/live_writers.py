"""Triton kernel of live_writers: which writers have to be read, by which readers, found without the host knowing."""

import torch
import triton
import triton.language as tl

BLOCK_NUMBERS = 4096


@triton.jit
def order_writers(
    p_mask, p_wanted, p_live, R, W, stride_reader, stride_writer,
    CHOSEN: tl.constexpr, BR: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """live[W + 2 + R] of mask[R, W], by one program: there are few numbers, and every place depends on all of them."""
    o_w = tl.arange(0, BW)
    m_w = o_w < W
    b_open = tl.zeros([BW], dtype=tl.int32)
    b_live = tl.zeros([BW], dtype=tl.int32)
    for r in range(0, R, BR):
        o_r = (r + tl.arange(0, BR)).to(tl.int64)
        m_r = o_r < R
        if CHOSEN:
            m_r &= tl.load(p_wanted + o_r, mask=m_r, other=0) != 0
        p_z = p_mask + o_r[:, None] * stride_reader + o_w[None, :].to(tl.int64) * stride_writer
        b_z = tl.load(p_z, mask=m_r[:, None] & m_w[None, :], other=0.0)  # [BR, BW]
        b_open = tl.maximum(b_open, tl.max(((b_z > 0) & (b_z < 1)).to(tl.int32), axis=0))
        b_live = tl.maximum(b_live, tl.max((b_z != 0).to(tl.int32), axis=0))
        tl.store(p_live + 2 + W + o_r, m_r.to(tl.int32), mask=o_r < R)
    b_closed = b_live - b_open
    b_dead = m_w.to(tl.int32) - b_live
    n_open, n_live = tl.sum(b_open, axis=0), tl.sum(b_live, axis=0)
    b_place = tl.where(b_open == 1, tl.cumsum(b_open, axis=0), n_open + tl.cumsum(b_closed, axis=0))
    b_place = tl.where(b_dead == 1, n_live + tl.cumsum(b_dead, axis=0), b_place) - 1
    tl.store(p_live, n_open)
    tl.store(p_live + 1, n_live)
    tl.store(p_live + 2 + b_place.to(tl.int64), o_w, mask=m_w)


def live_writers(mask: torch.Tensor, wanted: torch.Tensor | None) -> torch.Tensor:
    """How many writers are open and live, the rows of the open, other live and dead ones; then 1 per wanted reader.

    ``wanted`` int32, contiguous; None: all are.
    """
    readers, writers = mask.shape
    live = torch.empty(writers + 2 + readers, dtype=torch.int32, device=mask.device)
    width = max(16, triton.next_power_of_2(writers))
    order_writers[(1,)](
        mask, wanted, live, readers, writers, *mask.stride(),
        CHOSEN=wanted is not None, BR=max(1, BLOCK_NUMBERS // width), BW=width, num_warps=8,
    )  # fmt: skip
    return live
