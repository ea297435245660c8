"""Edge faithfulness: is an edge that matters to the circuit one that matters to the model? (Edge Pruning, appendix D)

For every edge e of a circuit C of the model M: ``m_e = KL(M || M without e)`` and ``c_e = KL(M || C without e)``. The
rise ``c_e - KL(M || C)`` is also what minimality asks for: an edge that raises nothing could be left out.

Both are measured from the edge's reader on, and only where something changes (see ``incremental.py``): first from the
clean run; then, reader by reader from the output down, whatever the circuit lacks is removed, and from there again.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fastcircuit.circuit import Circuit
from fastcircuit.discovery.incremental import IncrementalRun
from fastcircuit.discovery.points import CleanPoint, clean_points
from fastcircuit.discovery.scores import check_computed
from fastcircuit.errors import InputError
from fastcircuit.evaluation.cache import Budgets
from fastcircuit.evaluation.faithfulness import check_circuit_fits, task_reference
from fastcircuit.evaluation.reference import OnNote
from fastcircuit.models.masked import MaskedCausalLM
from fastcircuit.tasks.task import Task

BATCH_BYTES = 2**28
COPY_BYTES = 2**26


@dataclass(frozen=True)
class EdgeFaithfulness:
    """What removing each edge of a circuit does, KL to the full model in nats.

    Args:
        edges: names of the circuit's edges, n of them.
        model: ``m_e``, ``[n]``.
        circuit: ``c_e``, ``[n]``.
        whole: ``KL(M || C)``.
        examples: how many they are means over.
    """

    edges: list[tuple[str, str]]
    model: np.ndarray
    circuit: np.ndarray
    whole: float
    examples: int

    @property
    def correlation(self) -> float | None:
        """Pearson's, of ``m_e`` and ``c_e``; None when one of them does not vary."""
        if len(self.edges) < 2 or not (np.ptp(self.model) and np.ptp(self.circuit)):
            return None
        return float(np.corrcoef(self.model, self.circuit)[0, 1])

    @property
    def rises(self) -> np.ndarray:
        """``c_e - KL(M || C)``, ``[n]``: what leaving each edge out costs."""
        return self.circuit - self.whole

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it; ``minimality`` sums up the rises: an edge without one is not needed."""
        return {
            "kl": self.whole,
            "examples": self.examples,
            "correlation": self.correlation,
            "minimality": {
                "least_rise": float(self.rises.min()),
                "median_rise": float(np.median(self.rises)),
                "needed": int((self.rises > 0).sum()),
                "not_needed": int((self.rises <= 0).sum()),
            },
            "edges": [
                {"edge": list(edge), "model_kl": float(m), "circuit_kl": float(c)}
                for edge, m, c in zip(self.edges, self.model, self.circuit, strict=True)
            ],
        }


def edge_faithfulness(
    model: MaskedCausalLM,
    circuit: Circuit,
    task: Task,
    split: str = "test",
    most_examples: int | None = None,
    on_batch: Callable[[int, int], None] | None = None,
    on_note: OnNote | None = None,
) -> EdgeFaithfulness:
    """Measure every edge of ``circuit`` on a split.

    Args:
        most_examples: on so many of its examples, the first; None: on all.
        on_batch: called with the examples done and how many there are.
        on_note: called with a line when memory runs out and less is computed at once.

    Raises:
        InputError: a circuit of another model, or without edges; no examples.
        RunError: a KL is not finite.
    """
    if most_examples is not None and most_examples < 1:
        raise InputError(f"most_examples is {most_examples}; it must be at least 1")
    check_circuit_fits(model, circuit)
    if not circuit.num_edges:
        raise InputError("the circuit has no edges; there is nothing to remove")
    reference = task_reference(model, circuit.ablation, task, split, circuit.output_bias, Budgets(0, 0), on_note)
    if most_examples is not None:
        reference = reference.first(most_examples)
    of_model, of_circuit = np.zeros(circuit.graph.num_edges), np.zeros(circuit.graph.num_edges)
    whole, done = 0.0, 0
    for point in clean_points(reference, "kl", BATCH_BYTES):
        _add_rises_of_model(point, circuit, of_model)
        whole += _add_kls_of_circuit(point, circuit, of_circuit)
        done += point.batch.size
        if on_batch is not None:
            on_batch(done, len(reference))
    check_computed(circuit.graph, of_model + of_circuit)
    kept = circuit.keep
    return EdgeFaithfulness(circuit.edges, of_model[kept] / done, of_circuit[kept] / done, whole / done, done)


def _add_rises_of_model(point: CleanPoint, circuit: Circuit, found: np.ndarray) -> None:
    """Add the KL, summed over a batch, of the full model without each edge of ``circuit``."""
    run = IncrementalRun(point, np.ones(circuit.graph.num_edges, dtype=bool))
    for number in reversed(range(len(circuit.graph.sites))):
        run.enter(number)
        _add_without_each(run, number, circuit, found, otherwise=0.0)


def _add_kls_of_circuit(point: CleanPoint, circuit: Circuit, found: np.ndarray) -> float:
    """Add the KL, summed over a batch, of ``circuit`` without each of its edges; returns that of the circuit."""
    graph, kept = circuit.graph, np.ones(circuit.graph.num_edges, dtype=bool)
    run, whole = IncrementalRun(point, kept), 0.0
    for number in reversed(range(len(graph.sites))):
        run.enter(number)
        site = graph.sites[number]
        for row in range(site.num_readers):
            missing = np.flatnonzero(~site.view(circuit.keep)[row])
            if len(missing) and run.is_live(number, row):
                trial = run.without_all(number, row, missing.tolist())
                trial.commit(0)
                whole = float(trial.losses[0])
        site.view(kept)[:] = site.view(circuit.keep)
    for number in range(len(graph.sites)):
        _add_without_each(run, number, circuit, found, otherwise=whole)
    return whole


def _add_without_each(run: IncrementalRun, number: int, circuit: Circuit, found: np.ndarray, otherwise: float) -> None:
    """Add the loss without each edge of ``circuit`` into one site, one at a time, ``otherwise`` where none changes."""
    site = circuit.graph.sites[number]
    copy = 8 * run.num_tokens * run.point.embeds.shape[-1] * run.point.embeds.element_size()
    for row in range(site.num_readers):
        writers = np.flatnonzero(site.view(circuit.keep)[row])
        values = np.full(len(writers), otherwise)
        if len(writers) and run.is_live(number, row):
            some = torch.from_numpy(writers).split(max(1, COPY_BYTES // copy))
            values = torch.cat([run.without_each(number, row, part.tolist()).losses for part in some]).numpy()
        site.view(found)[row, writers] += values
