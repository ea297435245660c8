"""Metrics of a circuit's answers against the full model's and the right ones. Each maps ``[N, ...]`` to ``[N]``.

Distributions are log-probabilities over the vocabulary, ``[N, V]``, or over the task's answer tokens, ``[N, A]``.
"""

import torch
from torch import Tensor

NO_TOKEN = -100
NEAR = 10  # years to either side that count in the sharp probability difference
PAIRS_AT_ONCE = 2**24


def kl_divergence(reference: Tensor, log_probs: Tensor) -> Tensor:
    """``KL(reference || circuit) = sum_v p_v (ln p_v - ln q_v)`` in nats: ``[N]`` from two ``[N, V]`` of them."""
    return torch.nn.functional.kl_div(log_probs, reference, reduction="none", log_target=True).sum(-1)


def accuracy(log_probs: Tensor, right: Tensor) -> Tensor:
    """1 where the right token is the most likely one, ``[N]``."""
    return (log_probs.argmax(-1) == right).to(log_probs.dtype)


def range_accuracy(log_probs: Tensor, boundary: Tensor) -> Tensor:
    """1 where the most likely answer comes after the prompt's (column b), ``[N]``: accuracy of an ordered task.

    NaN where there is no b.
    """
    hits = (log_probs.argmax(-1) > boundary).to(log_probs.dtype)
    return torch.where(boundary != NO_TOKEN, hits, torch.nan)


def exact_match(reference: Tensor, log_probs: Tensor) -> Tensor:
    """1 where circuit and full model put the same token first, ``[N]``."""
    return (reference.argmax(-1) == log_probs.argmax(-1)).to(log_probs.dtype)


def logit_difference(log_probs: Tensor, right: Tensor, wrong: Tensor) -> Tensor:
    """``ln P(right) - ln P(wrong)``, ``[N]``; NaN where there is no wrong token."""
    return _difference(log_probs, right, wrong)


def probability_difference(log_probs: Tensor, right: Tensor, wrong: Tensor) -> Tensor:
    """``P(right) - P(wrong)``, ``[N]``; NaN where there is no wrong token."""
    return _difference(log_probs.exp(), right, wrong)


def range_probability_difference(log_probs: Tensor, boundary: Tensor, width: int | None = None) -> Tensor:
    """``P(b + 1 .. b + width) - P(b - width .. b - 1)``, ``[N]``, of ordered answers ``[N, A]`` and the prompt's, b.

    Without ``width`` the ranges reach to both ends: the probability difference of greater-than; with 10 it is the sharp
    one (Edge Pruning, section 4.1 and appendix C), which always answering 99 does not win. b itself counts in neither;
    Hanna et al. 2023 count it as wrong. NaN where there is no b.
    """
    places = torch.arange(log_probs.shape[-1], device=log_probs.device)
    distance = places - boundary[:, None]
    if width is not None:
        distance = torch.where(distance.abs() <= width, distance, 0)
    return torch.where(boundary != NO_TOKEN, (log_probs.exp() * distance.sign()).sum(-1), torch.nan)


def kendall_tau(reference: Tensor, log_probs: Tensor) -> Tensor:
    """Kendall's rank correlation tau-b of two ``[N, A]``, ``[N]``: does the circuit rank the answers as the model does?

    ``(concordant - discordant) / sqrt((pairs - ties of one) (pairs - ties of the other))`` over the ``A (A - 1) / 2``
    pairs of answers (Edge Pruning, appendix C); NaN where all answers are tied.
    """
    rows = max(1, PAIRS_AT_ONCE // log_probs.shape[-1] ** 2)
    found = []
    for some in zip(reference.split(rows), log_probs.split(rows), strict=True):
        first, second = ((values[:, :, None] - values[:, None, :]).sign() for values in some)
        agreeing = (first * second).sum((1, 2))
        untied = first.abs().sum((1, 2)) * second.abs().sum((1, 2))
        found.append(torch.where(untied > 0, agreeing / untied.sqrt(), torch.nan))
    return torch.cat(found)


def example_means(values: Tensor, example: Tensor, count: int) -> Tensor:
    """Mean over each example's answers that are not NaN: ``[count]`` from ``[N]``; NaN where there is none.

    Args:
        example: which example each answer belongs to, ``[N]``.
    """
    known = ~values.isnan()
    totals = values.new_zeros(count).index_add(0, example[known], values[known])
    return totals / torch.bincount(example[known], minlength=count)


def _difference(values: Tensor, right: Tensor, wrong: Tensor) -> Tensor:
    """``values`` at the right token minus those at the wrong one; NaN where one of them is missing."""
    known = (right != NO_TOKEN) & (wrong != NO_TOKEN)
    picked = [values.gather(1, token.clamp(min=0)[:, None]).squeeze(1) for token in (right, wrong)]
    return torch.where(known, picked[0] - picked[1], torch.nan)
