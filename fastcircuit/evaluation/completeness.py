"""Completeness: does the circuit change as the model does when parts of the circuit are removed from both?

Wang et al. 2023, "Interpretability in the Wild", section 4.1: for subsets K of the circuit C, the incompleteness is
``|F(C \\ K) - F(M \\ K)|`` for a performance metric F. A circuit that misses what the model falls back on is complete
at K = nothing and incomplete elsewhere.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from fastcircuit.circuit import Circuit
from fastcircuit.errors import InputError
from fastcircuit.evaluation.faithfulness import check_circuit_fits, score, task_reference
from fastcircuit.evaluation.reference import OnNote
from fastcircuit.evaluation.registry import Question, choose, performance_metric
from fastcircuit.masks import Masks
from fastcircuit.models.masked import MaskedCausalLM
from fastcircuit.tasks.task import Task

SUBSETS = 20


def completeness(
    model: MaskedCausalLM,
    circuit: Circuit,
    task: Task,
    split: str = "test",
    metric: str | None = None,
    subsets: int = SUBSETS,
    seed: int = 0,
    on_subset: Callable[[int, int], None] | None = None,
    on_note: OnNote | None = None,
) -> dict[str, Any]:
    """Incompleteness over nothing, the whole circuit, and random subsets of its edges between them.

    Args:
        metric: F; None: the task's (see ``registry.performance_metric``).
        subsets: how many random subsets, of sizes evenly spread from one edge to all but one.
        on_subset: called with the subsets measured and how many there are.
        on_note: called with a line when memory runs out and smaller batches are used.

    Returns:
        ``metric``; ``mean`` and ``worst`` incompleteness; ``subsets``, rows of ``removed`` (edges), ``circuit`` and
        ``model`` (the metric of both without them).
    """
    check_circuit_fits(model, circuit)
    if not circuit.num_edges or subsets < 0:
        raise InputError(f"completeness needs a circuit with edges and subsets from 0; got {circuit}, {subsets}")
    reference = task_reference(model, circuit.ablation, task, split, circuit.output_bias, on_note=on_note)
    question = Question.of(reference, task)
    name = performance_metric(question).name if metric is None else choose([metric], question)[0].name
    rows: list[dict[str, Any]] = []
    for removed in _subsets(circuit, subsets, np.random.default_rng(seed)):
        kept = Circuit(circuit.graph, ~removed, ablation=circuit.ablation)
        values = (score(reference, Masks.from_circuit(one), [name], task)[name] for one in (circuit & kept, kept))
        rows.append({"removed": int(removed.sum()), **dict(zip(("circuit", "model"), values, strict=True))})
        if on_subset is not None:
            on_subset(len(rows), subsets + 2)
    gaps = [abs(row["circuit"] - row["model"]) for row in rows]
    return {"metric": name, "mean": float(np.mean(gaps)), "worst": max(gaps), "subsets": rows}


def _subsets(circuit: Circuit, count: int, generator: np.random.Generator) -> Iterator[np.ndarray]:
    """Flags of the removed edges, ``[num_edges]``: none, some, ..., all of the circuit's."""
    edges = np.flatnonzero(circuit.keep)
    inner = np.linspace(0, len(edges), count + 2)[1:-1]
    for size in (0, *(min(max(1, round(size)), len(edges)) for size in inner), len(edges)):
        removed = np.zeros(circuit.graph.num_edges, dtype=bool)
        removed[generator.choice(edges, size, replace=False)] = True
        yield removed
