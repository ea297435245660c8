"""``edges.json`` of the Edge Pruning code: ``[["a0.h1", "a3.h2.q"], ["m3", "resid_post"], ...]``, kept edges only."""

import dataclasses
from typing import Any

from fastcircuit.circuit import Circuit
from fastcircuit.errors import InputError
from fastcircuit.formats.circuit_file import CircuitFile
from fastcircuit.formats.conventions import to_graph
from fastcircuit.graph import EmbeddingNodes, Graph

# The writers that only one way of counting embeddings has.
_EMBEDDINGS: dict[str, EmbeddingNodes] = {"tok_embeds": "split", "pos_embeds": "split", "embeds": "joint"}


def recognises(value: Any) -> bool:
    """Any list: ACDC's are told apart before."""
    return isinstance(value, list)


def parse(edges: list[Any], graph: Graph | None) -> CircuitFile:
    """The kept edges, counted as their names say, over ``graph``."""
    if graph is None:
        raise InputError(
            "a plain edge list does not say which model it is of; name it (convert --model, evaluate --embedding-nodes)"
        )
    names = {edge[0] for edge in edges if isinstance(edge, list) and edge and isinstance(edge[0], str)}
    counted = {_EMBEDDINGS[name] for name in names & set(_EMBEDDINGS)}
    own = dataclasses.replace(graph, embedding_nodes=counted.pop()) if len(counted) == 1 else graph
    return CircuitFile("edge-pruning", to_graph(Circuit.from_edges(own, edges), graph))


def dump(file: CircuitFile) -> list[list[str]]:
    """The kept edges in canonical order."""
    return [list(edge) for edge in file.circuit.edges]
