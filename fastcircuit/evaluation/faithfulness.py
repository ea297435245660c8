"""How well a circuit stands in for the full model: every metric over one split of a task."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fastcircuit.circuit import Circuit
from fastcircuit.errors import InputError
from fastcircuit.evaluation.cache import Budgets
from fastcircuit.evaluation.metrics import accuracy, exact_match, kl_divergence, logit_difference
from fastcircuit.evaluation.reference import Batch, Reference
from fastcircuit.masks import Masks
from fastcircuit.models.masked import MaskedCausalLM
from fastcircuit.tasks.task import Task

BATCH_SIZE = 64


def check_circuit_fits(model: MaskedCausalLM, circuit: Circuit) -> None:
    """InputError unless ``circuit`` is of this model's graph, architecture and sizes."""
    if circuit.graph != model.graph:
        raise InputError(f"the circuit is over {circuit.graph}; this model has {model.graph}")
    own = model.about
    for key in ("architecture", "hidden_size", "vocab_size"):
        if key in circuit.model and circuit.model[key] != own[key]:
            raise InputError(
                f"the circuit was found in another model: its {key} is {circuit.model[key]}, this model's is {own[key]}"
            )


def evaluate(
    model: MaskedCausalLM, circuit: Circuit, task: Task, split: str = "test", output_bias: str = "split"
) -> dict[str, Any]:
    """Faithfulness of ``circuit`` on one split, removed edges ablated as the circuit says.

    Means and zeros of mean and zero ablation come from the train split's corrupted prompts.

    Returns:
        ``kl`` (nats, mean over examples), ``accuracy``, ``exact_match`` and ``model_accuracy`` (fractions of answer
        positions), ``logit_difference`` and ``model_logit_difference`` (nats; None without distractors), ``examples``.
    """
    check_circuit_fits(model, circuit)
    reference = Reference(
        model,
        task.split(split),
        circuit.ablation,
        output_bias,
        task.answer_tokens,
        patching=task.split("train") if circuit.ablation == "mean" else None,
        budgets=Budgets(0, 0),
    )
    return score(reference, Masks.from_circuit(circuit))


@torch.no_grad()
def circuit_log_probs(reference: Reference, masks: Masks, batch: Batch) -> Tensor:
    """The masked model's log-probabilities at the batch's answers, ``[N, V or A]``."""
    model = reference.model
    read = model.final_read(batch.token_ids, batch.packing, batch.ablated, masks, batch.answers.tokens, skip_zeros=True)
    return reference.restrict(model.unembed(read))


def score(reference: Reference, masks: Masks) -> dict[str, Any]:
    """All metrics of ``masks`` over the examples of ``reference`` (see :func:`evaluate`)."""
    totals: dict[str, tuple[float, int]] = {}
    for batch in reference.batches(BATCH_SIZE):
        for name, values in _metrics(reference, masks, batch).items():
            added, counted = batch.answers.example_total(values, batch.size)
            total, count = totals.get(name, (0.0, 0))
            totals[name] = total + float(added), count + int(counted)
    means = {name: total / count if count else None for name, (total, count) in totals.items()}
    return {**means, "examples": len(reference)}


def _metrics(reference: Reference, masks: Masks, batch: Batch) -> dict[str, Tensor]:
    answers = batch.answers
    log_probs = circuit_log_probs(reference, masks, batch)
    right, wrong = (_local(tokens, reference.answer_tokens) for tokens in (answers.right, answers.wrong))
    return {
        "kl": kl_divergence(answers.log_probs, log_probs),
        "accuracy": accuracy(log_probs, right),
        "exact_match": exact_match(answers.log_probs, log_probs),
        "logit_difference": logit_difference(log_probs, right, wrong),
        "model_accuracy": accuracy(answers.log_probs, right),
        "model_logit_difference": logit_difference(answers.log_probs, right, wrong),
    }


def _local(tokens: Tensor, answer_tokens: Tensor | None) -> Tensor:
    """Token ids as columns of the restricted distribution; -100 for what is not among the answer tokens."""
    if answer_tokens is None:
        return tokens
    matches = tokens[:, None] == answer_tokens
    return torch.where(matches.any(1), matches.int().argmax(1), -100)


def mean_kl(reference: Reference, masks: Masks, batches: Iterable[Batch] | None = None) -> float:
    """Mean KL over the examples of ``reference``, in nats: the cheap part of :func:`score`."""
    total, count = 0.0, 0
    for batch in batches if batches is not None else reference.batches(BATCH_SIZE):
        divergence = kl_divergence(batch.answers.log_probs, circuit_log_probs(reference, masks, batch))
        total += float(batch.answers.example_mean(divergence, batch.size)) * batch.size
        count += batch.size
    return total / count
