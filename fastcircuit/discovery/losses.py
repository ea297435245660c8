"""What an attribution explains: one number per answer position that rises as the behaviour is lost."""

import torch
from torch import Tensor

from fastcircuit.errors import InputError
from fastcircuit.evaluation.metrics import NO_TOKEN, kl_divergence
from fastcircuit.evaluation.reference import Answers, Reference

LOSSES = ("kl", "logit-difference", "nll")


def examples_with_loss(loss: str, reference: Reference) -> int:
    """How many examples have a loss: all, or for ``logit-difference`` those with a distractor; InputError if none."""
    examples = reference.examples
    if loss != "logit-difference":
        return len(examples)
    count = int((examples.answer_mask & (examples.distractors != NO_TOKEN)).any(1).sum())
    if not count:
        raise InputError("no example has a distractor for a logit difference; give distractors, or use loss nll")
    return count


def position_losses(loss: str, reference: Reference, logits: Tensor, answers: Answers) -> Tensor:
    """The loss at every answer position, nats, ``[N]`` from logits ``[N, V]``; NaN where there is none.

    ``kl``: KL(full model || this). ``logit-difference``: wrong minus right logit. ``nll``: ``-ln P(right)``.
    """
    if loss == "kl":
        return kl_divergence(answers.log_probs, reference.restrict(logits))
    wide = logits if logits.dtype in (torch.float32, torch.float64) else logits.float()
    right = wide.gather(1, answers.right[:, None]).squeeze(1)
    if loss == "logit-difference":
        wrong = wide.gather(1, answers.wrong.clamp(min=0)[:, None]).squeeze(1)
        return torch.where(answers.wrong != NO_TOKEN, wrong - right, torch.nan)
    tokens = reference.answer_tokens
    return (wide if tokens is None else wide.index_select(1, tokens)).logsumexp(1) - right


def loss_gradient(loss: str, reference: Reference, read: Tensor, answers: Answers, size: int) -> Tensor:
    """Gradient, at the final read ``[N, d]``, of the loss of a batch: the sum over examples of their answers' mean."""
    with torch.enable_grad():
        leaf = read.detach().requires_grad_()
        values = position_losses(loss, reference, reference.model.unembed(leaf), answers)
        (grad,) = torch.autograd.grad(answers.example_total(values, size)[0], leaf)
    return grad
