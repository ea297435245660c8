"""The metrics by name, and which of them a task has."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastcircuit.errors import InputError
from fastcircuit.evaluation import metrics
from fastcircuit.evaluation.reference import Answers, Reference
from fastcircuit.tasks.task import Task


@dataclass(frozen=True)
class Question:
    """What kind of answers a task has: what decides which metrics apply.

    Args:
        task: its name, for errors.
        answer_tokens: answers are compared among these, ``[A]``; None: the vocabulary.
        ordered: right are all answer tokens after the distractor.
        distractors: there are wrong answers to compare with.
    """

    task: str
    answer_tokens: Tensor | None
    ordered: bool
    distractors: bool

    @classmethod
    def of(cls, reference: Reference, task: Task | None = None) -> "Question":
        """The question the examples of ``reference`` ask; without its task, one whose answers have no order."""
        examples = reference.examples
        known = bool((examples.distractors[examples.answer_mask] != metrics.NO_TOKEN).any())
        return cls(task.name if task else "", reference.answer_tokens, task is not None and task.ordered, known)


@dataclass(frozen=True)
class Predictions:
    """Log-probabilities of the full model and of a circuit at N answers, ``[N, V or A]``, and what is right, ``[N]``.

    ``right`` and ``wrong`` are columns of the distributions; in an ordered task ``wrong`` is the boundary.
    """

    model: Tensor
    circuit: Tensor
    right: Tensor
    wrong: Tensor
    ordered: bool

    @classmethod
    def at(cls, answers: Answers, log_probs: Tensor, question: Question) -> "Predictions":
        right, wrong = (_column(tokens, question.answer_tokens) for tokens in (answers.right, answers.wrong))
        return cls(answers.log_probs, log_probs, right, wrong, question.ordered)


@dataclass(frozen=True)
class Metric:
    """One metric.

    Args:
        label: with its unit, for tables.
        measure: ``[N]`` from log-probabilities and the predictions they are among.
        of_model: the full model has one too; otherwise the metric compares circuit and model.
        lacks: what a task lacks that the metric needs; None when it has all.
        better: +1 where more is better, -1 where less is.
    """

    name: str
    label: str
    measure: Callable[[Tensor, Predictions], Tensor]
    of_model: bool
    lacks: Callable[[Question], str | None]
    better: int = 1


def _column(tokens: Tensor, answer_tokens: Tensor | None) -> Tensor:
    """Token ids as columns of the restricted distribution; -100 for what is not among the answer tokens."""
    if answer_tokens is None:
        return tokens
    matches = tokens[:, None] == answer_tokens
    return torch.where(matches.any(1), matches.int().argmax(1), metrics.NO_TOKEN)


def _kl(log_probs: Tensor, among: Predictions) -> Tensor:
    return metrics.kl_divergence(among.model, log_probs)


def _exact_match(log_probs: Tensor, among: Predictions) -> Tensor:
    return metrics.exact_match(among.model, log_probs)


def _kendall_tau(log_probs: Tensor, among: Predictions) -> Tensor:
    return metrics.kendall_tau(among.model, log_probs)


def _accuracy(log_probs: Tensor, among: Predictions) -> Tensor:
    if among.ordered:
        return metrics.range_accuracy(log_probs, among.wrong)
    return metrics.accuracy(log_probs, among.right)


def _logit_difference(log_probs: Tensor, among: Predictions) -> Tensor:
    return metrics.logit_difference(log_probs, among.right, among.wrong)


def _probability_difference(log_probs: Tensor, among: Predictions) -> Tensor:
    if among.ordered:
        return metrics.range_probability_difference(log_probs, among.wrong)
    return metrics.probability_difference(log_probs, among.right, among.wrong)


def _near_probability_difference(log_probs: Tensor, among: Predictions) -> Tensor:
    return metrics.range_probability_difference(log_probs, among.wrong, metrics.NEAR)


def _nothing(question: Question) -> str | None:
    return None


def _distractors(question: Question) -> str | None:
    return None if question.distractors else "a wrong answer (distractor) to compare with"


def _order(question: Question) -> str | None:
    return None if question.ordered else "answers that have an order"


def _answer_tokens(question: Question) -> str | None:
    return None if question.answer_tokens is not None else "a list of answer tokens to rank"


METRICS = {
    metric.name: metric
    for metric in (
        Metric("kl", "KL(full || circuit), nats", _kl, False, _nothing, better=-1),
        Metric("accuracy", "accuracy", _accuracy, True, _nothing),
        Metric("exact_match", "same first token", _exact_match, False, _nothing),
        Metric("logit_difference", "logit difference, nats", _logit_difference, True, _distractors),
        Metric("probability_difference", "probability difference", _probability_difference, True, _distractors),
        Metric(
            "probability_difference_10",
            "probability difference, 10 to either side",
            _near_probability_difference,
            True,
            _order,
        ),
        Metric("kendall_tau", "rank correlation (Kendall's tau)", _kendall_tau, False, _answer_tokens),
    )
}


def choose(names: Sequence[str] | None, question: Question) -> list[Metric]:
    """The metrics of these names, or all that the question has.

    Raises:
        InputError: an unknown metric, or one that the task has not got.
    """
    check_names(names)
    own = [metric for metric in METRICS.values() if metric.lacks(question) is None]
    if names is None:
        return own
    for name in names:
        lacking = METRICS[name].lacks(question)
        if lacking is not None:
            raise InputError(
                f"metric {name} needs {lacking}, which task {question.task} has not; "
                f"its metrics are {', '.join(metric.name for metric in own)}"
            )
    return [METRICS[name] for name in dict.fromkeys(names)]


def check_names(names: Sequence[str] | None) -> None:
    """InputError for an unknown metric, or none at all."""
    if names is not None and not names:
        raise InputError(f"no metric is named; metrics are {', '.join(METRICS)}")
    for name in names or ():
        if name not in METRICS:
            raise InputError(f"no metric {name!r}; metrics are {', '.join(METRICS)}")


def performance_metric(question: Question) -> Metric:
    """What faithfulness recovers: the probability difference of an ordered task, the logit difference of one with
    distractors, and otherwise accuracy.
    """
    if question.ordered:
        return METRICS["probability_difference"]
    return METRICS["logit_difference" if question.distractors else "accuracy"]
