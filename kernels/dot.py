"""Block products: one dtype rule for all kernels."""

import triton
import triton.language as tl

# The interpreter takes a bfloat16's bits for an integer when it multiplies; its products in float32 are the same.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def _multiply(b_a, b_b, b_acc, PRECISION: tl.constexpr):
    if INTERPRETED:
        b_acc = tl.dot(b_a.to(tl.float32), b_b.to(tl.float32), b_acc)
    else:
        b_acc = tl.dot(b_a, b_b, b_acc, input_precision=PRECISION)
    return b_acc


@triton.jit
def dot(b_a, b_b, b_acc, PRECISION: tl.constexpr, PIECES: tl.constexpr = 2):
    """``b_acc + b_a @ b_b`` for blocks ``[BM, BK]`` and ``[BK, BN]``, the sum in the dtype of ``b_acc``.

    A float32 ``b_a`` beside a half ``b_b`` is cut into PIECES of that half precision, so that a mask loses nothing that
    shows in the result: two for a half result, three for float32. (Three float16 would lose what is too small for its
    exponents; there ``b_b``, which TF32 holds exactly, is widened.) PRECISION is what a float32 product does with its
    operands, ``input_precision`` of ``tl.dot``.
    """
    if tl.constexpr(tl.float64 == b_acc.dtype):
        # tl.dot has no float64 everywhere; a sum has.
        b_acc += tl.sum(b_a.to(tl.float64)[:, :, None] * b_b.to(tl.float64)[None, :, :], axis=1)
    elif tl.constexpr(b_a.dtype == b_b.dtype):
        b_acc = _multiply(b_a, b_b, b_acc, PRECISION)
    elif tl.constexpr(b_b.dtype == tl.float16 and PIECES == 3):
        b_acc = _multiply(b_a, b_b.to(tl.float32), b_acc, PRECISION)
    else:
        for _ in tl.static_range(PIECES):
            b_piece = b_a.to(b_b.dtype)
            b_acc = _multiply(b_piece, b_b, b_acc, PRECISION)
            b_a -= b_piece.to(b_a.dtype)
    return b_acc
