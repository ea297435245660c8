"""From scores to a circuit with exactly as many edges as asked for."""

import numpy as np

from fastcircuit.circuit import Ablation, Circuit
from fastcircuit.errors import InputError
from fastcircuit.graph import Graph


def edges_for_sparsity(graph: Graph, sparsity: float) -> int:
    """Number of edges a circuit of this sparsity keeps, ``round((1 - sparsity) * num_edges)``, at least 1."""
    if not 0 <= sparsity < 1:
        raise InputError(f"sparsity is {sparsity}; it must be in [0, 1), the fraction of edges that is removed")
    return max(1, round((1 - sparsity) * graph.num_edges))


def check_num_edges(graph: Graph, num_edges: int) -> int:
    """``num_edges`` itself; InputError unless it is between 1 and the edges of ``graph``."""
    if not 1 <= num_edges <= graph.num_edges:
        raise InputError(f"edges is {num_edges}; this model has 1 to {graph.num_edges} edges to keep")
    return num_edges


def top_circuit(graph: Graph, scores: np.ndarray, num_edges: int, ablation: Ablation = "interchange") -> Circuit:
    """The circuit of exactly ``num_edges`` edges that matter, best scores first.

    Edges are taken in order of score; those that cannot matter (see :meth:`Circuit.pruned`) do not count. What is still
    missing in the end is filled, in order of score, with edges that add no more than is missing.

    Args:
        scores: ``[num_edges]``; higher is kept first, ties in canonical order.
    """
    order = np.argsort(-scores, kind="stable")

    def pruned(taken: np.ndarray) -> Circuit:
        return Circuit(graph, taken, ablation=ablation).pruned()

    taken, count = _longest_prefix(order, num_edges, lambda keep: pruned(keep).num_edges)
    circuit = pruned(taken)
    for edge in order[count:]:
        if circuit.num_edges == num_edges:
            return circuit
        taken = circuit.keep.copy()
        taken[edge] = True
        candidate = pruned(taken)
        if circuit.num_edges < candidate.num_edges <= num_edges:
            circuit = candidate
    return circuit if circuit.num_edges == num_edges else _fill(circuit, order, num_edges)


def _longest_prefix(order: np.ndarray, num_edges: int, effective) -> tuple[np.ndarray, int]:
    """The longest prefix of ``order`` with at most ``num_edges`` effective edges, which grow with the prefix."""

    def keep(count: int) -> np.ndarray:
        flags = np.zeros(len(order), dtype=bool)
        flags[order[:count]] = True
        return flags

    low, high = num_edges, len(order)
    while low < high:
        middle = (low + high + 1) // 2
        if effective(keep(middle)) <= num_edges:
            low = middle
        else:
            high = middle - 1
    return keep(low), low


def _fill(circuit: Circuit, order: np.ndarray, num_edges: int) -> Circuit:
    """Take edges that do not matter, best scores first, when the graph has too few that do."""
    keep = circuit.keep.copy()
    missing = [edge for edge in order if not keep[edge]][: num_edges - circuit.num_edges]
    keep[missing] = True
    return Circuit(circuit.graph, keep, ablation=circuit.ablation)
