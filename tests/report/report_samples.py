"""Circuits to draw: random but connected, as discovery would find them."""

import numpy as np

from fastcircuit.circuit import Circuit
from fastcircuit.graph import Graph

STORIES = Graph(5, 8, 4, "joint")  # grouped-query attention
GPT2 = Graph(12, 12, 12, "split")
HOSTILE = "</script><b>x</b>&\"'$name ${name} \x00\x1b[1m\ud800 ]]>"


def random_circuit(graph: Graph, num_edges: int, seed: int = 0, **about: object) -> Circuit:
    """About ``num_edges`` edges, all on a path from the embeddings to the output, some nodes busier than others."""
    rng = np.random.default_rng(seed)
    busy = rng.gamma(0.5, 1.0, graph.num_writers) + 0.02
    busy[: graph.num_embedding_writers] = busy.max()
    eager = rng.gamma(0.6, 1.0, graph.num_readers) + 0.02
    eager[-1] = 2 * eager.max()
    score = busy[graph.edge_writers] * eager[graph.edge_readers] * rng.gamma(0.5, 1.0, graph.num_edges)
    ranked = np.argsort(-score)
    low, high = num_edges, graph.num_edges
    while low < high:
        keep = np.zeros(graph.num_edges, dtype=bool)
        keep[ranked[: (low + high) // 2]] = True
        circuit = Circuit(graph, keep, **about).pruned()  # type: ignore[arg-type]
        low, high = (low, (low + high) // 2) if circuit.num_edges >= num_edges else ((low + high) // 2 + 1, high)
    return circuit
