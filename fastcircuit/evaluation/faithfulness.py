"""How well a circuit stands in for the full model: every metric over one split of a task."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastcircuit.circuit import Ablation, Circuit
from fastcircuit.errors import InputError
from fastcircuit.evaluation.bootstrap import CONFIDENCE, bootstrap, check_bootstrap
from fastcircuit.evaluation.cache import Budgets
from fastcircuit.evaluation.metrics import example_means, kl_divergence
from fastcircuit.evaluation.reference import Batch, OnNote, Reference
from fastcircuit.evaluation.registry import Metric, Predictions, Question, check_names, choose
from fastcircuit.masks import Masks
from fastcircuit.models.masked import MaskedCausalLM
from fastcircuit.models.trunk import Trunk
from fastcircuit.tasks.task import Task


def check_circuit_fits(model: MaskedCausalLM, circuit: Circuit) -> None:
    """InputError unless ``circuit`` is of this model's graph, architecture and sizes."""
    if circuit.graph != model.graph:
        raise InputError(f"the circuit is over {circuit.graph}; this model has {model.graph}; {_mend(circuit)}")
    own = model.about
    for key in ("architecture", "hidden_size", "vocab_size"):
        if key in circuit.model and circuit.model[key] != own[key]:
            raise InputError(
                f"the circuit was found in another model: its {key} is {circuit.model[key]}, this model's is "
                f"{own[key]}; {_mend(circuit)}"
            )


def _mend(circuit: Circuit) -> str:
    name = circuit.model.get("name")
    return "run it on the model it was found in" + (f", {name}" if name else "")


def shared_ablation(circuits: Collection[Circuit]) -> tuple[Ablation, str]:
    """The ablation of all the circuits and its output bias; InputError without circuits, or when they differ."""
    if not circuits:
        raise InputError("no circuits; give at least one")
    kinds = {
        circuit.ablation + (" with the output bias kept" if circuit.keeps_output_bias else "") for circuit in circuits
    }
    if len(kinds) > 1:
        raise InputError(
            f"the circuits are of different ablations ({', '.join(sorted(kinds))}); compare circuits of one ablation"
        )
    first = next(iter(circuits))
    return first.ablation, first.output_bias


def evaluate(
    model: MaskedCausalLM,
    circuit: Circuit,
    task: Task,
    split: str = "test",
    metrics: Sequence[str] | None = None,
    resamples: int = 0,
    confidence: float = CONFIDENCE,
    seed: int = 0,
    on_note: OnNote | None = None,
) -> dict[str, Any]:
    """Faithfulness of ``circuit`` on one split, removed edges ablated as the circuit says.

    Means and zeros of mean and zero ablation come from the train split's corrupted prompts.

    Args:
        metrics: names out of ``registry.METRICS``; None: all that the task has.
        resamples: bootstrap resamples for confidence intervals of every mean; 0: none.
        confidence: of the intervals.
        seed: of the bootstrap.
        on_note: called with a line when memory runs out and smaller batches are used.

    Returns:
        Every metric, the mean over examples of the mean over each one's answers, and, where the full model has one
        too, that as ``model_NAME``; ``examples``, and with ``resamples`` ``intervals``, ``{name: [low, high]}``.

    Raises:
        InputError: a circuit of another model, no such split, an unknown metric or one that the task has not got.
        RunError: memory ran out with a single example at a time.
    """
    check_names(metrics)
    if resamples:
        check_bootstrap(resamples, confidence)
    check_circuit_fits(model, circuit)
    reference = task_reference(model, circuit.ablation, task, split, circuit.output_bias, Budgets(0, 0), on_note)
    values = score_examples(reference, Masks.from_circuit(circuit), metrics, task)
    found = _means(values, len(reference))
    if resamples:
        known = {name: column for name, column in values.items() if not np.isnan(column).all()}
        intervals = bootstrap(np.stack(list(known.values())), seed, resamples, confidence)
        found["intervals"] = {name: [i.low, i.high] for name, i in zip(known, intervals, strict=True)}
    return found


def task_reference(
    model: MaskedCausalLM,
    ablation: Ablation,
    task: Task,
    split: str = "test",
    output_bias: str = "split",
    budgets: Budgets | None = None,
    on_note: OnNote | None = None,
) -> Reference:
    """What circuits of one ablation are measured against on a split (the rest as in :class:`Reference`)."""
    examples = task.split(split)
    if not len(examples):
        raise InputError(f"split {split!r} of task {task.name} is empty; there is nothing to evaluate on")
    patching = task.split("train") if ablation == "mean" else None
    return Reference(model, examples, ablation, output_bias, task.answer_tokens, patching, budgets, on_note)


@torch.no_grad()
def circuit_log_probs(reference: Reference, masks: Masks, batch: Batch, trunk: Trunk | None = None) -> Tensor:
    """The masked model's log-probabilities at the batch's answers, ``[N, V or A]``; a ``trunk`` is where to start."""
    model, answers = reference.model, batch.answers.tokens
    read = model.final_read(
        batch.token_ids,
        batch.packing,
        batch.ablated,
        masks,
        answers,
        skip_zeros=True,
        trunk=trunk,
        changing=batch.changing,
    )
    return reference.restrict(model.unembed(read))


def score(
    reference: Reference, masks: Masks, metrics: Sequence[str] | None = None, task: Task | None = None
) -> dict[str, Any]:
    """Metrics of ``masks`` over the examples of ``reference`` (see :func:`evaluate`)."""
    return _means(score_examples(reference, masks, metrics, task), len(reference))


def score_examples(
    reference: Reference, masks: Masks, metrics: Sequence[str] | None = None, task: Task | None = None
) -> dict[str, np.ndarray]:
    """Metrics of every example, float64 ``[examples]``, NaN where an example has none.

    Args:
        task: says whether its answers have an order.
    """
    question = Question.of(reference, task)
    chosen = choose(metrics, question)

    def measure(batch: Batch) -> dict[str, Tensor]:
        predictions = Predictions.at(batch.answers, circuit_log_probs(reference, masks, batch), question)
        return {
            name: example_means(values.double(), batch.answers.example, batch.size).cpu()
            for name, values in _measured(chosen, predictions)
        }

    parts = reference.over_batches(measure)
    return {name: torch.cat([part[name] for part in parts]).numpy() for name in parts[0]}


def _measured(metrics: Sequence[Metric], predictions: Predictions) -> Iterator[tuple[str, Tensor]]:
    for metric in metrics:
        yield metric.name, metric.measure(predictions.circuit, predictions)
    for metric in metrics:
        if metric.of_model:
            yield f"model_{metric.name}", metric.measure(predictions.model, predictions)


def _means(values: dict[str, np.ndarray], examples: int) -> dict[str, Any]:
    known = {name: column[~np.isnan(column)] for name, column in values.items()}
    return {**{name: float(some.mean()) if len(some) else None for name, some in known.items()}, "examples": examples}


def mean_kl(
    reference: Reference, masks: Masks, batches: Iterable[Batch] | None = None, trunk: Trunk | None = None
) -> float:
    """Mean KL over the examples of ``reference``, in nats: the cheap part of :func:`score`.

    Args:
        trunk: of a single batch, where to start.
    """

    def total(batch: Batch) -> tuple[float, int]:
        divergence = kl_divergence(batch.answers.log_probs, circuit_log_probs(reference, masks, batch, trunk))
        return float(batch.answers.example_mean(divergence, batch.size)) * batch.size, batch.size

    parts = [total(batch) for batch in batches] if batches is not None else reference.over_batches(total)
    totals, sizes = zip(*parts, strict=True)
    return sum(totals) / sum(sizes)
