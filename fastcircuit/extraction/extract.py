"""``extract``: from a model and a task to a smaller model, with what it was measured to be."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from fastcircuit.circuit import Circuit
from fastcircuit.errors import InputError
from fastcircuit.evaluation.bootstrap import Interval
from fastcircuit.evaluation.cache import Budgets
from fastcircuit.evaluation.faithfulness import check_circuit_fits, circuit_log_probs
from fastcircuit.evaluation.metrics import kl_divergence
from fastcircuit.evaluation.reference import Reference
from fastcircuit.extraction.ablation import ablation_constants, check_ablation, equal_length
from fastcircuit.extraction.path import OnCandidate
from fastcircuit.extraction.prune import MOST_EXAMPLES, THRESHOLD, check_numbers, halves, prune
from fastcircuit.extraction.score import score
from fastcircuit.masks import Masks
from fastcircuit.models.masked import MaskedCausalLM
from fastcircuit.submodel.card import CardFacts, model_card
from fastcircuit.submodel.compile import compile_submodel
from fastcircuit.submodel.kept import Constants, Kept
from fastcircuit.submodel.lowering import check_lowers
from fastcircuit.submodel.modeling_circuit import CircuitForCausalLM
from fastcircuit.submodel.saving import save_submodel
from fastcircuit.submodel.sizes import Size, size_of
from fastcircuit.submodel.speed import OnRow, SpeedRow, measure_speed
from fastcircuit.tasks.task import NOTHING, SPLITS, Task

BATCH_SIZE = 64


@dataclass(frozen=True)
class Extraction:
    """A submodel and what it was measured to be.

    Args:
        kept: the components that stay.
        metrics: on the test split, with confidence intervals.
        original, size: parameters of the model and of the submodel.
        validation_kl: ``KL(original || submodel)`` the components were chosen by, in nats; None for a given circuit.
        circuit_kl: ``KL(edge circuit || submodel)`` on the test split, in nats; None without an edge circuit.
        near_ties: decisions that rounding alone could have turned.
    """

    submodel: CircuitForCausalLM
    kept: Kept
    task: str
    ablation: str
    metrics: dict[str, Interval]
    original: Size
    size: Size
    validation_kl: float | None
    circuit_kl: float | None
    near_ties: int
    provenance: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """What ``fastcircuit extract --json`` prints."""
        return {
            "heads": [[int(head) for head in row.nonzero()[0]] for row in self.kept.heads],
            "mlps": [int(layer) for layer in self.kept.mlps.nonzero()[0]],
            "parameters": {"original": self.original.total, "submodel": self.size.total},
            "parameters_without_embeddings": {"original": self.original.blocks, "submodel": self.size.blocks},
            "validation_kl": self.validation_kl,
            "circuit_kl": self.circuit_kl,
            "near_ties": self.near_ties,
            "test": {name: {"mean": i.mean, "low": i.low, "high": i.high} for name, i in self.metrics.items()},
        }

    def save(self, directory: str | os.PathLike[str], tokenizer: Any = None, speed: Sequence[SpeedRow] = ()) -> None:
        """Write the submodel, its tokenizer and its card (see :func:`save_submodel`)."""
        facts = CardFacts(
            task=self.task,
            ablation=self.ablation,
            original=self.original,
            metrics={name: interval.mean for name, interval in self.metrics.items()},
            speed=[row.to_dict() for row in speed],
            provenance=self.provenance,
        )
        save_submodel(self.submodel, directory, tokenizer=tokenizer, card=model_card(self.submodel, facts))


def extract(model: MaskedCausalLM | transformers.PreTrainedModel, task: Task, **options: Any) -> CircuitForCausalLM:
    """The submodel of ``model`` that is enough for ``task``; see :func:`run_extraction` for the options."""
    return run_extraction(model, task, **options).submodel


def run_extraction(
    model: MaskedCausalLM | transformers.PreTrainedModel,
    task: Task,
    *,
    ablation: str = "mean",
    threshold: float | None = None,
    kl_budget: float | None = None,
    size_budget: float | None = None,
    include_mlps: bool = True,
    output_bias: str = "split",
    circuit: Circuit | None = None,
    answers_only: bool = False,
    seed: int = 0,
    on_candidate: OnCandidate | None = None,
) -> Extraction:
    """Choose the components, compile them to a submodel, and measure it on the test split.

    Args:
        threshold: in nats; None: 0.01, or what a ``size_budget`` needs.
        circuit: keep what this edge circuit keeps, instead of choosing by Algorithm 1; then nothing that says how to
            choose may be given.
        answers_only: logits of the task's answer tokens at the last position only; such a model cannot ``generate``.
        ablation, kl_budget, size_budget, include_mlps, output_bias, seed, on_candidate: as in
            :func:`fastcircuit.extraction.prune.prune`.

    Raises:
        InputError: bad arguments, a task or circuit that does not fit the model, or nothing left.
    """
    check_options(ablation, threshold, kl_budget, size_budget, include_mlps, circuit)
    _check_answers(task, circuit, answers_only)
    model = model if isinstance(model, MaskedCausalLM) else MaskedCausalLM(model)
    check_lowers(model.config)
    chosen: dict[str, Any] = {
        "threshold": threshold,
        "kl_budget": kl_budget,
        "size_budget": size_budget,
        "include_mlps": include_mlps,
    }
    validation_kl, near_ties = None, 0
    if circuit is None:
        found = prune(
            model, task, ablation=ablation, output_bias=output_bias, seed=seed, on_candidate=on_candidate, **chosen
        )
        kept, constants, metrics = found.kept, found.constants, found.metrics
        validation_kl, near_ties = found.kl, len(found.near_ties)
        chosen["threshold"] = found.threshold
    else:
        check_circuit_fits(model, circuit)
        kept, chosen = kept_by(circuit), {"edge_circuit": f"{circuit.num_edges} edges"}
        constants, metrics = _measure(model, task, kept, ablation, output_bias, seed)
    submodel = _compile(model, task, kept, constants, answers_only)
    return Extraction(
        submodel=submodel,
        kept=kept,
        task=task.name,
        ablation=ablation,
        metrics=metrics,
        original=size_of(model.model),
        size=size_of(submodel),
        validation_kl=validation_kl,
        circuit_kl=None if circuit is None else _kl_of_circuit(model, task, circuit, submodel),
        near_ties=near_ties,
        provenance={
            "model": model.name,
            **{name: value for name, value in chosen.items() if value is not None},
            "seed": seed,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    )


def check_options(
    ablation: str = "mean",
    threshold: float | None = None,
    kl_budget: float | None = None,
    size_budget: float | None = None,
    include_mlps: bool = True,
    circuit: Circuit | None = None,
) -> None:
    """InputError unless :func:`run_extraction` takes these; needs no model, so that it can come first."""
    check_ablation(ablation)
    given = {
        "--threshold": threshold is not None,
        "--kl-budget": kl_budget is not None,
        "--size-budget": size_budget is not None,
        "--no-mlps": not include_mlps,
    }
    idle = [name for name, is_given in given.items() if is_given]
    if circuit is not None and idle:
        raise InputError(
            f"{', '.join(idle)}: with --circuit the circuit says what is kept and nothing is searched; leave one out"
        )
    check_numbers([THRESHOLD if threshold is None else threshold], kl_budget, size_budget)


def _check_answers(task: Task, circuit: Circuit | None, answers_only: bool) -> None:
    if circuit is not None and answers_only and task.answer_tokens is None:
        raise InputError(
            f"task {task.name} names no answer tokens, so the KL against an edge circuit needs the whole vocabulary; "
            "leave out --answers-only"
        )


def kept_by(circuit: Circuit) -> Kept:
    """The heads and MLPs that write to any edge of ``circuit``."""
    graph = circuit.graph
    nodes = set(circuit.nodes)
    heads = [[f"a{layer}.h{head}" in nodes for head in range(graph.num_heads)] for layer in range(graph.num_layers)]
    kept = Kept(np.array(heads), np.array([f"m{layer}" in nodes for layer in range(graph.num_layers)]))
    if not (kept.heads.any() or kept.mlps.any()):
        raise InputError("the circuit keeps no head and no MLP; there is nothing to extract")
    return kept


def speed_of(model: MaskedCausalLM, extraction: Extraction, task: Task, on_row: OnRow | None = None) -> list[SpeedRow]:
    """A quick measurement at the task's own prompt length (see :func:`measure_speed`)."""
    length = max(int(task.split("test").attention_mask.sum(1).max()), 16)
    return measure_speed(model.model, extraction.submodel, length, batches=(1, 32), rounds=5, on_row=on_row)


