"""The distillation baseline: a smaller student trained from nothing, on the prompts an extraction sees.

Garcia-Carrasco et al. 2024, section 5: the student has the model's architecture with fewer layers, as many as fit the
extracted model's size, and is trained with Adam, learning rate 1e-3, on ``||z_teacher - z_student||^2`` of the logits.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from fastcircuit.errors import InputError, RunError
from fastcircuit.evaluation.metrics import example_means, kl_divergence
from fastcircuit.extraction.prune import MOST_EXAMPLES, halves
from fastcircuit.models.masked import MaskedCausalLM
from fastcircuit.submodel.sizes import size_of
from fastcircuit.tasks.task import Examples, Task

LEARNING_RATE = 1e-3
BATCH_SIZE = 64
CHECKS = 20  # how often the student is measured during training


@dataclass(frozen=True)
class Distillation:
    """A trained student, at the epoch where its accuracy on validation prompts was best.

    Args:
        layers: of the student.
        parameters: of its blocks, without embeddings.
        accuracy, kl: on the test split; KL(teacher || student) in nats.
        epochs: trained in all; ``best_epoch`` is the one reported.
    """

    student: Any
    layers: int
    parameters: int
    accuracy: float
    kl: float
    epochs: int
    best_epoch: int

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        names = ("layers", "parameters", "accuracy", "kl", "epochs", "best_epoch")
        return {name: getattr(self, name) for name in names}


def distill(
    model: MaskedCausalLM,
    task: Task,
    most_parameters: int,
    epochs: int,
    *,
    most_examples: int = MOST_EXAMPLES,
    seed: int = 0,
    on_epoch: Callable[[int, int], None] | None = None,
) -> Distillation:
    """Train the largest student whose blocks have at most ``most_parameters``.

    Args:
        epochs: over the prompts an extraction takes its means from (the paper: 20,000); the student is chosen on those
            an extraction chooses by.
        seed: of the student's weights, the two halves of the train split, and the order of the prompts.
        on_epoch: called with the epochs trained and how many there are.

    Raises:
        InputError: not even one layer fits, or epochs below 1.
        RunError: the loss is not finite.
    """
    if epochs < 1:
        raise InputError(f"epochs is {epochs}; a student needs at least 1")
    train, validation = halves(task, most_examples, seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        student, layers = largest_student(model, most_parameters)
        best = _train(model, student, task, train, validation, epochs, on_epoch)
    student.load_state_dict(best[2])
    found = _measure(model, student, task, task.split("test"))
    return Distillation(student, layers, size_of(student).blocks, *found, epochs, best[1])


def largest_student(model: MaskedCausalLM, most_parameters: int) -> tuple[Any, int]:
    """An untrained model like ``model`` with as many layers as fit, and how many those are."""
    for layers in range(model.graph.num_layers, 0, -1):
        student = _student(model, layers)
        if size_of(student).blocks <= most_parameters:
            return student.to(device=model.device, dtype=model.dtype), layers
    least = size_of(_student(model, 1)).blocks
    raise InputError(
        f"a student of one layer has {least:,} parameters without embeddings, more than the {most_parameters:,} "
        "allowed; there is nothing to compare with"
    )


def _student(model: MaskedCausalLM, layers: int) -> Any:
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = config.layer_types[:layers]
    return AutoModelForCausalLM.from_config(config)


def _train(
    model: MaskedCausalLM,
    student: Any,
    task: Task,
    train: Examples,
    validation: Examples,
    epochs: int,
    on_epoch: Callable[[int, int], None] | None,
) -> tuple[float, int, dict[str, Tensor]]:
    """Accuracy on validation, epoch and weights of the best student."""
    optimizer = torch.optim.Adam(student.parameters(), lr=LEARNING_RATE)
    chunks = torch.arange(len(train)).split(BATCH_SIZE)
    with torch.no_grad():
        targets = [answer_logits(model.model, train.select(chunk)) for chunk in chunks]
    best: tuple[float, int, dict[str, Tensor]] | None = None
    for epoch in range(1, epochs + 1):
        student.train()
        for place in torch.randperm(len(chunks)).tolist():
            loss = (answer_logits(student, train.select(chunks[place])) - targets[place]).square().sum(-1).mean()
            if not bool(torch.isfinite(loss)):
                raise RunError(f"the student's loss is {float(loss)} in epoch {epoch}; use a wider dtype")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if epoch == epochs or epoch % max(1, epochs // CHECKS) == 0:
            accuracy, _ = _measure(model, student, task, validation)
            if best is None or accuracy > best[0]:
                best = accuracy, epoch, copy.deepcopy(student.state_dict())
        if on_epoch is not None:
            on_epoch(epoch, epochs)
    assert best is not None
    return best


def answer_logits(model: Any, examples: Examples) -> Tensor:
    """Logits of a Hugging Face model at the answers, ``[N, V]``."""
    mask = examples.attention_mask.to(model.device)
    logits = model(input_ids=examples.input_ids.to(model.device), attention_mask=mask, use_cache=False).logits
    return logits[examples.answer_mask.to(model.device)]


@torch.no_grad()
def _measure(model: MaskedCausalLM, student: Any, task: Task, examples: Examples) -> tuple[float, float]:
    """Accuracy, among the task's answer tokens, and KL(teacher || student) over the vocabulary, in nats."""
    student.eval()
    hits, kls = [], []
    for chunk in torch.arange(len(examples)).split(BATCH_SIZE):
        some = examples.select(chunk)
        own, teacher = (answer_logits(m, some).double().cpu() for m in (student, model.model))
        right, wrong = (tokens[some.answer_mask] for tokens in (some.answers, some.distractors))
        example = some.answer_mask.nonzero()[:, 0]
        hits.append(example_means(_hits(own, task, right, wrong), example, len(some)))
        divergence = kl_divergence(teacher.log_softmax(-1), own.log_softmax(-1))
        kls.append(example_means(divergence, example, len(some)))
    return float(torch.cat(hits).mean()), float(torch.cat(kls).mean())


def _hits(logits: Tensor, task: Task, right: Tensor, wrong: Tensor) -> Tensor:
    """1 where the most likely answer is right, ``[N]``."""
    if task.answer_tokens is None:
        return (logits.argmax(-1) == right).double()
    places = logits[:, list(task.answer_tokens)].argmax(-1)
    return task.right_answers(right, wrong).gather(1, places[:, None]).squeeze(1).double()
