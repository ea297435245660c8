"""Circuits on each other's tasks: section 5 of the Edge Pruning paper."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fastcircuit.circuit import Circuit
from fastcircuit.evaluation.faithfulness import check_circuit_fits, score, shared_ablation, task_reference
from fastcircuit.evaluation.reference import OnNote
from fastcircuit.masks import Masks
from fastcircuit.models.masked import MaskedCausalLM
from fastcircuit.tasks.task import Task


def cross_evaluate(
    model: MaskedCausalLM,
    circuits: Mapping[str, Circuit],
    tasks: Mapping[str, Task],
    split: str = "test",
    metrics: Sequence[str] | None = None,
    on_cell: Callable[[int, int], None] | None = None,
    on_note: OnNote | None = None,
) -> list[dict[str, Any]]:
    """Every circuit, their intersection and union, and the full model, on every task (table 2 of the paper).

    Args:
        circuits, tasks: by the names they are to have in the table.
        on_cell: called with the cells measured and how many there are.
        on_note: called with a line when memory runs out and smaller batches are used.

    Returns:
        Rows of ``circuit`` (its name), ``edges`` and ``task``, with the metrics (see
        :func:`fastcircuit.evaluation.faithfulness.evaluate`).

    Raises:
        InputError: a circuit of another model, circuits of several ablations.
    """
    for circuit in circuits.values():
        check_circuit_fits(model, circuit)
    ablation, output_bias = shared_ablation(circuits.values())
    rows = {"full model": Circuit.full(model.graph, ablation=ablation), **circuits}
    if len(circuits) > 1:
        first, *others = circuits.values()
        common = either = first
        for other in others:
            common, either = common & other, either | other
        rows |= {"intersection": common, "union": either}
    found: list[dict[str, Any]] = []
    for name, task in tasks.items():
        reference = task_reference(model, ablation, task, split, output_bias, on_note=on_note)
        for label, circuit in rows.items():
            measured = score(reference, Masks.from_circuit(circuit), metrics, task)
            found.append({"circuit": label, "edges": circuit.num_edges, "task": name, **measured})
            if on_cell is not None:
                on_cell(len(found), len(rows) * len(tasks))
    return found