def answer_tokens_of(task: Task) -> tuple[int, ...]:
    """The task's answer tokens: those it names, or every answer and distractor of its examples."""
    if task.answer_tokens is not None:
        return task.answer_tokens
    found: set[int] = set()
    for name in SPLITS:
        if name in task.splits:
            examples = task.split(name)
            found |= set(examples.answers.flatten().tolist()) | set(examples.distractors.flatten().tolist())
    return tuple(sorted(found - {NOTHING}))


def _measure(
    model: MaskedCausalLM, task: Task, kept: Kept, ablation: str, output_bias: str, seed: int
) -> tuple[Constants, dict[str, Interval]]:
    """What the removed components of a given choice write, and its metrics on the test split."""
    patching, test = halves(task, MOST_EXAMPLES, seed)[0], task.split("test")
    if ablation == "mean-positional":
        equal_length([patching, test])
    constants = ablation_constants(model, patching, ablation, output_bias)
    return constants, score(model, constants, [kept], test, task.answer_tokens, seed)[0]


def _compile(
    model: MaskedCausalLM, task: Task, kept: Kept, constants: Constants, answers_only: bool
) -> CircuitForCausalLM:
    tokens = answer_tokens_of(task) if answers_only else None
    submodel = compile_submodel(
        model, kept, constants, answer_tokens=tokens, last_position_only=answers_only, fold_norms=True
    )
    assert submodel.config.source is not None
    submodel.config.source["model"] = model.name
    submodel.to(device=model.device)  # type: ignore[call-arg, arg-type]
    return submodel.eval()


