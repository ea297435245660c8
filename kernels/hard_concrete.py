"""Triton kernels of hard_concrete: every mask's sample and the probability that it is not 0, and their gradient."""

import torch
import triton
import triton.language as tl

BLOCK = 512


@triton.jit
def _sigmoid(b_x):
    return 1 / (1 + tl.exp(-b_x))


@triton.jit
def sample(
    p_log_alpha, p_seed, p_z, p_on, n,
    TEMPERATURE: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, EPSILON: tl.constexpr, ZERO_LEVEL: tl.constexpr,
    ACC: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """z[n] and on[n] from log_alpha[n] and the counter-based generator's key and counter, seed[2]."""
    o_i = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    m_i = o_i < n
    seed, offset = tl.load(p_seed), tl.load(p_seed + 1)
    b_count = o_i.to(tl.uint32)
    b_low = b_count * 0 + (offset & 0xFFFFFFFF).to(tl.uint32)
    b_high = b_count * 0 + ((offset >> 32) & 0xFFFFFFFF).to(tl.uint32)
    b_random, _, _, _ = tl.philox(seed, b_count, b_low, b_high, b_count * 0)
    # u and 1 - u, each of full precision: near 1 the difference would have none.
    b_step = (b_random >> 9).to(ACC) + 0.5
    scale: tl.constexpr = (1 - 2 * EPSILON) / 8388608
    b_logit = tl.log(EPSILON + scale * b_step) - tl.log(EPSILON + scale * (8388608 - b_step))
    b_alpha = tl.load(p_log_alpha + o_i, mask=m_i, other=0.0).to(ACC)
    b_s = _sigmoid((b_logit + b_alpha) / TEMPERATURE)
    b_z = tl.minimum(tl.maximum(b_s * (HIGH - LOW) + LOW, 0), 1)
    tl.store(p_z + o_i, b_z.to(p_z.dtype.element_ty), mask=m_i)
    tl.store(p_on + o_i, _sigmoid(b_alpha - ZERO_LEVEL).to(p_on.dtype.element_ty), mask=m_i)


@triton.jit
def sample_gradient(
    p_grad_z, p_grad_on, p_z, p_on, p_grad, n,
    TEMPERATURE: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, ACC: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The gradient of log_alpha[n] from those of z[n] and on[n]; z says what the uniform number was."""
    o_i = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    m_i = o_i < n
    b_z = tl.load(p_z + o_i, mask=m_i, other=0.0).to(ACC)
    b_on = tl.load(p_on + o_i, mask=m_i, other=0.0).to(ACC)
    b_s = (b_z - LOW) / (HIGH - LOW)
    b_slope = tl.where((b_z > 0) & (b_z < 1), (HIGH - LOW) * b_s * (1 - b_s) / TEMPERATURE, 0)
    b_grad = tl.load(p_grad_z + o_i, mask=m_i, other=0.0).to(ACC) * b_slope
    b_grad += tl.load(p_grad_on + o_i, mask=m_i, other=0.0).to(ACC) * b_on * (1 - b_on)
    tl.store(p_grad + o_i, b_grad.to(p_grad.dtype.element_ty), mask=m_i)


def _accumulator(tensor: torch.Tensor) -> tl.dtype:
    return tl.float64 if tensor.dtype == torch.float64 else tl.float32


def hard_concrete(
    log_alpha: torch.Tensor,
    seed: torch.Tensor,
    temperature: float,
    low: float,
    high: float,
    epsilon: float,
    zero_level: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Samples and probabilities of not being 0; ``log_alpha`` and ``seed`` contiguous."""
    z, on = torch.empty_like(log_alpha), torch.empty_like(log_alpha)
    n = log_alpha.numel()
    if n:
        sample[(triton.cdiv(n, BLOCK),)](
            log_alpha, seed, z, on, n,
            TEMPERATURE=temperature, LOW=low, HIGH=high, EPSILON=epsilon, ZERO_LEVEL=zero_level,
            ACC=_accumulator(log_alpha), BN=BLOCK,
        )  # fmt: skip
    return z, on


def hard_concrete_grad(
    grad_z: torch.Tensor,
    grad_on: torch.Tensor,
    z: torch.Tensor,
    on: torch.Tensor,
    temperature: float,
    low: float,
    high: float,
) -> torch.Tensor:
    """The gradient of ``log_alpha``; all contiguous."""
    grad, n = torch.empty_like(z), z.numel()
    if n:
        sample_gradient[(triton.cdiv(n, BLOCK),)](
            grad_z, grad_on, z, on, grad, n,
            TEMPERATURE=temperature, LOW=low, HIGH=high, ACC=_accumulator(z), BN=BLOCK,
        )  # fmt: skip
    return grad
