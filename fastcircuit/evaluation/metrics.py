"""Metrics of a circuit's answers against the full model's and the right ones. Each maps ``[N, ...]`` to ``[N]``."""

import torch
from torch import Tensor

NO_TOKEN = -100


def kl_divergence(reference: Tensor, log_probs: Tensor) -> Tensor:
    """``KL(reference || circuit) = sum_v p_v (ln p_v - ln q_v)`` in nats: ``[N]`` from two ``[N, V]`` of them."""
    return torch.nn.functional.kl_div(log_probs, reference, reduction="none", log_target=True).sum(-1)


def accuracy(log_probs: Tensor, right: Tensor) -> Tensor:
    """1 where the right token is the most likely one, ``[N]``."""
    return (log_probs.argmax(-1) == right).to(log_probs.dtype)


def exact_match(reference: Tensor, log_probs: Tensor) -> Tensor:
    """1 where circuit and full model put the same token first, ``[N]``."""
    return (reference.argmax(-1) == log_probs.argmax(-1)).to(log_probs.dtype)


def logit_difference(log_probs: Tensor, right: Tensor, wrong: Tensor) -> Tensor:
    """``ln P(right) - ln P(wrong)``, ``[N]``; NaN where there is no wrong token."""
    known = (right != NO_TOKEN) & (wrong != NO_TOKEN)
    picked = [log_probs.gather(1, token.clamp(min=0)[:, None]).squeeze(1) for token in (right, wrong)]
    return torch.where(known, picked[0] - picked[1], torch.nan)