@torch.no_grad()
def _kl_of_circuit(model: MaskedCausalLM, task: Task, circuit: Circuit, submodel: CircuitForCausalLM) -> float:
    """``KL(edge circuit || submodel)``: mean over answer positions, then over test examples."""
    test = task.split("test")
    patching = task.split("train") if circuit.ablation == "mean" else None
    reference = Reference(
        model, test, circuit.ablation, circuit.output_bias, task.answer_tokens, patching, budgets=Budgets(0, 0)
    )
    masks, total, first = Masks.from_circuit(circuit), 0.0, 0
    for batch in reference.batches(BATCH_SIZE):
        examples = test.select(torch.arange(first, first + batch.size))
        own = reference.restrict(_answer_logits(submodel, examples, task))
        divergence = kl_divergence(circuit_log_probs(reference, masks, batch), own)
        total += float(batch.answers.example_mean(divergence, batch.size)) * batch.size
        first += batch.size
    return total / len(test)


def _answer_logits(submodel: CircuitForCausalLM, examples: Any, task: Task) -> Tensor:
    """The submodel's logits at the answers, over the vocabulary, ``[N, V]``."""
    device = submodel.device
    logits = submodel(
        input_ids=examples.input_ids.to(device), attention_mask=examples.attention_mask.to(device), logits_to_keep=0
    ).logits
    chosen: Tensor = logits[examples.answer_mask.to(device)]
    if submodel.config.answer_tokens is None:
        return chosen
    full = chosen.new_full((len(chosen), submodel.config.vocab_size), -torch.inf)
    return full.index_copy(1, torch.tensor(submodel.config.answer_tokens, device=device), chosen)
