"""Edges that help only together: the ways j -> c -> r through components c that a circuit does not use.

Nothing reads c, so that an edge into it changes nothing; and fed with nothing clean, c writes (under interchange) what
it wrote in the corrupted run, so that an edge out of it changes nothing either. The gradient of both is exactly 0, and
no move of one edge takes either. What they gain together is estimated with the missing half in place: edges out of c
with c fed by everything it could be (nothing reads c: the circuit's output is the same), then edges into c with the
best edge out of it.
"""

from collections.abc import Callable

import numpy as np

from fastcircuit.circuit import Circuit
from fastcircuit.graph import Graph

Gradient = Callable[[Circuit], np.ndarray]


def joint_pairs(circuit: Circuit, gradient: Gradient, most: int) -> list[tuple[int, int]]:
    """The edges ``(j -> c, c -> r)`` of the ways that promise most, best first, each through another component c.

    Args:
        gradient: of the KL in every edge's mask at a circuit, ``[num_edges]``; called twice.
        most: pairs at most.
    """
    into = _edges_into_unread(circuit)
    if not into.any():
        return []
    gain = -gradient(_with(circuit, into))
    out_of = _best_per_component(circuit, gain, most)
    if not len(out_of):
        return []
    gain = -gradient(_with(circuit, out_of))
    pairs = []
    for edge in out_of.tolist():
        inputs = np.flatnonzero(into & _feeding(circuit.graph, circuit.graph.edge_writers[edge]))
        best = max(inputs.tolist(), key=gain.__getitem__, default=None)
        if best is not None and gain[best] > 0:
            pairs.append((best, edge))
    return pairs


def _edges_into_unread(circuit: Circuit) -> np.ndarray:
    """Edges into readers that no kept path joins to the output, from writers that the circuit uses or embeddings, bool
    ``[num_edges]``."""
    graph = circuit.graph
    writers, readers = graph.live(circuit.keep)
    writers[: graph.num_embedding_writers] = True
    return writers[graph.edge_writers] & ~readers[graph.edge_readers]


def _best_per_component(circuit: Circuit, gain: np.ndarray, most: int) -> np.ndarray:
    """Of the edges out of components that nothing reads, into readers the circuit uses, the one that gains most of
    every component that gains anything; the best ``most`` of them, best first."""
    graph = circuit.graph
    writers, readers = graph.live(circuit.keep)
    writers[: graph.num_embedding_writers] = True
    edges = np.flatnonzero(~writers[graph.edge_writers] & readers[graph.edge_readers] & (gain > 0))
    edges = edges[np.argsort(-gain[edges], kind="stable")]
    _, first = np.unique(graph.edge_writers[edges], return_index=True)
    return edges[np.sort(first)][:most]


def _feeding(graph: Graph, writer: int) -> np.ndarray:
    """Edges into the readers of a component, bool ``[num_edges]``."""
    readers, writers = graph.feeds
    return np.isin(graph.edge_readers, readers[writers == writer])


def _with(circuit: Circuit, edges: np.ndarray) -> Circuit:
    """The circuit and some more edges, by flag or number."""
    keep = circuit.keep.copy()
    keep[edges] = True
    return Circuit(circuit.graph, keep, ablation=circuit.ablation)


def with_pair(circuit: Circuit, pair: tuple[int, int]) -> Circuit:
    """The circuit and both edges of a pair."""
    return _with(circuit, np.array(pair))
