"""Circuits that people found by hand, to compare with: heads, nodes and edges, each with its source.

- ``ioi``, ``greater-than``: heads and edges in GPT-2 small;
- ``docstring``: heads and edges in attn-only-4l, a model of 4 layers without MLPs;
- ``acronyms``, ``ioi-extraction``, ``greater-than-extraction``: the heads in GPT-2 small that the circuit extraction
  paper compares with; no edges are known.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from fastcircuit.circuit import Circuit
from fastcircuit.errors import InputError
from fastcircuit.files import read_json
from fastcircuit.graph import Graph

_DATA = Path(__file__).resolve().parent / "data" / "manual_circuits.json"


@dataclass(frozen=True)
class ManualCircuit:
    """What is known of a circuit that was found by hand.

    Args:
        name: one of :func:`manual_circuit_names`.
        heads: attention heads in it, by writer name.
        circuit: its edges over the graph asked for; None when only heads are known.
        source: paper and data it is from.
    """

    name: str
    heads: frozenset[str]
    circuit: Circuit | None
    source: str

    @property
    def nodes(self) -> frozenset[str]:
        """Its writers: the heads, and the embeddings and MLPs that its edges read from."""
        return self.heads | frozenset(self.circuit.nodes if self.circuit else ())


def manual_circuit_names() -> list[str]:
    """The circuits there are, sorted."""
    return sorted(_data())


def manual_circuit(name: str, graph: Graph) -> ManualCircuit:
    """The circuit ``name`` over ``graph``, which is of the model it was found in.

    An edge from the input is one from both embeddings where they are two writers, and none where they are no writer.

    Raises:
        InputError: no such circuit, or a graph of another model.
    """
    if name not in _data():
        raise InputError(f"no manual circuit {name!r}; there are: {', '.join(manual_circuit_names())}")
    found = _data()[name]
    model = found["model"]
    if (graph.num_layers, graph.num_heads, graph.num_kv_heads) != (model["layers"], model["heads"], model["heads"]):
        raise InputError(
            f"manual circuit {name} is of {model['name']}: {model['layers']} layers of {model['heads']} heads; this "
            f"graph has {graph.num_layers} of {graph.num_heads} ({graph.num_kv_heads} key/value heads)"
        )
    circuit = None
    if found["edges"] is not None:
        embeddings = graph.writers[: graph.num_embedding_writers]
        edges = [
            (own, reader)
            for writer, reader in found["edges"]
            for own in (embeddings if writer == "embeds" else (writer,))
        ]
        circuit = Circuit.from_edges(graph, edges, task=name, provenance={"source": found["source"]})
    return ManualCircuit(name, frozenset(found["heads"]), circuit, found["source"])


@cache
def _data() -> Mapping[str, Any]:
    return read_json(_DATA, "manual circuits")
