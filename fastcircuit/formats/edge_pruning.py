"""``edges.json`` of the Edge Pruning code: ``[["a0.h1", "a3.h2.q"], ["m3", "resid_post"], ...]``, kept edges only.

That code counts the embeddings as the architecture has tables: ``tok_embeds`` and ``pos_embeds`` in GPT-2, ``embeds``
in Llama. Circuits are written so; one over embedding nodes ``none`` with all edges of the embeddings, which is the same
circuit. A list without any would be read as one that removes them all.
"""

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
    """The kept edges in canonical order, over the published code's own graph of the model.

    Raises:
        InputError: the circuit does not say of which architecture it is, or keeps one of two embeddings that are one.
    """
    circuit = file.circuit
    own = dataclasses.replace(circuit.graph, embedding_nodes=_published_nodes(circuit))
    return [list(edge) for edge in to_graph(circuit, own).edges]


def _published_nodes(circuit: Circuit) -> EmbeddingNodes:
    graph, architecture = circuit.graph, circuit.model.get("architecture")
    if graph.embedding_nodes == "split" or architecture in ("gpt2", "tracr"):
        return "split"
    if architecture is not None or graph.num_kv_heads < graph.num_heads:
        return "joint"
    raise InputError(
        f"it counts embeddings as {graph.embedding_nodes!r} and does not say of which model it is, and edge-pruning "
        "lists have two embeddings for GPT-2 and one for Llama; name it (convert --model)"
    )
