"""How many edges a circuit has, by every way of counting that is in use."""

from typing import Any

import numpy as np

from fastcircuit.circuit import Circuit
from fastcircuit.graph import EMBEDDING_NODES, EmbeddingNodes, Graph


def sizes(circuit: Circuit) -> dict[str, Any]:
    """Edges and writers of ``circuit`` in every convention.

    Returns:
        ``edges``, ``total_edges`` and ``sparsity`` (fraction removed) over its own graph, and ``effective_edges``,
        those of them that matter (:meth:`Circuit.pruned`);
        ``conventions``: the same three for every treatment of the embeddings that the circuit can be counted in:
        ``split`` (Edge Pruning; GPT-2 small has 32,936), ``joint`` (EAP-IG, MIB, ACDC; an edge from the one input is
        there when one from either table is; 32,491) and ``none`` (embeddings always kept; 32,046);
        ``writers`` and ``total_writers`` (those that some kept edge reads from), ``readers`` and ``total_readers``
        (those that some kept edge leads to), ``writer_sparsity``.
    """
    graph = circuit.graph
    read = np.unique(graph.edge_readers[circuit.keep])
    writers = int(circuit.writer_kept.sum())
    return {
        **_counts(circuit.num_edges, graph.num_edges),
        "effective_edges": circuit.pruned().num_edges,
        "conventions": {
            convention: _counts(*_counted(circuit, convention)) for convention in _conventions(graph.embedding_nodes)
        },
        "writers": writers,
        "total_writers": graph.num_writers,
        "writer_sparsity": 1 - writers / graph.num_writers,
        "readers": len(read),
        "total_readers": graph.num_readers,
    }


def _counts(kept: int, total: int) -> dict[str, Any]:
    return {"edges": kept, "total_edges": total, "sparsity": 1 - kept / total}


def _conventions(own: EmbeddingNodes) -> tuple[EmbeddingNodes, ...]:
    """Those with no more writers than ``own``: edges can be merged or left out, not told apart."""
    return EMBEDDING_NODES[EMBEDDING_NODES.index(own) :]


def _counted(circuit: Circuit, convention: EmbeddingNodes) -> tuple[int, int]:
    """Edges kept and edges there are."""
    graph = circuit.graph
    other = Graph(graph.num_layers, graph.num_heads, graph.num_kv_heads, convention)
    from_embeddings = graph.edge_writers < graph.num_embedding_writers
    kept = int((circuit.keep & ~from_embeddings).sum())
    if convention != "none":
        pairs = graph.edge_readers[circuit.keep & from_embeddings]
        kept += len(pairs) if convention == graph.embedding_nodes else len(np.unique(pairs))
    return kept, other.num_edges
